"""Token graphs: against the definitions in loops, and where nothing is defined."""

import itertools

import numpy as np
import pytest

import minisaobp as ms
from minisaobp.metrics import attention_graph
from tests.bp.test_refinement import attention

A = attention((2, 3, 9, 9))
A[A < 0.06] = 0  # so that some edges are missing


def test_the_graph():
    W = attention_graph(A[0, 0], threshold=0.05, nodes=6)
    assert W.shape == (6, 6)
    for j, k in itertools.product(range(6), repeat=2):
        weight = (A[0, 0, j, k] + A[0, 0, k, j]) / 2
        assert W[j, k] == (weight if j != k and weight >= 0.05 else 0)
    valid = np.arange(9) % 2 == 0
    np.testing.assert_array_equal(attention_graph(A[0, 0], valid=valid), attention_graph(A[0, 0][::2, ::2]))


def clustering_in_loops(W, kind):
    values = []
    for i in range(len(W)):
        neighbours = [j for j in range(len(W)) if W[i, j] > 0]
        if len(neighbours) < 2:
            continue
        total = 0
        for j, h in itertools.permutations(neighbours, 2):
            if W[j, h] > 0:
                if kind == "unweighted":
                    total += 1
                elif kind == "barrat":
                    total += (W[i, j] + W[i, h]) / 2 / W[i].sum() * len(neighbours)
                else:
                    total += (W[i, j] * W[j, h] * W[h, i]) ** (1 / 3) / W.max()
        values.append(total / (len(neighbours) * (len(neighbours) - 1)))
    return np.mean(values)


@pytest.mark.parametrize("kind", ["unweighted", "barrat", "onnela"])
def test_clustering_by_its_definition(kind):
    result = ms.clustering_coefficient(A, kind, threshold=0.05)
    assert result.shape == (2, 3)
    for at in np.ndindex(2, 3):
        assert result[at] == pytest.approx(clustering_in_loops(attention_graph(A[at], 0.05), kind), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_betweenness_against_networkx(weighted):
    import networkx

    result = ms.betweenness(A, weighted, threshold=0.05)
    for at in np.ndindex(2, 3):
        graph = networkx.from_numpy_array(attention_graph(A[at], 0.05))
        for _, _, edge in graph.edges(data=True):
            edge["length"] = 1 / edge["weight"]
        values = networkx.betweenness_centrality(graph, normalized=False, weight="length" if weighted else None)
        assert result[at] == pytest.approx(np.mean(list(values.values())), rel=1e-9)


def test_what_is_not_defined_is_nan():
    for kind in ("unweighted", "barrat", "onnela"):
        assert np.isnan(ms.clustering_coefficient(np.eye(5), kind))  # no edges
    full = np.full((5, 5), 0.2)
    assert ms.clustering_coefficient(full) == 1 and ms.betweenness(full) == 0
    assert np.isnan(ms.betweenness(np.ones((1, 1)))) and ms.betweenness(np.eye(5)) == 0


def test_permuting_tokens_changes_nothing_while_all_are_nodes():
    order = np.random.default_rng(0).permutation(9)
    moved = A[..., order, :][..., order]
    for function in (ms.clustering_coefficient, ms.betweenness):
        np.testing.assert_allclose(function(moved, threshold=0.05), function(A, threshold=0.05), rtol=1e-12)


def test_padding_changes_nothing():
    padded = np.concatenate([A, A[..., :4, :]], axis=-2)
    padded = np.concatenate([padded, np.full((2, 3, 13, 4), 0.1)], axis=-1)
    valid = np.arange(13) < 9
    for function in (ms.clustering_coefficient, ms.betweenness):
        np.testing.assert_allclose(function(padded, valid=valid), function(A), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"kind": "mean"}, "kind: expected one of"), ({"threshold": -1}, "threshold"), ({"nodes": 0}, "nodes")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ms.clustering_coefficient(A, **arguments)
