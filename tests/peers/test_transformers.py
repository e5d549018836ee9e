"""Our BERT and GPT-2 against Hugging Face's, both ways, with random weights: nothing is downloaded.

For the refined variants the attention of their models is replaced by the direct formulas of `test_torch_refine`.
"""

import dataclasses

import numpy as np
import pytest

from minisaobp import from_pretrained
from minisaobp.nn import Bert, Gpt2
from minisaobp.training.adamw import AdamW, clip_to_norm, cosine_with_warmup
from tests.nn.test_decoder import tiny as tiny_gpt2
from tests.nn.test_heads import BATCHES
from tests.nn.test_heads import tiny as tiny_with_head
from tests.nn.test_model import IDS, LABELS, MASK
from tests.nn.test_model import tiny as tiny_bert

torch = pytest.importorskip("torch", reason="torch is not installed (the peers are: see .ci/run)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (the peers are: see .ci/run)")

from tests.peers.test_torch_refine import elemmul, flooding, potts_message, visible_entries  # noqa: E402

LAM = 0.4
VARIANTS = ["original", "high", "low", "elemmul"]
NEXT = np.where(MASK == 1, IDS, -100)  # GPT-2's labels: the tokens


def refined_attention(variant, causal):
    """A function for the place of transformers' eager_attention_forward."""

    def attend(module, query, key, value, attention_mask, scaling=None, **_):
        A = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5 + attention_mask, -1)
        visible = visible_entries(torch.tensor(MASK == 1), causal)[:, None]
        if variant == "elemmul":
            A = elemmul(A, visible)
        elif variant != "original":
            lam = torch.tensor(LAM if variant == "high" else -LAM, dtype=A.dtype).reshape(1, 1, 1)
            A = flooding(A, potts_message(lam), visible, include_self=False, steps=1, damping=0.0)
        return (A @ value).transpose(1, 2).contiguous(), A

    return attend


@pytest.fixture(params=["bert", "gpt2"])
def theirs(request):
    torch.manual_seed(0)
    if request.param == "bert":
        sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
        config = transformers.BertConfig(vocab_size=11, max_position_embeddings=7, attn_implementation="eager", **sizes)
        model = transformers.BertForMaskedLM(config)
    else:
        config = transformers.GPT2Config(
            vocab_size=11, n_embd=12, n_layer=2, n_head=3, n_positions=7, attn_implementation="eager"
        )
        model = transformers.GPT2LMHeadModel(config)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def opened(theirs, directory, variant):
    """Our model from their directory, with the variant."""
    theirs.save_pretrained(directory)
    ours = from_pretrained(directory)
    return type(ours)(dataclasses.replace(ours.config, attention_variant=variant, lam=LAM), ours.parameters)


