"""Refinement and its gradients against the formulas written directly in PyTorch float64, derivatives by its autograd.

Axis letters: i sends to j and has heard from h; r and k are the labels of sender and receiver.
"""

import numpy as np
import pytest

import minisaobp as ms
from minisaobp.bp import refine_with_factor, refine_with_factor_vjp

torch = pytest.importorskip("torch", reason="torch is not installed (the peers are: see .ci/run)")

CLOSE = 1e-10  # float64: up to three steps of products of 5 messages of up to e^2.5 each; measured below 1e-13


def normalised(x):
    total = x.sum(-1, keepdim=True)
    return x / torch.where(total > 0, total, 1.0)


def visible_entries(valid, causal):
    """(..., j, i): both are valid tokens and, if causal, i <= j. valid: (..., L)."""
    visible = valid[..., :, None] & valid[..., None, :]
    return visible.tril() if causal else visible


def elemmul(A, visible):
    """Eq. 15."""
    P = normalised(torch.where(visible, A, 0.0))
    return normalised(torch.where(visible, P @ P.mT, 0.0))


def potts_message(lam):
    """Eqs. 7 and 9 as printed, from q (..., i, j, r) to (..., i, j, k). lam: (..., 1, 1)."""
    growth = torch.exp(lam)[..., None]
    return lambda q: q + growth * (q.sum(-1, keepdim=True) - q)


def flooding(A, message, visible, include_self, steps, damping):
    """Eqs. 3-5, 8, 10 and 11: messages multiplied one by one."""
    P = normalised(torch.where(visible, A, 0.0))
    apart = ~torch.eye(A.shape[-1], dtype=torch.bool)
    hears = visible if include_self else visible & apart  # (..., j, i): j hears i
    m = torch.ones(*P.shape, P.shape[-1], dtype=P.dtype)  # (..., i, j, k)
    for _ in range(steps):
        heard = m.transpose(-3, -2)[..., :, None, :, :]  # (..., i, 1, h, k)
        from_others = hears[..., :, None, :, None] & apart[:, :, None]  # (..., i, j, h, 1): h is not the receiver
        q = normalised(P[..., :, None, :] * torch.where(from_others, heard, 1.0).prod(-2))
        m = torch.where(q.sum(-1, keepdim=True) > 0, message(q), 1.0) ** (1 - damping) * m**damping
    to_j = torch.where(hears[..., None], m.transpose(-3, -2), 1.0)  # (..., j, i, k)
    return normalised(P * to_j.prod(-2))


def example():
    """A (2, 3, 5, 5) with row sums near 1, an exact zero, and an upstream gradient."""
    rng = np.random.default_rng(0)
    A = np.exp(rng.standard_normal((2, 3, 5, 5))) * rng.uniform(0.1, 0.6, (2, 3, 5, 1))
    A[:, 1, 3, 2] = 0
    return A, rng.standard_normal(A.shape)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.detach().numpy().reshape(np.shape(ours)), rtol=0, atol=CLOSE)


STEPS = [(1, 0.0), (2, 0.0), (3, 0.0), (3, 0.3)]  # steps, damping
VARIANTS = [
    ("original", 1, 0.0),
    ("elemmul", 1, 0.0),
    *((variant, *how) for variant in ("high", "low") for how in STEPS),
]
MASKS = {"full": np.ones((2, 1, 5), bool), "padded": np.array([[True] * 5, [True] * 3 + [False] * 2])[:, None]}
LAMS = {"one lam": 0.7, "lam per head": np.array([0.2, -0.5, 2.5]).reshape(3, 1, 1)}


@pytest.mark.parametrize(("variant", "steps", "damping"), VARIANTS)
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("include_self", [False, True], ids=["others", "self"])
@pytest.mark.parametrize("lam", LAMS)
def test_refine_and_its_gradient(variant, steps, damping, causal, mask, include_self, lam):
    A, dB = example()
    lam = LAMS[lam]
    A_t, lam_t = (torch.tensor(x, requires_grad=True) for x in (A, np.reshape(lam, (-1, 1, 1))))
    visible = visible_entries(torch.tensor(MASKS[mask]), causal)
    if variant == "original":
        wanted = normalised(torch.where(visible, A_t, 0.0))
    elif variant == "elemmul":
        wanted = elemmul(A_t, visible)
    else:
        message = potts_message(lam_t if variant == "high" else -lam_t)
        wanted = flooding(A_t, message, visible, include_self, steps, damping)
    wanted_dA, wanted_dlam = torch.autograd.grad(wanted, (A_t, lam_t), torch.tensor(dB), materialize_grads=True)

    options = {"causal": causal, "valid": MASKS[mask], "include_self": include_self}
    options |= {"variant": variant, "steps": steps, "damping": damping}
    assert_close(ms.refine(A, lam, **options), wanted)
    dA, dlam = ms.refine_vjp(A, lam, dB, **options)
    assert_close(dA, wanted_dA)
    assert_close(dlam, wanted_dlam)


@pytest.mark.parametrize(("steps", "damping"), STEPS)
@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("include_self", [False, True], ids=["others", "self"])
@pytest.mark.parametrize("heads", [(), (3,)], ids=["one factor", "factor per head"])
def test_refine_with_factor_and_its_gradient(steps, damping, causal, mask, include_self, heads):
    A, dB = example()
    psi = np.exp(np.random.default_rng(1).uniform(-1, 1, (*heads, 5, 5)))  # asymmetric
    A_t, psi_t = (torch.tensor(x, requires_grad=True) for x in (A, psi))
    visible = visible_entries(torch.tensor(MASKS[mask]), causal)
    send = psi_t[..., None, :, :]  # the same psi whoever sends: (..., 1, r, k)
    wanted = flooding(A_t, lambda q: q @ send, visible, include_self, steps, damping)
    wanted_dA, wanted_dpsi = torch.autograd.grad(wanted, (A_t, psi_t), torch.tensor(dB))

    options = {"causal": causal, "valid": MASKS[mask], "include_self": include_self, "steps": steps, "damping": damping}
    assert_close(refine_with_factor(A, psi, **options), wanted)
    dA, dpsi = refine_with_factor_vjp(A, psi, dB, **options)
    assert_close(dA, wanted_dA)
    assert_close(dpsi, wanted_dpsi)
