"""Adam's second beta 0.95 in place of 0.999, for this study alone."""

import contextlib
from unittest import mock

from minisaobp.training import run
from minisaobp.training.adamw import AdamW


def optimiser_for(model, settings):
    return AdamW.for_parameters(model.parameters, weight_decay=settings.weight_decay, betas=(0.9, 0.95))


@contextlib.contextmanager
def patched():
    with mock.patch.object(run, "optimiser_for", optimiser_for):
        yield
