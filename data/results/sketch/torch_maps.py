"""PyTorch's starting weights of linear maps, for this study alone: weight and bias uniform in +-1/sqrt(inputs), as
torch.nn.Linear draws them, in place of N(0, 0.02) and zero. Embeddings stay at N(0, 0.02).
"""

import contextlib
from unittest import mock

from minisaobp.nn import Bert

initialise = Bert.initialise.__func__


def initialised(cls, config, rng, *dtype):
    model = initialise(cls, config, rng, *dtype)
    for name, weight in model.parameters.items():
        if weight.ndim == 2 and "embeddings" not in name:
            limit = weight.shape[1] ** -0.5
            for view in (weight, model.parameters[name.removesuffix("weight") + "bias"]):
                view[...] = rng.uniform(-limit, limit, view.shape)
    return model


@contextlib.contextmanager
def patched():
    with mock.patch.object(Bert, "initialise", classmethod(initialised)):
        yield
