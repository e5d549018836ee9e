"""What must hold for every attention matrix: Hypothesis draws the matrices and the ways to refine them.

Derandomised, so that two runs see the same cases; to look further afield, set DERANDOMIZE to False.
"""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import minisaobp as ms

DERANDOMIZE = True
MANY = settings(derandomize=DERANDOMIZE, deadline=None, database=None, max_examples=150)
FEW = settings(MANY, max_examples=25)  # for L up to 600

ROWS = {
    "one-hot": lambda rng, L: 1.0 * (np.arange(L) == rng.integers(L)),
    "sink": lambda rng, L: 1.0 * (np.arange(L) == 0),
    "all but a sink": lambda rng, L: np.where(np.arange(L) > 0, rng.random(L), 10.0 ** rng.uniform(0, 9)),
    "two sinks": lambda rng, L: 1.0 * (np.arange(L) < 2),
    "identical": lambda rng, L: np.exp(np.sin(np.arange(1, L + 1))),
    "near-uniform": lambda rng, L: 1 + 1e-4 * rng.random(L),
    "with zeros": lambda rng, L: rng.random(L) * (rng.random(L) < 0.3),
    "soft": lambda rng, L: np.exp(rng.standard_normal(L)),
    "sharp": lambda rng, L: np.exp(8 * rng.standard_normal(L)),
    "empty": lambda rng, L: np.zeros(L),
}
LENGTHS = st.integers(1, 12)
LONG = st.sampled_from([13, 64, 127, 300, 512, 600])
LAMS = st.one_of(st.sampled_from([0.0, 0.05, 0.2, -0.2, 1.0, 20.0, -20.0]), st.floats(-20, 20))
DTYPES = st.sampled_from([np.float32, np.float64])


def matrix(rng, L, kinds, dtype):
    """Each row of one of the kinds, rows summing to anything from 0.5 to 2, or empty. Read-only."""
    A = np.array([ROWS[kinds[rng.integers(len(kinds))]](rng, L) for _ in range(L)])
    A *= rng.uniform(0.5, 2, (L, 1)) / np.maximum(A.sum(-1, keepdims=True), 1e-300)
    A = A.astype(dtype)
    A.flags.writeable = False
    return A


@st.composite
def matrices(draw, lengths=LENGTHS, dtypes=DTYPES):
    kinds = draw(st.lists(st.sampled_from(sorted(ROWS)), min_size=1, max_size=3, unique=True))
    return matrix(np.random.default_rng(draw(st.integers(0, 2**32))), draw(lengths), kinds, draw(dtypes))


class Way(dict):
    """Options of `refine`, or with "range" of `refine_with_factor`: then lam is the log-range of a random psi."""

    def psi(self, A):
        L = A.shape[-1]
        return np.exp(np.random.default_rng(L).uniform(-1, 1, (L, L)) * self["lam"])

    def options(self):
        return {name: value for name, value in self.items() if name not in ("lam", "custom")}

    def refine(self, A):
        if self["custom"]:
            return ms.refine_with_factor(A, self.psi(A), **self.options())
        return ms.refine(A, self["lam"], **self.options())

    def vjp(self, A, dB):
        if self["custom"]:
            return ms.refine_with_factor_vjp(A, self.psi(A), dB, **self.options())
        return ms.refine_vjp(A, self["lam"], dB, **self.options())


@st.composite
def ways(draw, variants=("high", "low", "elemmul", "original", "custom"), steps=1, causal=None):
    variant = draw(st.sampled_from(variants))
    way = Way(lam=draw(LAMS), custom=variant == "custom", causal=draw(st.booleans()) if causal is None else causal)
    if variant != "custom":
        way["variant"] = variant
    if variant not in ("elemmul", "original"):
        way["steps"] = draw(st.integers(1, steps))
        way["damping"] = draw(st.sampled_from([0.0, 0.5])) if steps > 1 else 0.0
    way["include_self"] = draw(st.booleans())
    return way


def visible(A, way):
    return np.tril(A) if way["causal"] else A


def rounding(A, way):
    """How far roundings move a belief: of L log-messages up to |lam| and their sum, amplified L times in each step."""
    return (3 + abs(way["lam"])) * (len(A) + 8) ** way.get("steps", 1) * np.finfo(A.dtype).eps


