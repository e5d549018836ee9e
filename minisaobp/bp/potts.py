"""The pairwise factors of the paper: Eqs. 6, 7 and 16, as (L, L) matrices psi[r, k].

Axis letters: r the sender's label, k the receiver's label, L labels (one per token).
"""

import numpy as np


def potts(beta, L):
    """Eq. 6: psi(r, k) = exp(beta * delta_rk); beta > 0 attracts, beta < 0 repels. Shape (L, L), float64.

    >>> potts(0.0, 2)
    array([[1., 1.],
           [1., 1.]])
    """
    return np.where(np.eye(L, dtype=bool), np.exp(beta), 1.0)


def bp_high(lam, L):
    """Eq. 7 (BP-High, repulsive): psi(r, k) = e^lam if r != k, else 1. Shape (L, L), float64.

    It is e^lam times Eq. 6 at beta = -lam; the constant cancels when beliefs are normalised.

    >>> np.allclose(bp_high(0.2, 4), np.exp(0.2) * potts(-0.2, 4))
    True
    """
    return np.where(np.eye(L, dtype=bool), 1.0, np.exp(lam))


def bp_low(lam, L):
    """Eq. 16 (BP-Low, attractive): psi(r, k) = e^(-lam) if r != k, else 1. Shape (L, L), float64.

    >>> np.array_equal(bp_low(0.2, 4), bp_high(-0.2, 4))
    True
    """
    return bp_high(-lam, L)
