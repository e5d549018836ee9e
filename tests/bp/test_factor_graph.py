import itertools
import math

import numpy as np
import pytest

import minisaobp as ms
from minisaobp import FactorGraph
from minisaobp.bp import bp_high, bp_low, potts

EXACT = 1e-12  # float64, values in [0, 1]: a few hundred roundings of 1e-16


def attention(L, seed=0, scale=1.0):
    A = np.exp(np.random.default_rng(seed).standard_normal((L, L)) * scale)
    return A / A.sum(-1, keepdims=True)


def random_tree(seed, variables=6):
    """A tree whose variables have 1 to 4 states, tables and priors within a factor of e^4, edges in either direction.

    Returns the graph and a number of steps that is never below the tree's diameter.
    """
    rng = np.random.default_rng(seed)
    states = rng.integers(1, 5, variables)
    priors = {v: np.exp(rng.uniform(-2, 2, states[v])) for v in range(variables)}
    edges = [(v, int(rng.integers(v))) for v in range(1, variables)]
    edges = [edge if rng.random() < 0.5 else edge[::-1] for edge in edges]
    factors = {(u, v): np.exp(rng.uniform(-2, 2, (states[u], states[v]))) for u, v in edges}
    return FactorGraph(priors, factors), variables


PAIRS = (("a", "b"), ("b", "c"), ("c", "a"))


def triangle(coupling):
    """Three variables of two states, in a loop; the first leans to state 0."""
    table = np.array([[coupling, 1.0], [1.0, coupling]])
    return FactorGraph({"a": [0.7, 0.3], "b": [0.5, 0.5], "c": [0.4, 0.6]}, dict.fromkeys(PAIRS, table))


def rows(beliefs):
    return np.array(list(beliefs.values()))


def assert_beliefs(got, wanted, atol):
    assert got.keys() == wanted.keys()
    for v in wanted:
        np.testing.assert_allclose(got[v], wanted[v], rtol=0, atol=atol, err_msg=f"variable {v}")


def joint_states(graph):
    """Every joint state and its weight, written out: the definition that `exact_marginals` is held against."""
    variables = list(graph.priors)
    for states in itertools.product(*(range(len(graph.priors[v])) for v in variables)):
        state = dict(zip(variables, states, strict=True))
        weight = math.prod(graph.priors[v][state[v]] for v in variables)
        yield state, weight * math.prod(table[state[u], state[v]] for (u, v), table in graph.factors.items())


# ---- the exact answer, and trees -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "graph", [random_tree(0)[0], random_tree(1)[0], FactorGraph.from_attention(attention(4), potts(1, 4))]
)
def test_exact_marginals_are_sums_and_maxima_over_joint_states(graph):
    sums = {v: np.zeros(len(prior)) for v, prior in graph.priors.items()}
    maxima = {v: np.zeros(len(prior)) for v, prior in graph.priors.items()}
    for state, weight in joint_states(graph):
        for v, k in state.items():
            sums[v][k] += weight
            maxima[v][k] = max(maxima[v][k], weight)
    assert_beliefs(graph.exact_marginals(), {v: s / s.sum() for v, s in sums.items()}, EXACT)
    assert_beliefs(graph.exact_marginals("max"), {v: m / m.max() for v, m in maxima.items()}, EXACT)


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(8))
def test_trees_are_exact(seed, mode, damping):
    graph, steps = random_tree(seed)
    if damping:
        steps = 60  # an error falls like 0.3^t, times t^4 / 4! along five edges: 2e-26 at 60
    flooding = graph.run(steps + 1, mode, damping)
    assert_beliefs(flooding.beliefs, graph.exact_marginals(mode), EXACT)
    assert flooding.residuals[-1] < EXACT  # the extra step changes no message


def test_a_tree_is_not_exact_before_the_news_has_arrived():
    near = np.array([[2.0, 1.0], [1.0, 2.0]])
    chain = FactorGraph(
        {"a": [9, 1], "b": [1, 1], "c": [1, 1], "d": [1, 1]}, dict.fromkeys((("a", "b"), ("b", "c"), ("c", "d")), near)
    )
    far = [chain.run(steps).beliefs["d"][0] for steps in range(5)]
    assert far[:3] == [0.5, 0.5, 0.5]  # a is three factors away
    assert far[3] == far[4] == pytest.approx(0.5 + 0.4 / 27, abs=EXACT)  # each factor keeps a third of the lean of 0.4


