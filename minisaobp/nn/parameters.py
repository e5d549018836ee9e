"""All parameters of a model in one flat array, with a named view for each."""

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np


class Parameters(Mapping):
    """Named views into one flat array, so that an optimiser, a norm or a checkpoint touches a single array.

    flat: (n,) all numbers; shapes: {name: shape} in the order of the array. Matrices come before vectors, so that
    weight decay, which takes matrices only, takes the first `matrices` numbers.
    """

    def __init__(self, shapes, flat=None, dtype=np.float32):
        shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.shapes = dict(sorted(shapes.items(), key=lambda item: len(item[1]) < 2))  # stable: keeps the given order
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        self.matrices = sum(math.prod(shape) for shape in self.shapes.values() if len(shape) >= 2)
        self.flat = np.zeros(sum(sizes), dtype) if flat is None else flat
        if self.flat.shape != (sum(sizes),):
            raise ValueError(f"flat: expected shape ({sum(sizes)},) for these parameters, got {self.flat.shape}")
        ends = np.cumsum([0, *sizes]).tolist()
        self._spans = dict(zip(self.shapes, pairwise(ends), strict=True))
        self.views = {name: self.flat[a:b].reshape(self.shapes[name]) for name, (a, b) in self._spans.items()}

    def __getitem__(self, name):
        return self.views[name]

    def __iter__(self):
        return iter(self.views)

    def __len__(self):
        return len(self.views)

    def under(self, prefix):
        """{name without the prefix: view} for every name that starts with it."""
        return {name[len(prefix) :]: view for name, view in self.views.items() if name.startswith(prefix)}

    def stacked(self, names):
        """Neighbours of one shape as a single view of shape (len(names), *shape): several matrix products in one."""
        spans = [self._spans[name] for name in names]
        if any(a[1] != b[0] for a, b in pairwise(spans)):
            raise ValueError(f"{', '.join(names)} do not lie side by side")
        return self.flat[spans[0][0] : spans[-1][1]].reshape(len(names), *self.shapes[names[0]])

    def like(self, flat):
        """The same names over another flat array: gradients, moments, a copy."""
        return Parameters(self.shapes, flat)