def their_output(theirs):
    """Logits, and the loss in float64: their own GPT-2 loss rounds the logits to float32 first."""
    logits = theirs(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits
    if theirs.config.model_type == "gpt2":
        scores, labels = logits[:, :-1], torch.tensor(NEXT)[:, 1:]
    else:
        scores, labels = logits, torch.tensor(LABELS)
    return logits, torch.nn.functional.cross_entropy(scores.reshape(-1, 11), labels.reshape(-1), ignore_index=-100)


def labels_of(ours):
    return NEXT if isinstance(ours, Gpt2) else LABELS


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient(theirs, variant, tmp_path, monkeypatch):
    ours = opened(theirs, tmp_path, variant)
    if variant != "original":
        module = getattr(transformers.models, theirs.config.model_type)
        module = getattr(module, f"modeling_{theirs.config.model_type}")
        monkeypatch.setattr(module, "eager_attention_forward", refined_attention(variant, isinstance(ours, Gpt2)))
    logits, their_loss = their_output(theirs)
    their_loss.backward()
    # float64, two layers: sums of tens of terms in another order, 1e-15 each
    np.testing.assert_allclose(ours.logits(IDS, MASK), logits.detach().numpy(), rtol=0, atol=1e-9)
    loss, gradients = ours.loss_and_gradients(IDS, labels_of(ours), MASK)
    assert loss == pytest.approx(their_loss.item(), abs=1e-10)
    named = dict(theirs.named_parameters())
    assert set(gradients) == set(named)
    for name, gradient in gradients.items():
        wanted = named[name].grad.numpy()
        # BERT's key biases have no gradient but rounding under "original" (a softmax does not see them): the floor is
        # for them
        assert np.linalg.norm(gradient - wanted) <= 1e-8 * max(np.linalg.norm(wanted), 1e-6), name


def test_five_steps_of_adamw_with_clipping_and_schedule(theirs, tmp_path):
    ours = opened(theirs, tmp_path, "original")
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    their_adamw = torch.optim.AdamW(groups, lr=1.0)
    our_adamw = AdamW.for_parameters(ours.parameters, weight_decay=0.1)
    for step in range(5):
        rate = cosine_with_warmup(step, 5, 1e-2, 2)
        their_adamw.zero_grad()
        their_output(theirs)[1].backward()
        their_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in their_adamw.param_groups:
            group["lr"] = rate
        their_adamw.step()
        _, gradients = ours.loss_and_gradients(IDS, labels_of(ours), MASK)
        norm = clip_to_norm(gradients.flat, 0.5)
        our_adamw.update(ours.parameters.flat, gradients.flat, rate)
        assert norm > 0.5 and norm == pytest.approx(their_norm.item(), rel=1e-9)
    for name, parameter in theirs.named_parameters():
        # a gradient that is nothing but rounding, as that of a key bias, is a full step to Adam: its direction is noise
        if name.endswith("key.bias") or name.endswith("c_attn.bias"):
            continue
        # after five steps of 1e-2: gradients of 1e-8 relative, divided by their own size
        np.testing.assert_allclose(ours.parameters[name], parameter.detach().numpy(), rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("tiny", [tiny_bert, tiny_gpt2], ids=["bert", "gpt2"])
def test_transformers_opens_what_we_wrote(tiny, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    kind = transformers.BertForMaskedLM if isinstance(model, Bert) else transformers.GPT2LMHeadModel
    theirs = kind.from_pretrained(tmp_path, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits.numpy()
    np.testing.assert_allclose(model.logits(IDS, MASK), logits, rtol=0, atol=1e-9)


KINDS = {
    "classification": transformers.BertForSequenceClassification,
    "regression": transformers.BertForSequenceClassification,
    "multiple_choice": transformers.BertForMultipleChoice,
    "span": transformers.BertForQuestionAnswering,
}


def arguments_of(head):
    ids, labels, *others = BATCHES[head]
    named = {"input_ids": ids} | dict(zip(("attention_mask", "token_type_ids"), others, strict=False))
    named |= {"start_positions": labels[:, 0], "end_positions": labels[:, 1]} if head == "span" else {"labels": labels}
    return {name: torch.tensor(array) for name, array in named.items()}


@pytest.mark.parametrize("head", KINDS)
def test_heads_with_token_types(head, tmp_path):
    ours = tiny_with_head(head)
    ours.save_pretrained(tmp_path)
    theirs = KINDS[head].from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    output = theirs(**arguments_of(head))
    output.loss.backward()
    ids, labels, *others = BATCHES[head]
    logits = torch.stack([output.start_logits, output.end_logits], 1) if head == "span" else output.logits
    np.testing.assert_allclose(ours.logits(ids, *others), logits.detach().numpy(), rtol=0, atol=1e-9)
    loss, gradients = ours.loss_and_gradients(ids, labels, *others)
    assert loss == pytest.approx(output.loss.item(), abs=1e-10)
    named = dict(theirs.named_parameters())
    assert set(gradients) == set(named)
    for name, gradient in gradients.items():
        wanted = named[name].grad.numpy()
        assert np.linalg.norm(gradient - wanted) <= 1e-8 * max(np.linalg.norm(wanted), 1e-6), name
    theirs.save_pretrained(tmp_path / "theirs")
    assert from_pretrained(tmp_path / "theirs").config == ours.config


def test_the_encoder_alone_with_its_pooler(tmp_path):
    ours = tiny_with_head("none")
    ours.save_pretrained(tmp_path)
    theirs = transformers.BertModel.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    output = theirs(torch.tensor(IDS), attention_mask=torch.tensor(MASK))
    np.testing.assert_allclose(ours.hidden_states(IDS, MASK), output.last_hidden_state.detach().numpy(), atol=1e-9)
    np.testing.assert_allclose(ours.logits(IDS, MASK), output.pooler_output.detach().numpy(), rtol=0, atol=1e-9)
    theirs.save_pretrained(tmp_path / "theirs")
    again = from_pretrained(tmp_path / "theirs")
    assert again.config.head == "none" and np.array_equal(again.parameters.flat, ours.parameters.flat)


def test_dropout_stands_where_theirs_does(monkeypatch, tmp_path):
    """Their dropout with what ours draws: the same loss, so each drops the same numbers in the same order."""
    for make, kind in ((tiny_with_head, "classification"), (tiny_gpt2, None)):
        rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
        ours = make(kind, **rates) if kind else make(**rates)
        ours.save_pretrained(tmp_path / str(kind))
        model = KINDS[kind] if kind else transformers.GPT2LMHeadModel
        theirs = model.from_pretrained(tmp_path / str(kind), dtype=torch.float64, attn_implementation="eager").train()
        rng = np.random.default_rng(7)

        def drawn(x, p=0.5, training=True, inplace=False, rng=rng):
            kept = torch.tensor(rng.random(x.shape, np.float32) >= p)
            return x * kept / (1 - p) if training and p else x

        monkeypatch.setattr(torch.nn.functional, "dropout", drawn)
        batch = BATCHES[kind] if kind else (IDS, NEXT, MASK)
        arguments = arguments_of(kind) if kind else {}
        their_loss = theirs(**arguments).loss if kind else their_output(theirs)[1]
        loss, _ = ours.loss_and_gradients(*batch, rng=np.random.default_rng(7))
        assert loss == pytest.approx(their_loss.item(), abs=1e-10)
        assert loss != ours.loss_and_gradients(*batch)[0]
