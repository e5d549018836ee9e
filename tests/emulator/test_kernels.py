"""The hand-written CUDA kernels on the processor, against the NumPy functions that each of them stands behind.

python -m pytest tests/emulator

Shows what the kernels calculate, a missing barrier, a write outside an array. Only a GPU shows registers, speed and how
its quick exponential and reciprocal round.
"""

import shutil
import sys

import numpy as np
import pytest

from minisaobp import cuda
from minisaobp.bp.refinement import refine_rows
from minisaobp.cuda import attention as of_attention
from minisaobp.cuda import launch, operations
from minisaobp.nn import attention
from tests.emulator import cupy_on_cpu
from tests.emulator.cupy_on_cpu import EmulatorError
from tests.operation_cases import adamw, cross_entropy, embedding, gelu, layer_norm, linear_gelu

if sys.platform != "linux" or shutil.which("g++") is None:
    pytest.skip("needs g++ on Linux: apt-get install g++, or dnf install gcc-c++", allow_module_level=True)

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}  # relative, in norm, as in tests/gpu
DTYPES = ["float64", "float32"]
FORMS = pytest.mark.parametrize("causal", [False, True], ids=["encoder", "causal"])


def forget():
    """What was compiled for another architecture or handed out by another CuPy."""
    of_launch = launch._module, launch._function, launch.has_clusters
    for cached in (*of_launch, of_attention._equal_decays, operations._gelu, operations._adamw):
        cached.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def cupy(tmp_path_factory):
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cupy_on_cpu, "folder", tmp_path_factory.mktemp("kernels"))
        patch.setitem(sys.modules, "cupy", cupy_on_cpu.module())
        yield sys.modules["cupy"]
    forget()


@pytest.fixture
def gpu_for(monkeypatch):
    """Sets the __CUDA_ARCH__."""

    def choose(architecture):
        forget()
        monkeypatch.setattr(cupy_on_cpu, "architecture", architecture)

    yield choose
    forget()


def same(ours, wanted, dtype, what=""):
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape and np.isfinite(ours).all(), what
    error = np.linalg.norm((ours - wanted).ravel()) / max(np.linalg.norm(wanted.ravel()), 1e-30)
    assert error <= TOLERANCE[dtype], (what, error)


