"""What an implementation is asked: attention matrices that are the same, to the last bit, on every machine.

Axis letters: B batch, H heads, L tokens. Every entry of A is a whole number over 2^24 and every row sums to exactly 1
(or 0), so A is the same numbers in float32 and in float64. They are drawn in integers from the raw stream of PCG64,
which NumPy promises not to change, and no function of a mathematics library touches them.
"""

import dataclasses
import zlib
from typing import Any

import numpy as np

VARIANTS = ("high", "low", "elemmul", "original")
METRICS = ("entropy", "gtd", "indirect_entropy", "indirect_attention")
LAMS = {"0": 0.0, "0.05": 0.05, "0.2": 0.2, "1": 1.0, "-0.2": -0.2, "per-head": np.array([0.05, 0.2, 1.0])}
LENGTHS = (1, 2, 3, 8, 16, 64)
PADDING = np.array([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]], bool)[:, None]  # (B, 1, L): at the end, and at the start
ONE = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One question: A (B, H, L, L), lam and valid for a refinement, A alone for a metric.

    flags: "must" decides whether an implementation passes, "may" is reported only; "edge" is an input at the border of
    what attention can be, "invalid" one beyond it, which is to be refused.
    """

    id: str
    seed: int
    A: Any  # (B, H, L, L) float64
    what: str = "refine"  # or one of METRICS
    variant: str | None = None  # of a refinement
    causal: bool = False
    lam: Any = None  # a number or (H, 1, 1); None for a metric
    valid: Any = None  # (B, 1, L) booleans or None
    flags: tuple = ("must",)
    dtype: str = "float64"
    empty: Any = None  # (L,) booleans: rows that are empty, whose own output the case does not ask for

    @property
    def L(self):
        return self.A.shape[-1]

    @property
    def must(self):
        return "must" in self.flags

    @property
    def rows(self):
        """(B, 1, L) or (L,) booleans, the rows of the output that are compared, or None for all."""
        return self.valid if self.empty is None else ~self.empty

    @property
    def upstream(self):
        """dB (B, H, L, L): whole numbers over 2^19, from -2 to 2; zero in padded rows, which nobody reads."""
        dB = (integers(self.seed + 1, self.A.shape, 21) - (1 << 20)) / (1 << 19)
        return dB if self.valid is None else np.where(self.valid[..., None], dB, 0.0)

    @property
    def has_gradient(self):
        """Whether gradients are compared: every entry that may be seen is above zero, where log A has a derivative."""
        return self.what == "refine" and not {"edge", "invalid"} & set(self.flags) and self.L <= 256

    def question(self, gradients=False):
        """What a function is given, A, lam, valid and dB (None where there is none), in the case's dtype."""
        A, lam = self.A.astype(self.dtype), self.lam
        if lam is not None:
            lam = lam.astype(self.dtype) if np.ndim(lam) else float(lam)
        dB = self.upstream.astype(self.dtype) if gradients and self.has_gradient else None
        return {"A": A, "lam": lam, "valid": self.valid, "dB": dB}

    @property
    def options(self):
        """What `minisaobp.refine` is given beside A and lam."""
        return {"variant": self.variant, "causal": self.causal, "valid": self.valid}


def seed_of(name):
    return zlib.crc32(name.encode())


def integers(seed, shape, bits):
    """Whole numbers below 2^bits, int64."""
    return (
        (np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> np.uint64(64 - bits)).astype(np.int64).reshape(shape)
    )


def attention(seed, shape, causal=False, valid=None, spread=3):
    """A (B, H, L, L) over the keys that may be seen: products of `spread` uniform numbers, normalised.

    The larger the spread, the fewer keys hold most of a row. Padded queries have rows like any other, as they have
    behind a softmax; a row without a key that it may see is zero.
    """
    weights = np.full(shape, ONE, np.int64)
    for factor in range(spread):
        weights = (weights * (1 + integers([seed, factor], shape, 16))) >> 16
    visible = np.ones(shape, bool)
    if causal:
        visible = np.tril(visible)
    if valid is not None:
        visible = visible & valid[..., None, :]
    return in_units(np.where(visible, weights + 1, 0))


