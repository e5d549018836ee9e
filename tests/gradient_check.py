"""The one gradient check: a vector-Jacobian product against central differences, along random directions."""

import numpy as np

TOLERANCE = 1e-6  # central differences at h = 1e-5 in float64 err by about h^2 = 1e-10 plus eps/h = 1e-11, relative


def check_vjp(function, vjp, arguments, rng, directions=3):
    """function(*arguments) -> y; vjp(dy, *arguments) -> one gradient per argument, in the same order.

    The upstream gradient dy is random: a constant one hides errors behind every normalisation.
    """
    y = function(*arguments)
    dy = rng.standard_normal(np.shape(y))
    gradients = vjp(dy, *arguments)
    assert len(gradients) == len(arguments)
    for position, (x, gradient) in enumerate(zip(arguments, gradients, strict=True)):
        assert np.shape(gradient) == np.shape(x), (position, np.shape(gradient), np.shape(x))
        for _ in range(directions):
            v = rng.standard_normal(np.shape(x))
            h = 1e-5

            def along(step, position=position, x=x, v=v):
                moved = [*arguments[:position], x + step * v, *arguments[position + 1 :]]
                return np.sum(dy * function(*moved))

            numeric = (along(h) - along(-h)) / (2 * h)
            analytic = np.sum(gradient * v)
            scale = max(abs(numeric), abs(analytic), 1e-3)  # below 1e-3 the differences themselves are rounding
            assert abs(numeric - analytic) / scale < TOLERANCE, (position, numeric, analytic)


def check_model(model, batch, rng, without_gradient=(), dropout_seed=None):
    """Every parameter's gradient of a model's loss on a batch, along one random direction each.

    batch: arguments of loss_and_gradients. without_gradient: ends of the names whose gradient is zero but for rounding.
    dropout_seed: drop out, the same numbers in every call.
    """

    def loss_and_gradients():
        dropping = None if dropout_seed is None else np.random.default_rng(dropout_seed)
        return model.loss_and_gradients(*batch, rng=dropping)

    _, gradients = loss_and_gradients()
    for name, view in model.parameters.items():
        v = rng.standard_normal(view.shape)
        before, h = view.copy(), 1e-5
        losses = []
        for sign in (1, -1):
            view[...] = before + sign * h * v
            losses.append(loss_and_gradients()[0])
        view[...] = before
        numeric, analytic = (losses[0] - losses[1]) / (2 * h), np.sum(gradients[name] * v)
        if name.endswith(tuple(without_gradient)):
            assert abs(analytic) < 1e-14 and abs(numeric) < 1e-9, (name, numeric, analytic)
        else:
            assert abs(numeric - analytic) <= TOLERANCE * max(abs(numeric), 1e-3), (name, numeric, analytic)
