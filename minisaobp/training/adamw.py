"""AdamW over one flat array, the learning rate over time, and the limit on the gradient's length."""

import dataclasses
import math
from typing import Any

import numpy as np

from .. import cuda
from ..backend import array_namespace

_BLOCK = 1 << 15  # numbers updated at a time, so that a CPU's cache holds all that one update reads


@dataclasses.dataclass
class AdamW:
    """Adam with decoupled weight decay and bias correction (Loshchilov & Hutter, arXiv 1711.05101).

    decayed: how many numbers, from the first, weight decay applies to (Parameters puts its matrices there).
    """

    mean: Any  # (n,) running mean of the gradient
    square: Any  # (n,) running mean of its square
    decayed: int
    weight_decay: float = 0.01
    betas: tuple = (0.9, 0.999)
    eps: float = 1e-8
    steps: int = 0

    @classmethod
    def for_parameters(cls, parameters, **options):
        xp = array_namespace(parameters.flat)
        return cls(xp.zeros_like(parameters.flat), xp.zeros_like(parameters.flat), parameters.matrices, **options)

    def update(self, weights, gradient, rate):
        """One step of learning rate `rate`, in place on weights (n,)."""
        self.steps += 1
        xp = array_namespace(weights)
        beta1, beta2 = self.betas
        step = rate / (1 - beta1**self.steps)
        root = 1 / math.sqrt(1 - beta2**self.steps)
        keep = 1 - rate * self.weight_decay
        if xp is not np:
            moments = (self.mean, self.square)
            cuda.adamw(weights, gradient, *moments, step, root, self.betas, self.eps, keep, self.decayed)
            return
        weights[: self.decayed] *= keep
        for a in range(0, len(weights), _BLOCK):
            g, m, v = gradient[a : a + _BLOCK], self.mean[a : a + _BLOCK], self.square[a : a + _BLOCK]
            m *= beta1
            m += (1 - beta1) * g
            v *= beta2
            v += (1 - beta2) * g * g
            # weights -= step * m / (sqrt(v) * root + eps)
            change = np.sqrt(v)
            change *= root
            change += self.eps
            np.divide(m, change, out=change)
            change *= step
            weights[a : a + _BLOCK] -= change


def cosine_with_warmup(step, steps, peak, warmup):
    """Learning rate of step 0 .. steps - 1: linear up to peak over `warmup` steps, then half a cosine towards 0.

    >>> [round(cosine_with_warmup(s, 6, 1.0, 2), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def clip_to_norm(gradient, limit):
    """Scale gradient (n,) in place so that its Euclidean norm is at most `limit`; returns the norm before."""
    norm = array_namespace(gradient).sqrt(gradient @ gradient)
    # no branch: on a GPU the norm stays there
    gradient *= array_namespace(gradient).minimum(1, limit / (norm + 1e-6))
    return norm
