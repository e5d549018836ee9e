"""PyTorch's starting weights, for this study alone: of linear maps weight and bias uniform in +-1/sqrt(inputs), as
torch.nn.Linear draws them; embeddings N(0, 1), as torch.nn.Embedding. The table of the words is the output's too.
"""

import contextlib
from unittest import mock

from minisaobp.nn import Bert

initialise = Bert.initialise.__func__


def initialised(cls, config, rng, *dtype):
    model = initialise(cls, config, rng, *dtype)
    for name, weight in model.parameters.items():
        if weight.ndim == 2 and "embeddings" in name:
            weight /= config.initializer_range
        elif weight.ndim == 2:
            limit = weight.shape[1] ** -0.5
            for view in (weight, model.parameters[name.removesuffix("weight") + "bias"]):
                view[...] = rng.uniform(-limit, limit, view.shape)
    return model


@contextlib.contextmanager
def patched():
    with mock.patch.object(Bert, "initialise", classmethod(initialised)):
        yield