@pytest.mark.parametrize("seed", range(8))
def test_max_product_on_a_tree_finds_the_most_probable_joint_state(seed):
    graph, steps = random_tree(seed)
    best, _ = max(joint_states(graph), key=lambda pair: pair[1])
    found = {v: int(np.argmax(belief)) for v, belief in graph.run(steps, "max").beliefs.items()}
    assert found == best


def test_sum_and_max_can_disagree():
    # state 0 of a has the best single partner, state 1 the better sum
    graph = FactorGraph({"a": [1, 1], "b": [1, 1, 1]}, {("a", "b"): [[5, 0, 0], [3, 3, 3]]})
    assert np.argmax(graph.run(1, "max").beliefs["a"]) == 0
    assert np.argmax(graph.run(1, "sum").beliefs["a"]) == 1


def test_many_messages_do_not_underflow():
    # a star with 400 leaves, each saying (1e-3, 2e-3, 1): the direct product for state 0 would be 1e-1200
    leaves = {f"leaf {n}": [1e-3, 2e-3, 1.0] for n in range(400)}
    star = FactorGraph({"hub": [1.0, 1.0, 0.0], **leaves}, {("hub", leaf): np.eye(3) for leaf in leaves})
    belief = star.run(1).beliefs["hub"]
    assert belief[0] == pytest.approx(2.0**-400, rel=1e-10)  # logarithms near 2800 carry an error of 5e-13 each
    assert belief[1] == 1 and belief[2] == 0


def test_the_scale_of_priors_and_factors_does_not_matter():
    graph, _ = random_tree(2)
    faint = FactorGraph(
        {v: 1e-200 * p for v, p in graph.priors.items()}, {f: 1e-200 * t for f, t in graph.factors.items()}
    )
    for answer in (faint.exact_marginals(), faint.run(6).beliefs):
        assert_beliefs(answer, graph.exact_marginals(), EXACT)


# ---- loops ---------------------------------------------------------------------------------------------------------


def test_a_loop_is_not_exact():
    flooding = triangle(3.0).run(100)
    exact = triangle(3.0).exact_marginals()
    assert flooding.residuals[-1] < EXACT  # it has settled, and elsewhere:
    assert abs(flooding.beliefs["a"] - exact["a"]).max() == pytest.approx(0.0346, abs=5e-5)


def test_without_interaction_a_loop_is_exact():
    assert_beliefs(triangle(1.0).run(1).beliefs, triangle(1.0).exact_marginals(), EXACT)


def test_residuals_are_the_largest_change_of_a_factor_message():
    graph = triangle(3.0)
    flooding = graph.run(4, damping=0.2)
    before, after = (graph.run(steps, damping=0.2).messages for steps in (3, 4))
    changes = [abs(after[f, v] - before[f, v]).max() for f in graph.factors for v in f]
    assert flooding.residuals.shape == (4,)
    assert flooding.residuals[3] == pytest.approx(max(changes), rel=1e-12)  # the same numbers, computed twice


def test_messages_are_those_of_eqs_3_and_4():
    graph = triangle(3.0)
    before, (_, _, after) = graph.run(2).messages, graph.run(3)
    assert set(after) == {pair for f in PAIRS for v in f for pair in ((v, f), (f, v))}
    for f, table in graph.factors.items():
        for u, v, psi in ((f[0], f[1], table), (f[1], f[0], table.T)):
            (g,) = (g for g in graph.factors if u in g and g != f)
            to_factor = graph.priors[u] * before[g, u]
            np.testing.assert_allclose(after[u, f], to_factor / to_factor.sum(), rtol=0, atol=EXACT)
            to_variable = after[u, f] @ psi
            np.testing.assert_allclose(after[f, v], to_variable / to_variable.sum(), rtol=0, atol=EXACT)


@pytest.mark.parametrize("mode", ["sum", "max"])
def test_damping_keeps_a_share_of_the_old_message_in_logarithms(mode):
    graph = triangle(3.0)
    full, damped = graph.run(1, mode).messages, graph.run(1, mode, damping=0.25).messages
    for f, v in itertools.product(graph.factors, "abc"):
        if v in f:
            wanted = full[f, v] ** 0.75  # the old message is uniform
            wanted /= wanted.sum() if mode == "sum" else wanted.max()
            np.testing.assert_allclose(damped[f, v], wanted, rtol=0, atol=EXACT)