def numbers(*shape, dtype="float64", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


# ---- attention ------------------------------------------------------------------------------------------------------

# dtypes, tokens, architecture: a warp's rows full and not, by one block, by clusters of 4 and 16, by attention_long.cu
LENGTHS = [(dtype, L, 900) for dtype in DTYPES for L in (5, 32, 64, 100, 128, 200, 300)]
LENGTHS += [("float32", 512, 900), *((dtype, 140, 800) for dtype in DTYPES)]  # full rows are apart for float32 alone
FEWER = pytest.mark.parametrize("L,architecture", [(32, 900), (100, 900), (300, 900), (140, 800)])


def sequences(L, dtype, seed=0):
    """scores (B, 2, L, L), the gradient that comes from above, and which tokens there are; of long ones few."""
    B = 1 if L > 200 else 2
    valid = np.arange(L) < L - np.array([[L // 3], [0]])[:B]
    valid[0, 2] = False
    return 2 * numbers(B, 2, L, L, dtype=dtype, seed=seed), numbers(B, 2, L, L, dtype=dtype, seed=1), valid


def moved(*values):
    """Arrays to the GPU, all else as it is."""
    return [sys.modules["cupy"].asarray(a) if isinstance(a, np.ndarray) else a for a in values]


def softmax_and_back(scores, dA, *settings):
    A, cache = attention.refined_softmax(scores.copy(), *settings)
    return A, attention.softmax_of(cache), *attention.refined_softmax_backward(dA, cache)


@FORMS
@pytest.mark.parametrize("dtype,L,architecture", LENGTHS)
def test_refined_softmax_and_its_gradient(gpu_for, dtype, causal, L, architecture):
    gpu_for(architecture)
    scores, dA, valid = sequences(L, dtype)
    heads = np.array([0.3, 2.5]).reshape(2, 1, 1)
    for lam, variant, mask in (
        (0.3, "high", valid),
        (heads, "high", None),  # every row taxes: rows of padding, the last ones, would not
        (heads, "low", valid),
        (0, "original", valid),
    ):
        ours = softmax_and_back(*moved(scores, dA, lam), variant, *moved(mask), causal)
        wanted = softmax_and_back(scores.astype(float), dA.astype(float), lam, variant, mask, causal)
        for name, a, b in zip(("A", "P", "dscores"), ours, wanted, strict=False):
            assert a.dtype == dtype
            same(a, b, dtype, (name, lam, variant))
        if variant != "original" and lam is heads:
            same(ours[3], wanted[3], dtype, ("dlam", variant))
        else:
            assert ours[3] is None


@FORMS
@pytest.mark.parametrize("L,architecture", [(32, 900), (100, 900), (200, 900), (140, 800)])
def test_what_all_keys_of_a_row_have_in_common_is_not_in_the_gradient_of_lambda(gpu_for, causal, L, architecture):
    gpu_for(architecture)
    # dA + 100 asks for the same as dA: the rows of dl sum to zero, and in float32 would not by themselves
    scores, dA, _ = sequences(L, "float32")
    dA += 100
    heads = np.array([0.3, 2.5]).reshape(2, 1, 1)
    _, _, _, ours = softmax_and_back(*moved(scores, dA, heads), "low", None, causal)
    _, _, _, wanted = softmax_and_back(scores.astype(float), dA.astype(float), heads, "low", None, causal)
    same(ours, wanted, "float32")


@FORMS
@pytest.mark.parametrize("L,architecture", [(100, 900), (300, 900), (140, 800)])
def test_softmax_whose_beliefs_leave_the_range_of_floats(gpu_for, causal, L, architecture):
    gpu_for(architecture)
    scores, dA, valid = sequences(L, "float64")
    # All rows but one agree on a key, which is taxed for that by e^(-lambda L): what is left of a row is too little for
    # a number, and is worked out in logarithms. With a stronger lambda dscores would be differences near e^lambda.
    scores[..., 3] += 660
    scores[..., L // 2, 3] -= 660
    lam = np.array([1200 / L, 1000 / L]).reshape(2, 1, 1)
    ours = softmax_and_back(*moved(scores, dA, lam), "high", *moved(valid), causal)
    B, P, _, dlam = softmax_and_back(scores, dA, lam, "high", valid, causal)
    # dscores by the definition: NumPy's goes by B / P, which it bounds by e^MAX_LOG_RATIO
    dl = B * (dA - (B * dA).sum(axis=-1, keepdims=True))
    heard = dl[..., ::-1, :].cumsum(axis=-2)[..., ::-1, :] if causal else dl.sum(axis=-2, keepdims=True)
    x = dl + np.expm1(-lam) * (heard - dl) * P / (1 - P + np.exp(-lam) * P)
    for n, (a, b) in enumerate(zip(ours, (B, P, x - P * x.sum(axis=-1, keepdims=True), dlam), strict=True)):
        same(a, b, "float64", n)


@FORMS
@pytest.mark.parametrize("L,architecture", [(32, 900), (128, 900), (200, 900), (256, 900), (140, 800)])
def test_what_a_large_decay_makes_much_of(gpu_for, causal, L, architecture):
    # e^80 times a prior below a float's smallest normal number is one that counts; so is e^80 times a small gradient.
    # attention_long.cu has the priors themselves, which CuPy's kernels flush to zero there.
    gpu_for(architecture)
    margin = 88 if architecture == 900 else 85
    scores, dA = margin * np.eye(L, dtype="float32") + np.zeros((1, 2, 1, 1), "float32"), numbers(1, 2, L, L)
    for lam in (-80.0, np.array([-80.0, -70.0]).reshape(2, 1, 1)):
        for size in (1, 1e-7):
            down = (size * dA).astype("float32")
            ours = softmax_and_back(*moved(scores, down, lam), "high", None, causal)
            wanted = softmax_and_back(scores.astype(float), down.astype(float), lam, "high", None, causal)
            for n, name in ((0, "B"), (2, "dscores")):
                same(ours[n], wanted[n], "float32", (name, size))


def test_gradients_that_leave_the_range_of_floats_on_the_way(gpu_for):
    gpu_for(900)
    scores, dA = 100 * np.eye(32, dtype="float32")[None, None], 1e8 * numbers(1, 1, 32, 32, dtype="float32")
    for lam in (80.0, np.full((1, 1, 1), 80.0)):
        ours = softmax_and_back(*moved(scores, dA, lam), "high", None, False)
        assert all(np.isfinite(a).all() for a in ours if a is not None)


@FORMS
@pytest.mark.parametrize("L,architecture", [(100, 900), (140, 800)])
def test_a_mask_in_any_order_of_memory(cupy, gpu_for, causal, L, architecture):
    gpu_for(architecture)
    scores, dA, valid = sequences(L, "float32")
    for mask in (np.asfortranarray(valid), np.broadcast_to(valid[0], valid.shape)):
        for variant in ("high", "original"):
            ours = softmax_and_back(*moved(scores, dA), 0.3, variant, mask.view(cupy.ndarray), causal)
            wanted = softmax_and_back(scores.astype(float), dA.astype(float), 0.3, variant, mask, causal)
            for n in range(3):
                same(ours[n], wanted[n], "float32", (n, variant))


@FORMS
@pytest.mark.parametrize("L,architecture", [(32, 900), (100, 900), (128, 900), (200, 900), (140, 800)])
def test_rows_that_have_nearly_all_of_themselves_on_one_key(cupy, gpu_for, causal, L, architecture):
    # 1 - P must not come out below 0 and, e^-lambda being small, must not be what P is rounded by: the others have it
    gpu_for(architecture)
    lam = np.array([5.0, 8.0, 20.0, 80.0]).reshape(4, 1, 1)
    for dtype, margin in (*(("float32", m) for m in (6, 8, 12, 20, 60)), ("float64", 36)):
        dA = numbers(1, 4, L, L, dtype=dtype, seed=1)
        scores = numbers(1, 4, L, L) + margin * (np.arange(L) == np.arange(L)[:, None] // 3)
        scores[..., 5, :] /= margin
        scores = scores.astype(dtype)
        A, P, ds, dlam = softmax_and_back(*moved(scores, dA, lam), "high", None, causal)
        wanted = softmax_and_back(scores.astype(float), dA.astype(float), lam, "high", None, causal)
        for h in range(4):
            same(A[:, h], wanted[0][:, h], dtype, (margin, h))
        if margin <= 8:
            same(dlam, wanted[3], dtype, margin)
        if margin == 6:  # the softmax's own gradient loses digits as P comes near 1, on NumPy as well
            same(ds, wanted[2], dtype, margin)
        for of_all in (20.0, 40.0):
            ours, _ = attention.refined_softmax(*moved(scores, of_all), "high", None, causal)
            same(ours, attention.refined_softmax(scores.astype(float), of_all, "high", None, causal)[0], dtype, of_all)
        P = np.asarray(P)
        exact = P / P.sum(axis=-1, keepdims=True, dtype=float)
        for include_self in (False, True):
            options = {"causal": causal, "include_self": include_self}
            there, there_lam = moved(P, lam)
            ours, _ = refine_rows(there, there_lam, "high", **options, out=cupy.empty_like(there))
            of_exact, _ = refine_rows(exact, lam, "high", **options)
            for h in range(4):
                same(ours[:, h], of_exact[:, h], dtype, (margin, h, include_self))


@FORMS
@FEWER
def test_two_priors_that_are_half_a_row_each_rounded_up(cupy, gpu_for, causal, L, architecture):
    gpu_for(architecture)
    P = np.tri(L) / np.arange(1, L + 1)[:, None] if causal else np.full((L, L), 1 / L)
    P = P[None].astype("float32")
    P[:, 1] = 0
    P[:, 1, :2] = np.nextafter(np.float32(0.5), np.float32(1))
    (there,) = moved(P)
    ours, _ = refine_rows(there, 8.0, "high", causal=causal, out=cupy.empty_like(there))
    same(ours, refine_rows(P / P.sum(axis=-1, keepdims=True, dtype=float), 8.0, "high", causal=causal)[0], "float32")


@pytest.mark.parametrize("L,architecture", [(128, 900), (300, 900), (256, 800)])
def test_rows_that_are_nearly_alike_on_two_keys(cupy, gpu_for, L, architecture):
    # what rounds their messages is nearly alike too, and adds up over the rows; NumPy's float32 is off by 8e-6 at most
    gpu_for(architecture)
    first = np.arange(L) % 2 == 0
    first[1] = True  # two rows more for one key than for the other
    scores = np.full((1, 1, L, L), -np.inf, "float32")
    for margin in (12, 12.0003, 12.0006, 12.001):
        scores[..., 0], scores[..., 1] = np.where(first, 0, -margin), np.where(first, -1.0001 * margin, 0)
        ours, _ = attention.refined_softmax(*moved(scores), 20.0, "high")
        same(ours, attention.refined_softmax(scores.astype(float), 20.0, "high")[0], "float32", margin)
    P = np.exp(0.05 * numbers(1, L, L)) * (np.arange(L) < 2) * np.tri(L)
    P[:, :2] = 0
    P = (P / np.maximum(P.sum(axis=-1, keepdims=True), 1e-30)).astype("float32")
    for lam in (-77.3, -4.59):
        (there,) = moved(P)
        ours, _ = refine_rows(there, lam, "high", causal=True, out=cupy.empty_like(there))
        wanted, _ = refine_rows(P.astype(float), lam, "high", causal=True)
        error = np.linalg.norm(np.asarray(ours) - wanted) / np.linalg.norm(wanted)
        assert error < 2e-6, (lam, error)


def test_what_is_heard_down_a_long_column_keeps_its_digits(cupy, gpu_for):
    gpu_for(800)
    # a few keys win ever more: the evidence grows to lambda times the rows, and what tells them apart does not
    P = np.exp(numbers(1, 300, 300) - 8 * (np.arange(300) >= 8)) * np.tri(300)
    P = (P / P.sum(axis=-1, keepdims=True)).astype("float32")
    (there,) = moved(P)
    ours, _ = refine_rows(there, -80.0, "high", causal=True, out=cupy.empty_like(there))
    same(ours, refine_rows(P.astype(float), -80.0, "high", causal=True)[0], "float32")


def test_the_rows_of_padding_are_zero_whatever_their_scores():
    scores, dA, valid = sequences(32, "float32")
    scores *= 200  # their exponentials are beyond a float
    B, cache = attention.refined_softmax(*moved(scores, 0.3), "high", *moved(valid))
    ds, _ = attention.refined_softmax_backward(*moved(dA), cache)
    assert not B[~valid[:, None].repeat(2, axis=1)].any()
    assert np.isfinite(B).all() and np.isfinite(ds).all()


def test_scores_near_the_ends_of_floats():
    scores = np.zeros((1, 1, 32, 32), "float32")
    scores[..., 0, :] = np.finfo("float32").min
    scores[..., 1, :] = -1e10 * np.arange(32)
    scores[..., 2, :5] = 3e38
    ours, _ = attention.refined_softmax(*moved(scores, 0.3), "high")
    same(ours, attention.refined_softmax(scores.astype(float), 0.3, "high")[0], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@FORMS
@FEWER
def test_refine_rows(cupy, gpu_for, dtype, causal, L, architecture):
    gpu_for(architecture)
    P = np.exp(2 * numbers(2, L, L)) * (np.tri(L) if causal else 1)
    P /= P.sum(axis=-1, keepdims=True)
    P[:, 1::4] = 0  # rows without anything
    one_sink = P.copy()
    one_sink[:, : L // 2] = np.eye(L)[0]
    for priors, lams in ((P, (0.7, -1.5)), (one_sink, (80.0, -80.0))):
        priors, lam = priors.astype(dtype), np.array(lams).reshape(2, 1, 1)
        for include_self in (False, True):
            options = {"causal": causal, "include_self": include_self}
            wanted, _ = refine_rows(priors.astype(float), lam, "high", **options)
            there, there_lam = moved(priors, lam)
            ours, _ = refine_rows(there, there_lam, "high", **options, out=cupy.empty_like(there))
            same(ours, wanted, dtype, (lams, include_self))


@FORMS
@pytest.mark.parametrize("L,architecture", [(100, 900), (300, 900), (140, 800)])
def test_a_prior_that_rounding_has_made_more_than_one_sends_a_message(cupy, gpu_for, causal, L, architecture):
    gpu_for(architecture)
    priors = np.eye(L, dtype="float32")[[0] * L] * (1 + np.finfo("float32").eps)
    priors[1] = 0
    (there,) = moved(priors[None])
    ours, _ = refine_rows(there, 20.0, "high", causal=causal, out=cupy.empty_like(there))
    same(ours, priors[None] > 0, "float32")


def test_what_a_long_column_says_is_not_rounded_as_floats_are(gpu_for):
    gpu_for(800)
    scores = 2 * numbers(1, 2, 300, 300, dtype="float32")
    ours, _ = attention.refined_softmax(*moved(scores, 1.0), "high")
    wanted, _ = attention.refined_softmax(scores.astype(float), 1.0, "high")
    error = np.linalg.norm(np.asarray(ours) - wanted) / np.linalg.norm(wanted)
    assert error < 2.5e-7, error  # 1e-7 of the softmax and the beliefs themselves; 300 messages in floats make it 5e-7


def test_each_gpu_of_several_is_asked_for_large_clusters(cupy, gpu_for, monkeypatch):
    gpu_for(900)
    P = np.full((1, 300, 300), 1 / 300)
    for device in (0, 1):
        monkeypatch.setattr(cupy_on_cpu, "device", device)
        there = cupy.asarray(P)
        same(refine_rows(there, 0.3, out=cupy.empty_like(there))[0], refine_rows(P, 0.3)[0], "float64")


# ---- the other operations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations(dtype):
    def sum_of_rows(x):
        return (x.sum(axis=0) if type(x) is np.ndarray else cuda.sum_of_rows(x),)

    def of(*shape, seed=0):
        return numbers(*shape, dtype=dtype, seed=seed)

    rng = np.random.default_rng(0)
    cases = [
        (layer_norm, [of(3, 11, 6), of(6, seed=1), of(6, seed=2), of(3, 11, 6, seed=3)]),
        (layer_norm, [of(70, 100), of(100, seed=1), of(100, seed=2), of(70, 100, seed=3)]),
        (gelu, [3 * of(3, 700), of(3, 700, seed=1)]),
        (linear_gelu, [of(5, 9, 20), of(30, 20), of(30), of(5, 9, 30)]),
        (cross_entropy, [4 * of(3, 1003), rng.integers(0, 1003, 3)]),
        (embedding, [rng.integers(0, 9, (4, 33)), of(9, 40), of(4, 33, 40)]),
        (embedding, [np.zeros(20_000, int), of(2, 4), np.full((20_000, 4), 0.1, dtype)]),  # as those of segments
        (adamw, [of(1000), of(1000, seed=1)]),
        (sum_of_rows, [of(150, 70)]),
    ]
    for function, arrays in cases:
        ours = function(*moved(*arrays))
        for n, (a, b) in enumerate(zip(ours, function(*arrays), strict=True)):
            same(a, b, dtype, (function.__name__, n))


# ---- the emulator itself --------------------------------------------------------------------------------------------

SHARED = "__shared__ double s[256]; s[threadIdx.x] = threadIdx.x;"
WRONG = {  # what is in a kernel, and the complaint
    "race": (SHARED + "__syncwarp(); x[threadIdx.x] = s[255 - threadIdx.x];", "a race"),
    "deadlock": ("if (threadIdx.x < 128) __syncthreads();", "deadlock: 128 of the 256 threads of a block"),
    "divergence": ("if (threadIdx.x % 2) __syncwarp();\n else __syncwarp();", "threads of one warp wait at line"),
    "overrun": ("x[threadIdx.x + 1] = 0;", "a write outside the array of argument 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_seen(cupy, name):
    code = "".join(f'extern "C" __global__ void {each}(double* x) {{ {WRONG[each][0]} }}\n' for each in WRONG)
    kernel = cupy.RawModule(code=code).get_function(name)
    with pytest.raises(EmulatorError, match=WRONG[name][1]):
        kernel((1,), (256,), (cupy.empty(256),))


def test_what_does_not_fit_is_seen(cupy):
    code = 'extern "C" __global__ void some(double* x, int n) { __shared__ double s[2]; x[threadIdx.x] = s[0]; }'
    some, x = cupy.RawModule(code=code).get_function("some"), cupy.full(64, 1.0)
    for args in ((x, np.int64(0)), (x.astype("f"), np.int32(0)), (np.int32(0), x)):
        with pytest.raises(EmulatorError, match="takes"):
            some((1,), (32,), args)
    some((1,), (32,), (x, np.int32(0)))
    assert np.isnan(x[:32]).all() and (x[32:] == 1).all()  # of shared memory that nobody wrote
    code = 'extern "C" __global__ void other() { asm volatile("nanosleep.u32 %0;" :: "r"(1)); }'
    with pytest.raises(EmulatorError, match=r"argument 0 is not in C order: its strides are \(8, 256\)"):
        some((1,), (32,), (cupy.full((2, 32), 1.0).T, np.int32(0)))
    with pytest.raises(EmulatorError, match=r"does not know: 'nanosleep.u32 %0;'"):
        cupy.RawModule(code=code)