def in_units(weights):
    """Whole numbers >= 0 of shape (..., L), up to 2^24 each, as rows of whole numbers over 2^24 that sum to 1."""
    total = weights.sum(-1, keepdims=True)
    units = np.where(weights > 0, np.maximum(weights * ONE // np.maximum(total, 1), 1), 0)
    largest = units.argmax(-1)[..., None]
    rest = np.where(total > 0, ONE - units.sum(-1, keepdims=True), 0)
    np.put_along_axis(units, largest, np.take_along_axis(units, largest, -1) + rest, -1)
    return units / ONE


def refinement_cases(variant, causal):
    """The cases of the golden vectors for one variant, encoder or causal."""
    name = f"{variant}-{'causal' if causal else 'encoder'}"

    def case(what, shape, lam=0.2, valid=None, **more):
        own = f"{name}-{what}"
        seed = seed_of(own)
        A = attention(seed, shape, causal, valid)
        return Case(own, seed, A, variant=variant, causal=causal, lam=lam, valid=valid, **more)

    cases = []
    for padded in (False, True):
        for label, lam in LAMS.items():
            per_head = np.ndim(lam) > 0
            lam = lam.reshape(3, 1, 1) if per_head else lam
            what = f"lam{label}{'-padded' if padded else ''}"
            flags = ("may",) if per_head else ("must",)
            cases.append(case(what, (2, 3, 5, 5), lam, PADDING if padded else None, flags=flags))
    cases += [case(f"L{L}", (1, 1, L, L)) for L in LENGTHS]
    if variant == "high":
        cases += [case("L128", (1, 1, 128, 128))] + ([] if causal else [case("L512", (1, 1, 512, 512))])
    return cases + _edge_cases(name, variant, causal)


def _edge_cases(name, variant, causal):
    def case(what, weights, lam=0.2, flags=("must", "edge"), **more):
        weights = np.tril(weights) if causal else weights
        A = in_units(weights)[None, None]
        own = f"{name}-{what}"
        return Case(own, seed_of(own), A, variant=variant, causal=causal, lam=lam, flags=flags, **more)

    drawn = (attention(seed_of(name), (6, 6), spread=2) * ONE).astype(np.int64)
    sink = 1 + 99 * (np.arange(16) == 0) * np.ones((16, 1), np.int64)
    targets = np.array([0, 0, 2, 1, 0, 5])
    empty = np.arange(6) % 3 == 1  # rows 1 and 4
    holes = (np.arange(6)[:, None] + 2 * np.arange(6)) % 3 > 0
    np.fill_diagonal(holes, True)
    cases = [
        case("one-hot", np.eye(6, dtype=np.int64)[targets]),
        case("sink", sink),
        case("sink-lam1", sink, 1.0),
        case("identical-rows", np.tile(drawn[:1], (6, 1))),
        case("zeros", drawn * holes),
        case("empty-rows", drawn * ~empty[:, None], empty=empty),
        case("empty-rows-themselves", drawn * ~empty[:, None], flags=("may", "edge")),
        case("sink-lam20", sink, 20.0, flags=("may", "edge")),
    ]
    if variant == "high" and not causal:
        invalid = {
            "negative": [[1.5, -0.5], [0.5, 0.5]],
            "nan": [[np.nan, 1.0], [0.5, 0.5]],
            "not-square": [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]],
        }
        for what, A in invalid.items():
            own, A = f"{name}-{what}", np.array(A)[None, None]
            flags = ("may", "invalid")
            cases.append(Case(own, seed_of(own), A, variant=variant, causal=causal, lam=0.2, flags=flags))
    return cases


def metric_cases(what):
    """The cases of the golden vectors for one metric: A (B, H, L, L), of which it gives (B, H) or a matrix each."""
    cases = []

    def add(name, A, flags=("must",), **more):
        own = f"{what}-{name}"
        cases.append(Case(own, seed_of(own), A, what=what, flags=flags, **more))

    for L in (2, 5, 16, 64):
        for causal in (False, True):
            name = f"{'causal' if causal else 'encoder'}-L{L}"
            add(name, attention(seed_of(f"{what}-{name}"), (2, 3, L, L) if L < 64 else (1, 1, L, L), causal, spread=4))
    add("padded", attention(seed_of(f"{what}-padded"), (2, 3, 5, 5), valid=PADDING), valid=PADDING)
    add("L1", np.ones((1, 1, 1, 1)), ("must", "edge"))
    add("identity", np.eye(4)[None, None], ("must", "edge"))
    add("uniform", np.full((1, 1, 4, 4), 0.25), ("must", "edge"))
    add("collapse", np.eye(4)[[0, 0, 0, 0]][None, None], ("must", "edge"))
    add("cyclic-shift", np.eye(4)[[1, 2, 3, 0]][None, None], ("must", "edge"))
    return cases


def golden_cases():
    """Every case of a refinement or a metric in the golden vectors."""
    cases = [case for variant in VARIANTS for causal in (False, True) for case in refinement_cases(variant, causal)]
    return cases + [case for what in METRICS for case in metric_cases(what)]


def judged_cases(what, variant, causal, seed, max_length=1024):
    """What a function is judged on: the golden cases, the same in float32, long ones, and some drawn from the seed.

    The drawn ones are new with every seed, so that answers learnt by heart do not help. Simple cases come first.
    """
    if what == "refine":
        cases = refinement_cases(variant, causal)
        cases += [_in_float32(case) for case in cases if case.id.endswith(("-lam0.2", "-lam1", "-L64", "-sink"))]
        cases += _long_cases(variant, causal, max_length)
    else:
        cases = metric_cases(what)
        cases += [_in_float32(case) for case in cases if case.id.endswith(("-encoder-L5", "-encoder-L64"))]
    cases += _drawn_cases(what, variant, causal, seed)
    return [case for case in cases if case.L <= max_length]


def _long_cases(variant, causal, max_length):
    """Where a direct product of messages leaves the range of its dtype."""
    cases = []
    for L, lam, dtype in (
        (512, 0.2, "float32"),
        (1024, 0.2, "float32"),
        (1024, -0.2, "float32"),
        (1024, 1.0, "float64"),
    ):
        if L <= max_length:
            own = f"{variant}-{'causal' if causal else 'encoder'}-L{L}-lam{lam:g}-{dtype}"
            A = attention(seed_of(own), (1, 1, L, L), causal)
            cases.append(Case(own, seed_of(own), A, variant=variant, causal=causal, lam=lam, dtype=dtype))
    return cases


def _in_float32(case):
    return dataclasses.replace(case, id=f"{case.id}-float32", dtype="float32")


def _drawn_cases(what, variant, causal, seed, count=10):
    rng = np.random.default_rng(seed)
    cases = []
    for n in range(count):
        L = round(2 ** rng.uniform(1, 8))
        lam = round(float(rng.uniform(-1, 2)), 3)
        shape = (int(rng.integers(1, 3)), int(rng.integers(1, 4)), L, L) if L < 40 else (1, 1, L, L)
        own = int(np.random.SeedSequence([seed, n]).generate_state(1)[0])
        A = attention(own, shape, causal, spread=int(rng.integers(1, 7)))
        dtype = "float32" if n % 4 == 3 else "float64"
        more = {"variant": variant, "causal": causal, "lam": lam} if what == "refine" else {}
        cases.append(Case(f"drawn-{n}-L{L}", own, A, what=what, dtype=dtype, **more))
    return cases