def test_identical_rows_oscillate_and_damping_cures_it():
    A = np.full((6, 6), 0.02)
    A[:, 0] = 0.9
    graph = FactorGraph.from_attention(A, bp_high(1.0, 6))
    flooding = graph.run(60)
    assert flooding.residuals[30:] == pytest.approx(np.full(30, 0.0602), abs=5e-5)  # every message still moves
    assert_beliefs(graph.run(58).beliefs, flooding.beliefs, 1e-6)  # every second step is the same: measured 1e-8
    assert abs(rows(flooding.beliefs) - rows(graph.run(59).beliefs)).max() > 0.1
    damped = graph.run(60, damping=0.5)
    assert damped.residuals[-1] < EXACT


# ---- the paper's graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("L", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("lam", [-20.0, -1.0, -0.2, 0.0, 0.2, 1.0, 20.0])
def test_first_step_on_the_complete_graph_is_algorithm_1(L, lam):
    A = attention(L, seed=L, scale=2.0)
    beliefs = rows(FactorGraph.from_attention(A, bp_high(lam, L)).run(1).beliefs)
    np.testing.assert_allclose(beliefs, ms.algorithm1(A, lam), rtol=0, atol=EXACT)
    np.testing.assert_allclose(beliefs, ms.refine(A, lam), rtol=0, atol=EXACT)
    low = rows(FactorGraph.from_attention(A, bp_low(lam, L)).run(1).beliefs)
    np.testing.assert_allclose(low, ms.refine(A, lam, variant="low"), rtol=0, atol=EXACT)


def test_row_sums_exact_zeros_and_a_one_hot_row():
    A = attention(6) * np.arange(1.0, 7.0)[:, None]
    A[1, 3], A[4] = 0, np.eye(6)[3]
    beliefs = rows(FactorGraph.from_attention(A, bp_high(0.7, 6)).run(1).beliefs)
    np.testing.assert_allclose(beliefs, ms.refine(A, 0.7), rtol=0, atol=EXACT)
    assert (beliefs[A == 0] == 0).all()


def test_an_empty_row_sends_nothing_and_stays_empty():
    A = attention(5)
    A[2] = 0
    graph = FactorGraph.from_attention(A, bp_high(0.7, 5))
    np.testing.assert_allclose(rows(graph.run(1).beliefs), ms.refine(A, 0.7), rtol=0, atol=EXACT)
    assert not any(2 in f for f in graph.factors)
    for beliefs in (graph.run(3).beliefs, graph.exact_marginals()):
        assert (beliefs[2] == 0).all() and all(beliefs[i].sum() == pytest.approx(1) for i in (0, 1, 3, 4))
    nobody = FactorGraph.from_attention(np.zeros((2, 2)), np.ones((2, 2)))
    assert (rows(nobody.run(1).beliefs) == 0).all() and (rows(nobody.exact_marginals()) == 0).all()


def test_no_step_gives_the_prior_back():
    A = attention(4)
    beliefs, residuals, messages = FactorGraph.from_attention(A, bp_high(0.2, 4)).run(0)
    np.testing.assert_allclose(rows(beliefs), A, rtol=0, atol=EXACT)
    assert residuals.shape == (0,) and messages == {}


def test_causal_refinement_is_the_last_token_of_every_prefix():
    A = np.tril(attention(6, scale=2.0))
    B = ms.algorithm1(A, 0.5, causal=True)
    for j in range(6):
        prefix = FactorGraph.from_attention(A[: j + 1, : j + 1], bp_high(0.5, j + 1))
        np.testing.assert_allclose(prefix.run(1).beliefs[j], B[j, : j + 1], rtol=0, atol=EXACT)


def test_one_step_is_the_exact_answer_of_the_star_around_each_token():
    A = attention(5, scale=2.0)
    B = ms.algorithm1(A, 0.5)
    for j in range(5):
        star = FactorGraph(dict(enumerate(A)), {(i, j): bp_high(0.5, 5) for i in range(5) if i != j})
        np.testing.assert_allclose(star.exact_marginals()[j], B[j], rtol=0, atol=EXACT)


