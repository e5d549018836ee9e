"""The answers of the golden vectors: the paper's equations as printed, in long double, rounded to 40 bits.

Long double has 64 bits (x86) or 113 (64-bit ARM under Linux) and a range of 10^4932, in which the direct product of
Eq. 11 neither overflows nor loses what is written down. The equations are written here once more, and not as
`minisaobp.bp` computes them, so that the golden vectors check that too.

Axis letters: L tokens; i sends, j receives, k is the label.
"""

import numpy as np

LONG = np.longdouble
KEPT = 40  # bits: an error of 5e-13, a hundredth of the tolerance; long double errs by 1e-17, so rounding is decided


def check_long_double():
    """Raise ValueError where long double is no more than a double, as on Windows and on Apple's ARM."""
    if np.finfo(LONG).nmant < 63:
        raise ValueError("the golden vectors are computed in long double, which has no more bits than a double here")


def rounded(x, bits=KEPT):
    """x as float64 with that many bits of mantissa; what a double cannot hold to them (below 1e-290) is zero."""
    mantissa, exponent = np.frexp(np.asarray(x, LONG))
    y = np.ldexp(np.round(mantissa * LONG(2) ** bits), exponent - bits)
    return np.where(abs(y) < 1e-290, 0, y).astype(np.float64) + 0.0  # no -0.0


def refinement(case):
    """{name: long double array} of a refinement: messages, column_sums and log_beliefs of Eqs. 9-11 if the variant has
    messages, B, and, where the case asks for them, dA and dlam for the upstream gradient dB."""
    visible = np.ones(case.A.shape, bool)
    if case.causal:
        visible = np.tril(visible)
    if case.valid is not None:
        visible = visible & case.valid[..., :, None] & case.valid[..., None, :]
    A = np.where(visible, case.A, 0).astype(LONG)
    S = A.sum(-1, keepdims=True)
    P = A / np.where(S > 0, S, 1)
    found = {}
    dB = case.upstream.astype(LONG)
    if case.variant == "original":
        B, dP, dlam = P, dB, 0
    elif case.variant == "elemmul":
        # Eq. 15
        M = np.where(visible, P @ P.swapaxes(-1, -2), 0)
        Z = _or_one(M.sum(-1, keepdims=True))
        B = M / Z
        dM = np.where(visible, (dB - (dB * B).sum(-1, keepdims=True)) / Z, 0)
        dP, dlam = (dM + dM.swapaxes(-1, -2)) @ P, 0
    else:
        found, B, dP, dlam = _potts(case, P, dB)
    # P = A / S, in each row
    dA = np.where(visible & (S > 0), dP - (dP * P).sum(-1, keepdims=True), 0) / _or_one(S)
    return found | {"B": B, "dA": dA, "dlam": np.broadcast_to(np.asarray(dlam, LONG), np.shape(case.lam))}


def _potts(case, P, dB):
    sign = -1 if case.variant == "low" else 1
    lam = sign * np.asarray(case.lam, LONG)
    growth = np.exp(lam)
    sends = P.sum(-1, keepdims=True) > 0
    # Eq. 9: m_i(k) = A_ik + e^lam (S_i - A_ik); an empty row sends nothing
    m = np.where(sends, P + growth * (1 - P), 1)
    if case.causal:  # j hears i < j
        product = np.ones_like(m)
        np.multiply.accumulate(m[..., :-1, :], axis=-2, out=product[..., 1:, :])
        heard = product
    else:
        product = np.multiply.reduce(m, axis=-2, keepdims=True)
        heard = product / m
    b = P * heard
    B = b / _or_one(b.sum(-1, keepdims=True))
    with np.errstate(divide="ignore"):  # the logarithm of a zero is -inf
        found = {"messages": m, "column_sums": np.log(product), "log_beliefs": np.log(P) + np.log(heard)}
    # B_jk = exp(l_jk) / sum_k' exp(l_jk'), l_jk = log P_jk + the sum of log m_ik over the i that j hears
    dl = B * (dB - (dB * B).sum(-1, keepdims=True))
    ratio = heard / _or_one(b.sum(-1, keepdims=True))  # B / P, also where P is 0
    dP = ratio * (dB - (dB * B).sum(-1, keepdims=True))
    if case.causal:  # from the j > i
        after = np.add.accumulate(dl[..., ::-1, :], axis=-2)[..., ::-1, :] - dl
    else:
        after = dl.sum(-2, keepdims=True) - dl
    # m_ik = P_ik (1 - e^lam) + e^lam
    dm = np.where(sends, after / m, 0)
    dP = dP + dm * (1 - growth)
    dlam = sign * dm * growth * (1 - P)
    if case.lam is not None and np.ndim(case.lam):
        dlam = dlam.sum((0, 2, 3)).reshape(np.shape(case.lam))
    else:
        dlam = dlam.sum()
    return found, B, dP, dlam


def metric(case, beta=0.9, hops=4):
    """{"value": long double array} of one of Eqs. 2 and 12-14 on A (B, H, L, L): (B, H), or the matrix of Eq. 12."""
    A = case.A.astype(LONG)
    valid = np.ones(A.shape[:-1], bool) if case.valid is None else np.broadcast_to(case.valid, A.shape[:-1])
    A = np.where(valid[..., :, None] & valid[..., None, :], A, 0)
    if case.what == "entropy":
        return {"value": _mean_entropy(A, valid)}
    G, power = 0, A
    for t in range(2, hops + 1):
        power = power @ A
        G = G + LONG(beta) ** (t - 1) * power
    if case.what == "indirect_attention":
        return {"value": G}
    if case.what == "gtd":
        direct, indirect = (A * A).sum((-1, -2)), (G * G).sum((-1, -2))
        return {"value": indirect / (direct + indirect)}
    return {"value": _mean_entropy(G / _or_one(G.sum(-1, keepdims=True)), valid)}


def _mean_entropy(P, valid):
    rows = -(P * np.log(np.where(P > 0, P, 1))).sum(-1)
    return np.where(valid, rows, 0).sum(-1) / valid.sum(-1)


def _or_one(x):
    return np.where(x > 0, x, 1)
