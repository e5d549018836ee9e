"""Algorithm 1 of the paper in explicit loops, to be read beside the paper and to check everything else against.

Axis letters: i the token that sends, j the token that receives, k and r labels (the tokens attended to).

The algorithm, step by step:
    (a)  phi_i(k) <- A[i, k]                         the prior of node i is its attention row (Eq. 8)
    (b)  m_i(k)   <- sum_r psi(r, k) phi_i(r)        the message that i sends to every other node (Eqs. 7 and 9)
    (c)  P(k)     <- prod_i m_i(k)                   over the tokens i, for a fixed label k (Eq. 11)
    (d)  b_j(k)   <- phi_j(k) P(k) / m_j(k)          what j would have said to itself is divided out again
    (e)  B[j, k]  <- b_j(k) / sum_k' b_j(k')         every row normalised (Eq. 11)

Step (c) is the paper's line 5. As printed there, the product runs over the labels of one row instead;
`algorithm1_row_product` is that reading, kept to be shown and to be recognised.
"""

import math
import numbers

import numpy as np

from ..backend import attention_array, to_host


def algorithm1(A, lam, *, causal=False, include_self=False):
    """Algorithm 1 with the repulsive factor of Eq. 7, in three explicit loops. Cost O(L^3), meant for small L.

    A: (L, L), floating point, >= 0; a row of zeros is a token that sends nothing and whose output row stays zero.
    lam: a number; a negative one is BP-Low (Eq. 16). causal: token j hears only tokens i < j.
    include_self: also multiply by the message j sends to itself, which is Eq. 11 as printed; there is no factor
    between j and itself in the graph, so exact one-step sum-product is the default.

    Returns B, (L, L) float64. Messages are multiplied one by one, so like any direct product this overflows when
    L * |lam| passes about 700; `minisaobp.refine` has no such limit. Raises ValueError or TypeError on bad input.

    >>> A = np.array([[0.8, 0.2], [0.6, 0.4]])
    >>> algorithm1(A, 0.0)
    array([[0.8, 0.2],
           [0.6, 0.4]])
    >>> B = algorithm1(A, 1.0)            # both rows like token 0; each is told so by the other and leans away
    >>> bool(B[0, 0] < 0.8 and B[1, 0] < 0.6)
    True
    """
    A, lam = _checked(A, lam)
    L = len(A)
    if causal:
        A = np.tril(A)
    phi = A  # (a)
    m = np.ones((L, L))
    for i in range(L):
        if phi[i].sum() == 0:
            continue  # an empty row sends nothing: its message is 1 for every label
        for k in range(L):
            m[i, k] = sum((1.0 if r == k else math.exp(lam)) * phi[i, r] for r in range(L))  # (b)
    B = np.zeros((L, L))
    for j in range(L):
        for k in range(L):
            product = 1.0
            for i in range(L):
                if causal and i > j:
                    continue  # the future is not heard
                product *= m[i, k]  # (c)
            B[j, k] = phi[j, k] * product if include_self else phi[j, k] * product / m[j, k]  # (d)
        Z = B[j].sum()
        if Z > 0:
            B[j] /= Z  # (e)
    return B


def algorithm1_row_product(A, lam):
    """The literal reading of the printed listing, P_i = prod_k m_i(k). Not belief propagation: do not use it.

    A product over the labels of one row is a number that cancels in the normalisation, so what is left is
    A[j, k] / m_j(k), normalised: no message from any other token arrives, and entropy goes down, not up. It is kept
    to be shown and to be recognised in other people's code. Arguments and errors as `algorithm1`.

    >>> A = np.array([[0.8, 0.2], [0.6, 0.4]])
    >>> bool(algorithm1_row_product(A, 1.0)[0, 0] > 0.8)
    True
    """
    A, lam = _checked(A, lam)
    L = len(A)
    B = np.zeros((L, L))
    for j in range(L):
        if A[j].sum() == 0:
            continue
        for k in range(L):
            B[j, k] = A[j, k] / sum((1.0 if r == k else math.exp(lam)) * A[j, r] for r in range(L))
        B[j] /= B[j].sum()
    return B


def _checked(A, lam):
    A = attention_array(A)
    if A.ndim != 2:
        raise ValueError(f"A: expected one matrix of shape (L, L), got {A.shape}")
    if isinstance(lam, bool) or not isinstance(lam, numbers.Real) or not math.isfinite(lam):
        raise ValueError(f"lam: expected a finite number, got {lam!r}")
    return np.array(to_host(A), dtype=np.float64), float(lam)