def test_an_asymmetric_factor_is_a_star_with_directions():
    A, psi = attention(4), attention(4, seed=9)
    assert abs(psi - psi.T).max() > 0.1
    for j in range(4):
        star = FactorGraph(dict(enumerate(A)), {(i, j): psi for i in range(4) if i != j})
        wanted = A[j] * np.prod([A[i] @ psi for i in range(4) if i != j], axis=0)
        np.testing.assert_allclose(star.run(1).beliefs[j], wanted / wanted.sum(), rtol=0, atol=EXACT)


def test_distance_from_the_truth_after_none_one_and_two_steps():
    # rows are softmaxes of standard normal scores, L = 6, lam = 0.2, seeds 0 to 4; the last column is the fixed point
    errors = []
    for seed in range(5):
        A = attention(6, seed)
        graph = FactorGraph.from_attention(A, bp_high(0.2, 6))
        exact = rows(graph.exact_marginals())
        errors.append([abs(rows(graph.run(steps).beliefs) - exact).max() for steps in (0, 1, 2, 40)])
    assert np.min(errors, axis=0) == pytest.approx([1.75e-2, 1.02e-3, 1.77e-4, 2.11e-4], rel=5e-3)
    assert np.max(errors, axis=0) == pytest.approx([3.25e-2, 3.17e-3, 4.44e-4, 3.25e-4], rel=5e-3)  # three digits


# ---- input ---------------------------------------------------------------------------------------------------------


def test_input_is_copied_and_never_written_to():
    prior, table, A, psi = np.array([0.2, 0.8]), np.ones((2, 2)), attention(3), bp_high(0.2, 3)
    copies = [x.copy() for x in (prior, table, A, psi)]
    for x in (prior, table, A, psi):
        x.flags.writeable = False
    for graph in (FactorGraph({"a": prior, "b": prior}, {("a", "b"): table}), FactorGraph.from_attention(A, psi)):
        graph.run(2, "max", 0.5)
        graph.exact_marginals()
        next(iter(graph.priors.values()))[0] = 7
        next(iter(graph.factors.values()))[0, 0] = 7
    assert all(np.array_equal(x, copy) for x, copy in zip((prior, table, A, psi), copies, strict=True))


def test_a_factor_may_be_asymmetric_by_rounding_only():
    A, psi = attention(3), bp_high(0.2, 3)
    psi[0, 1] *= 1 + 1e-7
    FactorGraph.from_attention(A, psi)
    psi[0, 1] *= 1 + 1e-5
    with pytest.raises(ValueError, match="factor: expected a symmetric"):
        FactorGraph.from_attention(A, psi)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_small_floats_are_computed_in_float64(dtype):
    A = attention(4).astype(dtype)
    beliefs = FactorGraph.from_attention(A, bp_high(0.2, 4).astype(dtype)).run(1).beliefs
    assert beliefs[0].dtype == np.float64


def test_contradictions_are_named():
    chain = FactorGraph({"a": [1, 0], "b": [0, 1]}, {("a", "b"): np.eye(2)})
    with pytest.raises(ValueError, match=r"run: .*every state at 'a'"):
        chain.run(1)
    with pytest.raises(ValueError, match=r"exact_marginals: .*every joint state"):
        chain.exact_marginals()
    # three neighbours, two colours, all different: impossible, but no single message can tell
    different = 1 - np.eye(2)
    colours = FactorGraph({v: [1, 1] for v in "abc"}, dict.fromkeys(PAIRS, different))
    assert colours.run(3).beliefs["a"].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="exact_marginals: "):
        colours.exact_marginals()


def test_exact_marginals_refuse_a_joint_that_is_too_large():
    graph = FactorGraph.from_attention(attention(9), bp_high(0.2, 9))
    with pytest.raises(ValueError, match=f"at most {2**24} .*got {9**9}"):
        graph.exact_marginals()


