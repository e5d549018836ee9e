"""Exact marginals against pyAgrum, whose Shafer-Shenoy inference passes messages on a junction tree."""

import numpy as np
import pytest

from minisaobp import FactorGraph
from minisaobp.bp import bp_high

gum = pytest.importorskip("pyagrum", reason="pyagrum is not installed (the peers are: see .ci/run)")

EXACT = 1e-12  # float64 probabilities from sums of at most 6^6 positive terms, in another order


def random_graph(seed, edges):
    """Positive priors and tables within a factor of e^4, on variables of 2 to 4 states."""
    rng = np.random.default_rng(seed)
    states = rng.integers(2, 5, 1 + max(max(edge) for edge in edges))
    priors = {v: np.exp(rng.uniform(-2, 2, n)) for v, n in enumerate(states)}
    return FactorGraph(priors, {(u, v): np.exp(rng.uniform(-2, 2, (states[u], states[v]))) for u, v in edges})


def attention_graph(L, lam, zeros=False):
    A = np.exp(2 * np.random.default_rng(L).standard_normal((L, L)))
    if zeros:
        A = np.tril(A)
    return FactorGraph.from_attention(A / A.sum(-1, keepdims=True), bp_high(lam, L))


def pyagrum_marginals(graph):
    field = gum.MarkovRandomField()
    for v, prior in graph.priors.items():
        field.add(gum.LabelizedVariable(str(v), "", len(prior)))
    for v, prior in graph.priors.items():
        factor = field.addFactor([str(v)])
        for k, weight in enumerate(prior):
            factor[{str(v): k}] = weight
    for (u, v), table in graph.factors.items():
        factor = field.addFactor([str(u), str(v)])
        for (r, k), weight in np.ndenumerate(table):
            factor[{str(u): r, str(v): k}] = weight
    inference = gum.ShaferShenoyMRFInference(field)
    inference.makeInference()
    return {v: inference.posterior(str(v)).toarray() for v in graph.priors}


TREE = [(0, 1), (2, 1), (1, 3), (4, 3), (3, 5), (6, 0)]
GRAPHS = {
    "tree": (random_graph(0, TREE), len(TREE)),
    "loop of five": (random_graph(1, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 0)]), None),
    "grid of two by three": (random_graph(2, [(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)]), None),
    "attention, L = 6, lam = 0.2": (attention_graph(6, 0.2), None),
    "attention, L = 6, lam = -1": (attention_graph(6, -1.0), None),
    "causal attention, L = 5, lam = 3": (attention_graph(5, 3.0, zeros=True), None),
}


@pytest.mark.parametrize("case", GRAPHS, ids=GRAPHS.keys())
def test_exact_marginals(case):
    graph, steps_to_converge = GRAPHS[case]
    peer = pyagrum_marginals(graph)
    ours = graph.exact_marginals()
    for v in graph.priors:
        np.testing.assert_allclose(ours[v], peer[v], rtol=0, atol=EXACT)
    flooding = graph.run(steps_to_converge or 20).beliefs
    gap = max(abs(flooding[v] - peer[v]).max() for v in graph.priors)
    assert (
        gap < EXACT if steps_to_converge else gap > 1e-5
    )  # a graph with loops is not exact, and peer and we agree on it