def assert_refined(A, way):
    """Finite, rows that sum to 1 or are empty, zeros that stay; A as it was."""
    before = A.copy()
    B = way.refine(A)
    assert B.shape == A.shape and B.dtype == A.dtype
    assert np.isfinite(B).all() and (B >= 0).all()
    held = visible(A, way).any(-1)
    np.testing.assert_allclose(B.sum(-1, dtype=np.float64), held, rtol=0, atol=1e-5)  # float32, and every row equally
    assert (B[~held] == 0).all()
    if way.get("variant") == "elemmul":
        assert not way["causal"] or (np.triu(B, 1) == 0).all()
    else:
        assert (B[visible(A, way) == 0] == 0).all()
    assert np.array_equal(A, before)
    return B


def assert_finite_gradient(A, way, seed=0):
    dB = np.random.default_rng(seed).standard_normal(A.shape).astype(A.dtype)
    dA, dparameter = way.vjp(A, dB)
    assert dA.shape == A.shape and dA.dtype == A.dtype
    assert np.isfinite(dA).all() and np.isfinite(dparameter).all()
    assert (dA[~visible(A, way).any(-1)] == 0).all() and (not way["causal"] or (np.triu(dA, 1) == 0).all())


@MANY
@given(matrices(), ways(steps=3))
def test_short(A, way):
    assert_refined(A, way)
    assert_finite_gradient(A, way)


@FEW
@given(matrices(LONG), ways())
def test_long(A, way):
    assert_refined(A, way)
    assert_finite_gradient(A, way)


def test_4096_tokens():
    A = matrix(np.random.default_rng(0), 4096, ["sink", "one-hot", "identical", "empty"], np.float32)
    assert_refined(A, Way(lam=0.2, custom=False, causal=False))
    way = Way(lam=-20.0, custom=False, causal=True)
    assert_refined(A, way)
    assert_finite_gradient(A, way)


@MANY
@given(matrices(st.one_of(LENGTHS, LENGTHS, LONG), st.just(np.float32)), ways())
def test_float32_agrees_with_float64(A, way):
    atol = (len(A) + 8) * np.finfo(np.float32).eps  # L messages, each good to about one eps
    np.testing.assert_allclose(way.refine(A), way.refine(A.astype(np.float64)), rtol=0, atol=atol)


@MANY
@given(matrices(), ways(steps=3, causal=False), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_the_result(A, way, random):
    assume(not way["custom"])  # psi would have to be permuted as well
    order = list(range(len(A)))
    random.shuffle(order)
    tokens = np.ix_(order, order)
    np.testing.assert_allclose(way.refine(A[tokens]), way.refine(A)[tokens], rtol=0, atol=rounding(A, way))


@MANY
@given(matrices(), ways(("high", "low", "elemmul"), steps=3), st.data())
def test_an_empty_row_sends_nothing(A, way, data):
    # One token more, anywhere, that attends to nothing and to which nobody attends, changes nothing for the others.
    where = data.draw(st.integers(0, len(A)))
    more = np.insert(np.insert(A, where, 0, axis=0), where, 0, axis=1)
    others = np.delete(np.arange(len(A) + 1), where)
    B = way.refine(more)
    np.testing.assert_allclose(B[np.ix_(others, others)], way.refine(A), rtol=0, atol=rounding(A, way))
    assert (B[where] == 0).all() and (B[:, where] == 0).all()


@MANY
@given(matrices(), ways(("high", "low", "custom"), steps=3))
def test_without_a_factor_nothing_moves(A, way):
    way["lam"] = 0.0
    S = visible(A, way).astype(np.float64).sum(-1, keepdims=True)
    wanted = visible(A, way) / np.where(S > 0, S, 1)
    np.testing.assert_allclose(way.refine(A), wanted, rtol=0, atol=rounding(A, way))


@FEW
@given(matrices(dtypes=st.just(np.float32)), ways(steps=2))
def test_float16_is_computed_in_float32(A, way):
    half = A.astype(np.float16)
    B = way.refine(half)
    assert B.dtype == np.float16
    assert np.array_equal(B, way.refine(half.astype(np.float32)).astype(np.float16))
    dA, _ = way.vjp(half, np.ones_like(half))
    assert dA.dtype == np.float16 and np.isfinite(dA).all()
