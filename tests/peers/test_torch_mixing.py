"""The simplified attentions and the two regularisers against PyTorch: written down once more, gradients by autograd."""

import math

import numpy as np
import pytest

from minisaobp.nn.attention import attention, attention_backward
from minisaobp.nn.config import MIXINGS
from minisaobp.nn.regularisers import (
    eigen_penalty,
    eigen_penalty_backward,
    entropy_penalty,
    entropy_penalty_backward,
)

torch = pytest.importorskip("torch", reason="torch is not installed (the peers are: see .ci/run)")

B, L, H, E = 2, 6, 3, 4
VALID = np.arange(L) < np.array([[L], [4]])
SAME = {"rtol": 0, "atol": 1e-12}  # float64, sums of a few terms in another order


def written_down(qkv, scores, variant, visible):
    """Attention token by token pair, with -inf where nothing may be seen."""
    v = qkv[:, :, -1].transpose(1, 2)
    if variant == "none":
        return v.transpose(1, 2)
    if variant == "linear":
        q, k = (torch.nn.functional.elu(qkv[:, :, n].transpose(1, 2)) + 1 for n in range(2))
        weights = (q[:, :, :, None] * k[:, :, None]).sum(-1) * visible
        A = weights / weights.sum(-1, keepdim=True)
    else:
        if variant == "uniform":
            logits = torch.zeros(B, H, L, L, dtype=torch.float64)
        elif variant == "fixed":
            logits = scores[None, :, :L, :L]
        else:
            q, k = (qkv[:, :, n].transpose(1, 2) for n in range(2))
            logits = (q[:, :, :, None] * k[:, :, None]).sum(-1) / math.sqrt(E)
        A = torch.softmax(logits.masked_fill(~visible, -torch.inf), -1)
    return (A @ v).transpose(1, 2)


@pytest.mark.parametrize("variant", MIXINGS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_mixing(variant, causal, padded):
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((B, L, 1 if variant in ("none", "uniform", "fixed") else 3, H, E))
    scores, dmixed = rng.standard_normal((H, L + 2, L + 2)), rng.standard_normal((B, L, H, E))
    valid = VALID if padded else np.ones((B, L), bool)
    dmixed *= valid[:, :, None, None]  # what stands at padding reaches nothing, and differs between the variants
    mixed, _, cache = attention(qkv, scores, variant, valid if padded else None, causal)
    ours = [mixed, *(d for d in attention_backward(dmixed, cache) if d is not None)]

    theirs_in = torch.tensor(qkv, requires_grad=True), torch.tensor(scores, requires_grad=True)
    visible = torch.tensor(valid)[:, None, None, :] & torch.ones(L, L, dtype=torch.bool)
    theirs = written_down(*theirs_in, variant, visible.tril() if causal else visible)
    theirs.backward(torch.tensor(dmixed))
    np.testing.assert_allclose(ours[0][valid], theirs.detach().numpy()[valid], **SAME)
    wanted = [x.grad.numpy() for x in theirs_in if x.grad is not None]
    assert len(ours) == 1 + len(wanted)
    for d, w in zip(ours[1:], wanted, strict=True):
        np.testing.assert_allclose(d, w, **SAME)


@pytest.mark.parametrize("padded", [False, True])
def test_entropy_penalty(padded):
    rng = np.random.default_rng(1)
    A = torch.softmax(2 * torch.tensor(rng.standard_normal((B, H, L, L))), -1)
    theta = torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64, requires_grad=True)
    tokens = [L, 4] if padded else [L, L]
    ours = entropy_penalty(A.numpy(), theta.detach().numpy(), VALID if padded else None)
    A.requires_grad_()
    total, penalised = 0, 0
    for b in range(B):
        for h in range(H):
            entropy = -(A[b, h, : tokens[b]] * A[b, h, : tokens[b]].log()).sum() / tokens[b]
            deviation = entropy - theta[h] * math.log(tokens[b])
            if abs(deviation) > 0.2 * math.log(tokens[b]):
                total, penalised = total + deviation**2 / (B * H), penalised + 1
    assert 0 < penalised < B * H
    (0.7 * total).backward()
    assert ours[0] == pytest.approx(total.item(), rel=1e-12)
    for d, x in zip(entropy_penalty_backward(0.7, ours[1]), (A, theta), strict=True):
        np.testing.assert_allclose(d, x.grad.numpy(), **SAME)


def test_eigen_penalty():
    rng = np.random.default_rng(2)
    maps = [torch.tensor(rng.standard_normal((H, E, 10)), requires_grad=True) for _ in range(2)]
    ours = eigen_penalty(*(m.detach().numpy() for m in maps))
    total = 0
    for q, k in zip(*maps, strict=True):
        W = q.T @ k
        total = total + (torch.trace(W @ W.T) - torch.trace(W) ** 2 / E) / H
    total.backward()
    assert ours[0] == pytest.approx(total.item(), rel=1e-12)
    for d, m in zip(eigen_penalty_backward(1.0, ours[1]), maps, strict=True):
        np.testing.assert_allclose(d, m.grad.numpy(), rtol=1e-10)
