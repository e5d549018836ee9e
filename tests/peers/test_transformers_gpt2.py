"""Our GPT-2 against Hugging Face's, both ways, with random weights from a configuration: nothing is downloaded."""

import numpy as np
import pytest

from minisaobp import from_pretrained
from tests.nn.test_decoder import tiny
from tests.nn.test_model import IDS, MASK

torch = pytest.importorskip("torch", reason="torch is not installed (the peers are: see .ci/run)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (the peers are: see .ci/run)")
LABELS = np.where(MASK == 1, IDS, -100)


def inputs():
    return {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}


def test_logits_loss_and_every_gradient(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=11, n_embd=12, n_layer=2, n_head=3, n_positions=7, attn_implementation="eager"
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    output = theirs(**inputs())
    # their own loss rounds the logits to float32 first, so the shift and the mean are written out here
    follows = torch.tensor(LABELS)[:, 1:].reshape(-1)
    wanted_loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, 11), follows, ignore_index=-100)
    wanted_loss.backward()
    # float64, two layers: sums of tens of terms in another order, 1e-15 each
    np.testing.assert_allclose(ours.logits(IDS, MASK), output.logits.detach().numpy(), rtol=0, atol=1e-9)
    loss, gradients = ours.loss_and_gradients(IDS, LABELS, MASK)
    assert loss == pytest.approx(wanted_loss.item(), abs=1e-10)
    named = dict(theirs.named_parameters())
    assert set(gradients) == set(named)
    for name, gradient in gradients.items():
        wanted = named[name].grad.numpy()
        assert np.linalg.norm(gradient - wanted) <= 1e-8 * np.linalg.norm(wanted), name


def test_transformers_opens_what_we_wrote(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = theirs(**inputs()).logits.numpy()
    np.testing.assert_allclose(model.logits(IDS, MASK), logits, rtol=0, atol=1e-9)