PAIR = {"a": [1, 1], "b": [1, 1, 1]}
BAD_GRAPHS = {
    "priors a list": ([[1, 1]], {}, TypeError, "priors: expected a dict, got list"),
    "factors a list": (PAIR, [np.ones((2, 3))], TypeError, "factors: expected a dict, got list"),
    "prior negative": ({"a": [1, -1]}, {}, ValueError, r"priors\['a'\]: .*-1"),
    "prior NaN": ({"a": [1, np.nan]}, {}, ValueError, r"priors\['a'\]: .*nan"),
    "prior infinite": ({"a": [1, np.inf]}, {}, ValueError, r"priors\['a'\]: .*inf"),
    "prior empty": ({"a": []}, {}, ValueError, r"priors\['a'\]: .*\(0,\)"),
    "prior a number": ({"a": 1.0}, {}, ValueError, r"priors\['a'\]: .*\(\)"),
    "prior a word": ({"a": "high"}, {}, TypeError, r"priors\['a'\]: .*real numbers"),
    "prior complex": ({"a": [1j]}, {}, TypeError, r"priors\['a'\]: .*complex"),
    "table ragged": (PAIR, {("a", "b"): [[1], [1, 2]]}, TypeError, r"factors\[\('a', 'b'\)\]: .*list"),
    "table transposed": (PAIR, {("a", "b"): np.ones((3, 2))}, ValueError, r"expected shape \(2, 3\).*got \(3, 2\)"),
    "table negative": (PAIR, {("a", "b"): -np.ones((2, 3))}, ValueError, r"factors\[\('a', 'b'\)\]: .*-1"),
    "table a vector": (PAIR, {("a", "b"): np.ones(6)}, ValueError, r"factors\[\('a', 'b'\)\]: .*\(6,\)"),
    "pair with itself": (PAIR, {("a", "a"): np.ones((2, 2))}, ValueError, r"factors: expected pairs .*\('a', 'a'\)"),
    "pair with a stranger": (PAIR, {("a", "z"): np.ones((2, 2))}, ValueError, r"factors: .*\('a', 'z'\)"),
    "three together": (PAIR, {("a", "b", "a"): np.ones((2, 3, 2))}, ValueError, "factors: expected pairs"),
    "pair named by one word": (PAIR, {"ab": np.ones((2, 3))}, ValueError, "factors: .*'ab'"),
    "pair twice": (PAIR, {("a", "b"): np.ones((2, 3)), ("b", "a"): np.ones((3, 2))}, ValueError, "one table per pair"),
}


@pytest.mark.parametrize("case", BAD_GRAPHS, ids=BAD_GRAPHS.keys())
def test_a_bad_graph_is_named(case):
    priors, factors, error, message = BAD_GRAPHS[case]
    with pytest.raises(error, match=message):
        FactorGraph(priors, factors)


BAD_ATTENTION = {
    "A a list": ([[1.0]], np.ones((1, 1)), TypeError, "A: "),
    "A of integers": (np.eye(3, dtype=int), np.ones((3, 3)), TypeError, "A: .*int"),
    "A with heads": (np.ones((2, 3, 3)), np.ones((3, 3)), ValueError, r"A: .*\(2, 3, 3\)"),
    "A negative": (-np.eye(3), np.ones((3, 3)), ValueError, "A: .*-1.0"),
    "factor of another length": (np.eye(3), np.ones((4, 4)), ValueError, r"factor: .*\(3, 3\), got \(4, 4\)"),
    "factor negative": (np.eye(2), potts(1, 2) - 2, ValueError, "factor: .*-1.0"),
    "factor asymmetric": (np.eye(2), np.array([[1.0, 2.0], [3.0, 4.0]]), ValueError, "factor: expected a symmetric"),
    "factor a number": (np.eye(2), 0.2, TypeError, "factor: "),
}


@pytest.mark.parametrize("case", BAD_ATTENTION, ids=BAD_ATTENTION.keys())
def test_bad_attention_is_named(case):
    A, factor, error, message = BAD_ATTENTION[case]
    with pytest.raises(error, match=message):
        FactorGraph.from_attention(A, factor)


def test_bad_options_are_named():
    graph = triangle(2.0)
    for steps in (-1, 1.0, True, "two"):
        with pytest.raises(ValueError, match="steps: expected an integer"):
            graph.run(steps)
    for damping in (-0.1, 1.0, np.nan, "half"):
        with pytest.raises(ValueError, match="damping: expected a number"):
            graph.run(1, damping=damping)
    for call in (lambda: graph.run(1, "min"), lambda: graph.exact_marginals(["sum"])):
        with pytest.raises(ValueError, match="mode: expected 'sum' or 'max', got"):
            call()
