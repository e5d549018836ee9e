"""Our BERT against Hugging Face's, both ways, with random weights from a configuration: nothing is downloaded."""

import numpy as np
import pytest

from minisaobp import from_pretrained
from tests.nn.test_model import IDS, LABELS, MASK, tiny

torch = pytest.importorskip("torch", reason="torch is not installed (the peers are: see .ci/run)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (the peers are: see .ci/run)")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(our model, theirs) with the same float64 weights, theirs written and ours read from its directory."""
    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=7,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs = transformers.BertForMaskedLM(config).double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    directory = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(directory)
    return from_pretrained(directory), theirs


def inputs():
    return {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}


def test_logits_loss_and_every_gradient(pair):
    ours, theirs = pair
    theirs.zero_grad()
    output = theirs(**inputs(), labels=torch.tensor(LABELS))
    output.loss.backward()
    # float64, two layers: sums of tens of terms in another order, 1e-15 each
    np.testing.assert_allclose(ours.logits(IDS, MASK), output.logits.detach().numpy(), rtol=0, atol=1e-9)
    loss, gradients = ours.loss_and_gradients(IDS, LABELS, MASK)
    assert loss == pytest.approx(output.loss.item(), abs=1e-10)
    named = dict(theirs.named_parameters())
    assert set(gradients) == set(named)
    for name, gradient in gradients.items():
        wanted = named[name].grad.numpy()
        # a key bias has no gradient but rounding (a softmax does not see it), so a floor stands beside the relative
        # tolerance: the largest gradient's rounding
        assert np.linalg.norm(gradient - wanted) <= 1e-8 * max(np.linalg.norm(wanted), 1e-6), name


def test_transformers_opens_what_we_wrote(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = theirs(**inputs()).logits.numpy()
    np.testing.assert_allclose(model.logits(IDS, MASK), logits, rtol=0, atol=1e-9)
