"""What the two penalties are by their known answers; their gradients are in `test_gradients.py`."""

import numpy as np
import pytest

from minisaobp.nn.regularisers import MARGIN, eigen_penalty, entropy_penalty


def test_entropy_within_the_margin_costs_nothing_and_beyond_it_its_square():
    L = 16
    uniform = np.full((2, 1, L, L), 1 / L)  # entropy log L
    sharp = np.broadcast_to(np.eye(L), uniform.shape)  # entropy 0
    for A, own in ((uniform, 1.0), (sharp, 0.0)):
        for theta in (0.0, 0.3, 0.79, 0.81, 1.0):
            wanted = ((own - theta) * np.log(L)) ** 2 if abs(own - theta) > MARGIN else 0
            assert entropy_penalty(A, np.array([theta]))[0] == pytest.approx(wanted, rel=1e-12)


def test_padding_has_no_part_in_the_entropy():
    A = np.zeros((2, 1, 6, 6))
    A[0, 0], A[1, 0, :, :4] = 1 / 6, 1 / 4  # both uniform over their tokens
    A[1, 0, 4:] = np.eye(6)[0]
    valid = np.arange(6) < np.array([[6], [4]])
    theta = np.array([0.5])
    wanted = (0.5 * np.log([6, 4])) ** 2
    assert entropy_penalty(A, theta, valid)[0] == pytest.approx(wanted.mean(), rel=1e-12)
    assert entropy_penalty(A, theta, valid & False)[0] == 0


def maps_of(M):
    """Query and key maps (1, E, D) of a head with Wk Wq^T = M."""
    E = len(M)
    return np.eye(E, E + 3)[None], np.pad(M, ((0, 0), (0, 3)))[None]


def test_eigenvalues_that_are_all_the_same_cost_nothing():
    for mean in (0.0, 1.0, -3.0):
        assert eigen_penalty(*maps_of(mean * np.eye(4)))[0] == pytest.approx(0, abs=1e-12)


def test_eigenvalues_that_move_together_cost_the_same():
    spectrum = np.diag([1.0, -2.0, 0.5, 4.0])
    costs = [eigen_penalty(*maps_of(spectrum + shift * np.eye(4)))[0] for shift in (0, 1, -7)]
    np.testing.assert_allclose(costs, 4 * np.var(np.diag(spectrum)), rtol=1e-12)


def test_an_antisymmetric_part_costs_what_a_symmetric_one_does():
    rotation, reflection = np.array([[0.0, 1.0], [-1.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 0.0]])
    for M in (rotation, reflection):
        assert [eigen_penalty(*maps_of(s * M))[0] for s in (1, 10)] == [2, 200]
    assert np.trace(rotation @ rotation) == -2  # tr(W^2) would have no least value


def test_it_is_never_negative():
    rng = np.random.default_rng(0)
    assert all(eigen_penalty(*rng.standard_normal((2, 1, 3, 5)))[0] > 0 for _ in range(200))
