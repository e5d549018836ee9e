"""For the hidden tests of problem set 3: a gradient is to be derived, and the set has the means to find one without."""

import numpy as np

ROUNDING = 2e-15  # of the sums below; derived gradients come to 5e-17 in set 3, central differences to 1e-14 at best


def check_derived(gradient, function, x, dy):
    """Fails unless the gradient of sum(dy * function(x)) is as exact as a derived one.

    gradient, x: arrays of one shape, or numbers; function: of real analytic form, from that shape to the shape of dy.
    Compared is the slope in one random direction d, by a complex step: Im f(x + i h d) / h has no difference in it, so
    h can be so small that its square is nothing (Squire and Trapp 1998).
    """
    direction = np.random.default_rng(0).standard_normal(np.shape(x))
    slope = np.sum(dy * function(x + 1e-30j * direction).imag) / 1e-30
    worst = ROUNDING * (np.sum(abs(gradient * direction)) + np.sum(abs(dy)))
    assert abs(np.sum(gradient * direction) - slope) <= worst, (
        "your gradient is right to some digits only, as differences are. Derive it; `numeric` is there to check it"
    )
