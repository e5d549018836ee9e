"""`refine_with_factor` and its gradient against Eqs. 3-5 written directly in PyTorch float64 and its derivatives."""

import numpy as np
import pytest

import minisaobp as ms

torch = pytest.importorskip("torch", reason="torch is not installed (the peers are: see .ci/run)")

CLOSE = 1e-10  # float64; products of L = 5 messages of up to e and up to three steps of them lose some 1e3 roundings


def normalised(x):
    return x / x.sum(-1, keepdim=True)


def refine_in_torch(A, psi, causal, valid, include_self, steps, damping):
    """i sends psi^T q to j, for whom q leaves out what j said; m: (..., i, j, k). Every row of A has mass."""
    token = torch.arange(A.shape[-1])
    P = torch.where(valid[..., None, :] & (token <= token[:, None]) if causal else valid[..., None, :], A, 0.0)
    P = normalised(P)
    apart = token[:, None] != token
    sends = (token[:, None] < token) if causal else apart  # (i, j)
    sends = valid[..., :, None] & (sends | ~apart if include_self else sends)
    m = torch.ones(*P.shape, P.shape[-1], dtype=P.dtype)
    for _ in range(steps):
        told = m.transpose(-3, -2)[..., :, None, :, :]  # (..., i, 1, h, k): what h told i
        q = normalised(P[..., :, None, :] * torch.where(apart[:, :, None], told, 1.0).prod(-2))
        update = (q @ psi[..., None, :, :]) ** (1 - damping) * m**damping
        m = torch.where(sends[..., None], update, 1.0)
    return normalised(P * m.prod(-3))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("include_self", [False, True], ids=["others", "self"])
@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5)], ids=["one psi", "psi per head"])
def test_custom_factor_and_its_gradient(steps, damping, causal, padded, include_self, shape):
    rng = np.random.default_rng(0)
    A = np.exp(rng.standard_normal((2, 3, 5, 5)))
    A[:, 1, 3, 2] = 0  # an exact zero keeps its gradient
    psi = np.exp(rng.uniform(-1, 1, shape))
    dB = rng.standard_normal(A.shape)
    valid = np.array([[True] * 5, [True] * 3 + [not padded] * 2])[:, None]  # (B, 1, L)
    dB *= valid[..., None]  # the rows of padded tokens, which the sketch above does not empty, do not count

    A_t, psi_t = torch.tensor(A, requires_grad=True), torch.tensor(psi, requires_grad=True)
    wanted = refine_in_torch(A_t, psi_t, causal, torch.tensor(valid), include_self, steps, damping)
    dA, dpsi = torch.autograd.grad(wanted, (A_t, psi_t), torch.tensor(dB))

    how = {"causal": causal, "valid": valid, "include_self": include_self, "steps": steps, "damping": damping}
    wanted = wanted.detach().numpy() * valid[..., None]
    np.testing.assert_allclose(ms.refine_with_factor(A, psi, **how), wanted, rtol=0, atol=CLOSE)
    ours_dA, ours_dpsi = ms.refine_with_factor_vjp(A, psi, dB, **how)
    np.testing.assert_allclose(ours_dA, dA.numpy(), rtol=0, atol=CLOSE)
    np.testing.assert_allclose(ours_dpsi, dpsi.numpy(), rtol=0, atol=CLOSE)
