"""The hand-written CUDA, all of it. Every function here stands behind the function of array code that its docstring
names, which is its reference and what runs on NumPy; `tests/gpu` compares the two.

Axis letters: N matrices or rows, B batch, H heads, L tokens, D width, V vocabulary. One warp of 32 lanes works on one
row wherever rows are short; sums over columns are made in a fixed order, so a run repeats bit for bit.
"""

import functools
import math

import numpy as np

SHARED = 200 * 1024  # bytes of shared memory that one block may take, of the 227 KiB of an H100
MAX_REACH = 20.0  # of lambdas on the GPU, at which nobody looks: beyond it rows are trusted a little too soon
WARPS = 8  # rows that one block works on

_HELPERS = r"""
typedef unsigned char mask_t;
#define FULL 0xffffffffu
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
    return x;
}
template <typename T>
__device__ __forceinline__ T warp_max(T x) {
    for (int o = 16; o; o >>= 1) x = max(x, __shfl_xor_sync(FULL, x, o));
    return x;
}
// t = 1 - (1 - decay) P with decay = e^-lam, written so that a small decay does not drown beside the 1
__device__ __forceinline__ REAL message(REAL P, REAL decay) {
    return (1 - P) + decay * P;
}
#define NEVER (-1e300)
#define GENTLE (decay > (REAL)1e-3 && decay < (REAL)1e3)
#define INFINITY __int_as_float(0x7f800000)
"""

_ATTENTION = r"""
// P = softmax of each row of s over the keys that it may see; a row without any is zero. Lanes hold ITEMS keys each.
extern "C" __global__ void softmax_rows(const REAL* s, const mask_t* valid, REAL* P, long long rows, int L, int heads,
                                        int causal, int mask_rows) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32, j = row % L;
    long long batch = row / L / heads;
    bool used = !mask_rows || valid == nullptr || valid[batch * L + j];
    REAL v[ITEMS], top = -INFINITY, total = 0;
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        bool seen = used && k < L && (!causal || k <= j) && (valid == nullptr || valid[batch * L + k]);
        v[n] = seen ? s[row * L + k] : -INFINITY;
        top = max(top, v[n]);
    }
    top = warp_max(top);
    if (top == -INFINITY) top = 0;
    for (int n = 0; n < ITEMS; n++) { v[n] = exp(v[n] - top); total += v[n]; }
    total = warp_sum(total);
    REAL scale = total > 0 ? 1 / total : 0;
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        if (k < L) P[row * L + k] = v[n] * scale;
    }
}

// C_k = sum over i of log t_ik, by products that are taken the logarithm of before they leave a float's range
__device__ double column_evidence(const REAL* __restrict__ P, REAL decay, int L, int k, int first, int step) {
    double C = 0;
    REAL product = 1;
    int i = first;
    if (GENTLE)  // eight messages at a time stay within a float
        for (; i + 7 * step < L; i += 8 * step) {
            REAL t[8];
            #pragma unroll
            for (int m = 0; m < 8; m++) t[m] = message(P[(long long)(i + m * step) * L + k], decay);
            product *= ((t[0] * t[1]) * (t[2] * t[3])) * ((t[4] * t[5]) * (t[6] * t[7]));
            if (product < (REAL)1e-8 || product > (REAL)1e8) { C += log((double)product); product = 1; }
        }
    for (; i < L; i += step) {
        product *= message(P[(long long)i * L + k], decay);
        if (product < (REAL)1e-3 || product > (REAL)1e3) { C += log((double)product); product = 1; }
    }
    return C + log((double)product);
}

extern "C" __global__ void evidence(const REAL* __restrict__ P, const REAL* decays, double* C, int L) {
    __shared__ double part[8][64];
    long long n = blockIdx.y;
    int k = blockIdx.x * 64 + threadIdx.x;
    part[threadIdx.y][threadIdx.x] =
        k < L ? column_evidence(P + n * L * L, decays[n], L, k, threadIdx.y, 8) : 0;
    __syncthreads();
    if (threadIdx.y == 0 && k < L) {
        double total = 0;
        for (int g = 0; g < 8; g++) total += part[g][threadIdx.x];
        C[n * L + k] = total;
    }
}

// w_k = exp(C_k - max C): a block for each matrix
extern "C" __global__ void weights(const double* C, REAL* w, int L) {
    __shared__ double part[8];
    C += (long long)blockIdx.x * L;
    w += (long long)blockIdx.x * L;
    double top = NEVER;
    for (int k = threadIdx.x; k < L; k += 256) top = fmax(top, C[k]);
    top = warp_max(top);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = top;
    __syncthreads();
    for (int n = 0; n < 8; n++) top = fmax(top, part[n]);
    for (int k = threadIdx.x; k < L; k += 256) w[k] = exp((REAL)(C[k] - top));
}

// one row of beliefs, B ~ P w / t, in a warp; where too little is left of it to trust, in logarithms
__device__ void belief_row(const REAL* P, const double* C, const REAL* w, REAL* B, REAL decay, REAL faint, int L,
                           int include_self) {
    int lane = threadIdx.x % 32;
    REAL v[ITEMS], total = 0;
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        v[n] = 0;
        if (k < L) {
            REAL p = P[k];
            v[n] = include_self ? p * w[k] : DIVIDE(p * w[k], message(p, decay));
        }
        total += v[n];
    }
    total = warp_sum(total);
    if (!(total > faint)) {
        double top = NEVER;
        for (int k = lane; k < L; k += 32) {
            REAL p = P[k];
            if (p > 0) top = fmax(top, C[k] + (double)log(include_self ? p : p / message(p, decay)));
        }
        top = warp_max(top);
        total = 0;
        for (int n = 0; n < ITEMS; n++) {
            int k = lane + 32 * n;
            REAL p = k < L ? P[k] : 0;
            v[n] = p > 0 ? exp((REAL)(C[k] + (double)log(include_self ? p : p / message(p, decay)) - top)) : 0;
            total += v[n];
        }
        total = warp_sum(total);
    }
    REAL scale = total > 0 ? 1 / total : 0;
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        if (k < L) B[k] = v[n] * scale;
    }
}

extern "C" __global__ void beliefs(const REAL* __restrict__ P, const double* C, const REAL* __restrict__ w,
                                   const REAL* decays, REAL* __restrict__ B, REAL faint, long long rows, int L,
                                   int include_self) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    long long n = row / L;
    belief_row(P + row * L, C + n * L, w + n * L, B + row * L, decays[n], faint, L, include_self);
}

#if ITEMS <= 4
#define ROWS (2 * ITEMS)
// a whole matrix in the registers of 16 warps, read once and written once: a warp holds every 16th row, ROWS of them
extern "C" __global__ void __launch_bounds__(512, 2)
refine_small(const REAL* __restrict__ P, const REAL* decays, REAL* __restrict__ B, REAL faint, int L,
             int include_self) {
    __shared__ double part[16][32 * ITEMS];
    __shared__ double C[32 * ITEMS];
    long long first = (long long)blockIdx.x * L * L;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    REAL decay = decays[blockIdx.x], p[ROWS][ITEMS];
    #pragma unroll
    for (int m = 0; m < ROWS; m++)
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            int j = warp + 16 * m, k = lane + 32 * n;
            p[m][n] = j < L && k < L ? P[first + j * L + k] : 0;
        }
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        double total = 0;
        REAL product = 1;
        #pragma unroll
        for (int m = 0; m < ROWS; m++) {
            product *= message(p[m][n], decay);
            if (!GENTLE) { total += log((double)product); product = 1; }
        }
        part[warp][lane + 32 * n] = total + (double)log(product);  // near 1: a float's logarithm will do
    }
    __syncthreads();
    if (threadIdx.x < 32 * ITEMS) {
        double total = 0;
        for (int w = 0; w < 16; w++) total += part[w][threadIdx.x];
        C[threadIdx.x] = threadIdx.x < L ? total : NEVER;
    }
    __syncthreads();
    double top = NEVER;
    REAL w[ITEMS];
    for (int n = 0; n < ITEMS; n++) top = fmax(top, C[lane + 32 * n]);
    top = warp_max(top);
    for (int n = 0; n < ITEMS; n++) w[n] = lane + 32 * n < L ? exp((REAL)(C[lane + 32 * n] - top)) : 0;
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
        int j = warp + 16 * m;
        REAL v[ITEMS], total = 0;
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            v[n] = include_self ? p[m][n] * w[n] : DIVIDE(p[m][n] * w[n], message(p[m][n], decay));
            total += v[n];
        }
        total = warp_sum(total);
        if (!(total > faint)) {
            double highest = NEVER, l[ITEMS];
            for (int n = 0; n < ITEMS; n++) {
                l[n] = NEVER;
                if (p[m][n] > 0)
                    l[n] = C[lane + 32 * n]
                           + (double)log(include_self ? p[m][n] : p[m][n] / message(p[m][n], decay));
                highest = fmax(highest, l[n]);
            }
            highest = warp_max(highest);
            total = 0;
            for (int n = 0; n < ITEMS; n++) {
                v[n] = l[n] > NEVER ? exp((REAL)(l[n] - highest)) : 0;
                total += v[n];
            }
            total = warp_sum(total);
        }
        REAL scale = total > 0 ? 1 / total : 0;
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            int k = lane + 32 * n;
            if (j < L && k < L) B[first + j * L + k] = v[n] * scale;
        }
    }
}
#endif

// a whole matrix in shared memory: read once, written once
extern "C" __global__ void refine_matrix(const REAL* P, const REAL* decays, REAL* B, REAL faint, int L,
                                         int include_self) {
    extern __shared__ double shared[];
    int groups = blockDim.x / L;
    double* part = shared;             // groups x L
    double* C = part + groups * L;     // L
    REAL* w = (REAL*)(C + L);          // L
    REAL* tile = w + L;                // L x L
    long long n = blockIdx.x;
    P += n * L * L;
    for (int a = threadIdx.x; a < L * L; a += blockDim.x) tile[a] = P[a];
    __syncthreads();
    int k = threadIdx.x % L, g = threadIdx.x / L;
    if (g < groups) part[g * L + k] = column_evidence(tile, decays[n], L, k, g, groups);
    __syncthreads();
    if (threadIdx.x < L) {
        double total = 0;
        for (int h = 0; h < groups; h++) total += part[h * L + threadIdx.x];
        C[threadIdx.x] = total;
    }
    __syncthreads();
    double top = NEVER;
    for (int m = threadIdx.x % 32; m < L; m += 32) top = fmax(top, C[m]);
    top = warp_max(top);
    if (threadIdx.x < L) w[threadIdx.x] = exp((REAL)(C[threadIdx.x] - top));
    __syncthreads();
    for (int j = threadIdx.x / 32; j < L; j += blockDim.x / 32)
        belief_row(tile + j * L, C, w, B + n * L * L + (long long)j * L, decays[n], faint, L, include_self);
}

// causal: token j hears i < j, a running sum down each column; the log-beliefs, less the evidence of the token itself,
// which keeps a float's digits where they matter
extern "C" __global__ void causal_scan(const REAL* __restrict__ P, const REAL* decays, REAL* __restrict__ l,
                                       long long columns, int L, int include_self) {
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= columns) return;
    long long n = at / L;
    int k = at % L;
    REAL decay = decays[n], product = 1;
    double C = 0;
    #pragma unroll 8
    for (int j = 0; j < L; j++) {
        long long here = (n * L + j) * L + k;
        REAL p = P[here], t = message(p, decay);
        l[here] = p > 0 ? (REAL)(C + (double)log(include_self ? p * product * t : p * product)) : -INFINITY;
        product *= t;
        if (product < (REAL)1e-3 || product > (REAL)1e3) { C += log((double)product); product = 1; }
    }
}

// r_j = sum over k of dB_jk B_jk
extern "C" __global__ void row_dots(const REAL* dB, const REAL* B, REAL* r, long long rows, int L) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    REAL total = 0;
    for (int k = threadIdx.x % 32; k < L; k += 32) total += dB[row * L + k] * B[row * L + k];
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) r[row] = total;
}

// g_k = sum over j of dl_jk, dl = B (dB - r)
extern "C" __global__ void column_sums(const REAL* dB, const REAL* B, const REAL* r, REAL* g, int L) {
    __shared__ REAL part[8][64];
    long long n = blockIdx.y;
    int k = blockIdx.x * 64 + threadIdx.x;
    REAL total = 0;
    if (k < L)
        for (int j = threadIdx.y; j < L; j += 8) {
            long long at = (n * L + j) * L + k;
            total += B[at] * (dB[at] - r[n * L + j]);
        }
    part[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && k < L) {
        total = 0;
        for (int h = 0; h < 8; h++) total += part[h][threadIdx.x];
        g[n * L + k] = total;
    }
}

// x_ik = P_ik dP_ik = dl_ik - c P_ik dlog_t_ik / t_ik, then through the softmax ds = x - P sum x; tax is the sum of
// dlog_t P / t
extern "C" __global__ void scores_gradient(const REAL* dB, const REAL* B, const REAL* P, const REAL* r, const REAL* g,
                                           const REAL* decays, const REAL* cs, REAL* ds, double* tax, long long rows,
                                           int L, int include_self) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    long long n = row / L;
    REAL x[ITEMS], p[ITEMS], total = 0;
    double taxes = 0;
    for (int m = 0; m < ITEMS; m++) {
        int k = lane + 32 * m;
        x[m] = p[m] = 0;
        if (k < L) {
            p[m] = P[row * L + k];
            REAL dl = B[row * L + k] * (dB[row * L + k] - r[row]);
            REAL part = (g[n * L + k] - (include_self ? 0 : dl)) * p[m] / message(p[m], decays[n]);
            x[m] = dl - cs[n] * part;
            taxes += part;
        }
        total += x[m];
    }
    total = warp_sum(total);
    taxes = warp_sum(taxes);
    for (int m = 0; m < ITEMS; m++) {
        int k = lane + 32 * m;
        if (k < L) ds[row * L + k] = x[m] - p[m] * total;
    }
    if (lane == 0) tax[row] = taxes;
}

// the same for the causal form: log t_ik collects from the j > i, a running sum up each column; x, and tax by column
extern "C" __global__ void causal_gradient(const REAL* __restrict__ dB, const REAL* __restrict__ B,
                                           const REAL* __restrict__ P, const REAL* __restrict__ r, const REAL* decays,
                                           const REAL* cs, REAL* __restrict__ x, double* tax, long long columns,
                                           int L, int include_self) {
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= columns) return;
    long long n = at / L;
    int k = at % L;
    double later = 0, taxes = 0;
    #pragma unroll 4
    for (int i = L - 1; i >= 0; i--) {
        long long here = (n * L + i) * L + k;
        REAL p = P[here], dl = B[here] * (dB[here] - r[n * L + i]);
        if (include_self) later += dl;
        REAL part = (REAL)later * p / message(p, decays[n]);
        x[here] = dl - cs[n] * part;
        taxes += part;
        if (!include_self) later += dl;
    }
    tax[at] = taxes;
}

// ds = x - P sum x of every row, in place on x
extern "C" __global__ void through_softmax(REAL* x, const REAL* P, long long rows, int L) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    REAL total = 0;
    for (int k = threadIdx.x % 32; k < L; k += 32) total += x[row * L + k];
    total = warp_sum(total);
    for (int k = threadIdx.x % 32; k < L; k += 32) x[row * L + k] -= P[row * L + k] * total;
}

// ds = P (dP - sum of dP P) of every row
extern "C" __global__ void softmax_gradient(const REAL* dP, const REAL* P, REAL* ds, long long rows, int L) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    REAL total = 0;
    for (int k = threadIdx.x % 32; k < L; k += 32) total += dP[row * L + k] * P[row * L + k];
    total = warp_sum(total);
    for (int k = threadIdx.x % 32; k < L; k += 32) ds[row * L + k] = P[row * L + k] * (dP[row * L + k] - total);
}
"""

_OPERATIONS = r"""
extern "C" __global__ void layer_norm(const REAL* x, const REAL* gamma, const REAL* beta, REAL eps, REAL* y,
                                      REAL* normed, REAL* rsigma, long long rows, int D) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    REAL v[ITEMS], total = 0, squares = 0;
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        v[n] = k < D ? x[row * D + k] : 0;
        total += v[n];
    }
    REAL mean = warp_sum(total) / D;
    for (int n = 0; n < ITEMS; n++) {
        v[n] = lane + 32 * n < D ? v[n] - mean : 0;
        squares += v[n] * v[n];
    }
    REAL scale = 1 / sqrt(warp_sum(squares) / D + eps);
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        if (k < D) {
            v[n] *= scale;
            normed[row * D + k] = v[n];
            y[row * D + k] = v[n] * gamma[k] + beta[k];
        }
    }
    if (lane == 0) rsigma[row] = scale;
}

extern "C" __global__ void layer_norm_gradient(const REAL* dy, const REAL* normed, const REAL* rsigma,
                                               const REAL* gamma, REAL* dx, long long rows, int D) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    REAL v[ITEMS], z[ITEMS], total = 0, along = 0;
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        v[n] = k < D ? dy[row * D + k] * gamma[k] : 0;
        z[n] = k < D ? normed[row * D + k] : 0;
        total += v[n];
        along += v[n] * z[n];
    }
    total = warp_sum(total) / D;
    along = warp_sum(along) / D;
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        if (k < D) dx[row * D + k] = (v[n] - total - z[n] * along) * rsigma[row];
    }
}

// sums over blocks of rows of dy (and of dy normed), for the gradients of biases, gamma and beta
extern "C" __global__ void partial_sums(const REAL* dy, const REAL* normed, REAL* dgamma, REAL* dbeta, long long rows,
                                        int D, int chunk) {
    int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= D) return;
    long long first = (long long)blockIdx.y * chunk, last = min(first + chunk, rows);
    REAL a = 0, b = 0;
    for (long long row = first; row < last; row++) {
        REAL d = dy[row * D + k];
        b += d;
        if (normed != nullptr) a += d * normed[row * D + k];
    }
    if (normed != nullptr) dgamma[(long long)blockIdx.y * D + k] = a;
    dbeta[(long long)blockIdx.y * D + k] = b;
}

extern "C" __global__ void cross_entropy(const REAL* s, const long long* labels, REAL* P, REAL* losses, int V) {
    __shared__ REAL part[32];
    long long row = blockIdx.x;
    s += row * V;
    P += row * V;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    REAL top = -INFINITY;
    for (int k = threadIdx.x; k < V; k += blockDim.x) top = max(top, s[k]);
    top = warp_max(top);
    if (lane == 0) part[warp] = top;
    __syncthreads();
    top = part[0];
    for (int w = 1; w < warps; w++) top = max(top, part[w]);
    __syncthreads();
    REAL total = 0;
    for (int k = threadIdx.x; k < V; k += blockDim.x) total += exp(s[k] - top);
    total = warp_sum(total);
    if (lane == 0) part[warp] = total;
    __syncthreads();
    total = 0;
    for (int w = 0; w < warps; w++) total += part[w];
    REAL scale = 1 / total;
    for (int k = threadIdx.x; k < V; k += blockDim.x) P[k] = exp(s[k] - top) * scale;
    if (threadIdx.x == 0) losses[row] = top + log(total) - s[labels[row]];
}

// ids sorted, order: where each came from; the block of the first of equal ids adds up its rows, in order
extern "C" __global__ void embedding_gradient(const REAL* dy, const long long* sorted, const long long* order,
                                              REAL* dtable, int count, int D) {
    int at = blockIdx.x;
    long long id = sorted[at];
    if (at > 0 && sorted[at - 1] == id) return;
    for (int k = threadIdx.x; k < D; k += blockDim.x) {
        REAL total = 0;
        for (int n = at; n < count && sorted[n] == id; n++) total += dy[order[n] * D + k];
        dtable[id * D + k] = total;
    }
}
"""


def _cupy():
    import cupy

    return cupy


def _in_order(*arrays):
    """The arrays as the kernels read them: without gaps, in C's order."""
    return [a if a.flags.c_contiguous else _cupy().ascontiguousarray(a) for a in arrays]


@functools.cache
def _module(dtype, items):
    """The kernels for one dtype and for rows of at most 32 * items numbers, which a warp keeps in registers."""
    # NumPy's letters for dtypes: to ask for a name takes longer than to launch a kernel
    real = {"f": "float", "d": "double"}[dtype]
    quotient = "__fdividef(a, b)" if real == "float" else "((a) / (b))"  # within 2 roundings
    defines = {"REAL": real, "ITEMS": items, "WARPS": WARPS, "DIVIDE(a, b)": quotient}
    head = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    source = head + _HELPERS + _ATTENTION + _OPERATIONS
    return _cupy().RawModule(code=source, options=("--std=c++14",))


def _kernel(name, array, width=32):
    return _function(name, array.dtype.char, max(1, 1 << (-(-width // 32) - 1).bit_length()))


@functools.cache
def _function(name, dtype, items):
    function = _module(dtype, items).get_function(name)
    if name == "refine_matrix":
        function.max_dynamic_shared_size_bytes = SHARED
    return function


def _by_rows(name, array, arguments, rows, width):
    """Launch a kernel in which a warp works on a row."""
    _kernel(name, array, width)(((rows + WARPS - 1) // WARPS,), (32 * WARPS,), arguments)


def _decays(lam, stack):
    """e^-lambda and 1 - e^-lambda for every matrix of a stack (..., L, L), each (N,) in the stack's dtype."""
    cupy, shape = _cupy(), stack.shape[:-2]
    if isinstance(lam, cupy.ndarray):
        lams = cupy.broadcast_to(lam.astype(np.float64), (*shape, 1, 1)).reshape(-1)
        return cupy.exp(-lams).astype(stack.dtype), (-cupy.expm1(-lams)).astype(stack.dtype)
    return _constant_decays(float(lam), math.prod(shape), stack.dtype.name, cupy.cuda.Device().id)


@functools.lru_cache(maxsize=64)
def _constant_decays(lam, count, dtype, device):
    """Those of one number: filled on the GPU, once."""
    return _cupy().full(count, math.exp(-lam), dtype), _cupy().full(count, -math.expm1(-lam), dtype)


def _faint(lam, dtype):
    """Below this a row's sum is not trusted: terms of it may have been lost (as in `refinement.beliefs`)."""
    limits = np.finfo(dtype)
    reach = MAX_REACH if isinstance(lam, _cupy().ndarray) else abs(lam)
    return dtype.type(float(limits.tiny) / float(limits.eps) ** 2 * math.exp(min(reach, 50)))


def softmax_rows(scores, valid, causal, mask_rows):
    """The softmax in `attention.refined_softmax`, masks and all: scores (B, H, L, L), valid (B, L) or None -> P."""
    (scores,) = _in_order(scores)
    P = _cupy().empty_like(scores)
    _, H, L, _ = scores.shape
    mask = 0 if valid is None else valid.astype(np.uint8)
    rows = scores.size // L
    arguments = (scores, mask, P, np.int64(rows), np.int32(L), np.int32(H), np.int32(causal), np.int32(mask_rows))
    _by_rows("softmax_rows", scores, arguments, rows, L)
    return P


def softmax_backward(dP, P):
    """`ops.softmax_backward`: both (..., L)."""
    dP, P = _in_order(dP, P)
    ds, L = _cupy().empty_like(P), P.shape[-1]
    rows = P.size // L
    _by_rows("softmax_gradient", P, (dP, P, ds, np.int64(rows), np.int32(L)), rows, 32)
    return ds


def refine_rows(P, lam, causal, include_self, out=None):
    """`refinement.refine_rows`: beliefs B of priors P, both (..., L, L), rows of sum 1 or 0; lam signed, a
    number or (..., 1, 1). B is written to `out` if that is given.
    """
    (P,) = _in_order(P)
    cupy, L = _cupy(), P.shape[-1]
    B, N = cupy.empty_like(P) if out is None else out, P.size // (L * L)
    decays, _ = _decays(lam, P)
    faint = _faint(lam, P.dtype)
    rows, own = N * L, np.int32(include_self)
    if causal:
        arguments = (P, decays, B, np.int64(rows), np.int32(L), own)
        _kernel("causal_scan", P)(((rows + 127) // 128,), (128,), arguments)
        _by_rows(
            "softmax_rows", P, (B, 0, B, np.int64(rows), np.int32(L), np.int32(1), np.int32(0), np.int32(0)), rows, L
        )
        return B
    if L <= 128:
        _kernel("refine_small", P, L)((N,), (512,), (P, decays, B, faint, np.int32(L), own))
        return B
    threads = 32 * max(L // 32, 16)
    shared = 8 * L * (threads // L + 1) + P.dtype.itemsize * L * (L + 1)
    if shared <= SHARED:
        _kernel("refine_matrix", P, L)((N,), (threads,), (P, decays, B, faint, np.int32(L), own), shared_mem=shared)
        return B
    C = cupy.empty((N, L))
    _kernel("evidence", P)(((L + 63) // 64, N), (64, 8), (P, decays, C, np.int32(L)))
    w = cupy.empty((N, L), P.dtype)
    _kernel("weights", P)((N,), (256,), (C, w, np.int32(L)))
    _by_rows("beliefs", P, (P, C, w, decays, B, faint, np.int64(rows), np.int32(L), own), rows, L)
    return B


def refined_softmax_backward(dB, B, P, lam, causal, include_self):
    """`attention.refined_softmax_backward`: ds, and dlam of every matrix, float64, of shape (..., 1, 1)."""
    dB, B, P = _in_order(dB, B, P)
    cupy, L = _cupy(), P.shape[-1]
    N = P.size // (L * L)
    decays, cs = _decays(lam, P)
    rows, own = N * L, np.int32(include_self)
    r, tax, ds = cupy.empty(rows, P.dtype), cupy.empty(rows), cupy.empty_like(P)
    _by_rows("row_dots", P, (dB, B, r, np.int64(rows), np.int32(L)), rows, 32)
    if causal:
        arguments = (dB, B, P, r, decays, cs, ds, tax, np.int64(rows), np.int32(L), own)
        _kernel("causal_gradient", P)(((rows + 127) // 128,), (128,), arguments)
        _by_rows("through_softmax", P, (ds, P, np.int64(rows), np.int32(L)), rows, 32)
    else:
        g = cupy.empty(rows, P.dtype)
        _kernel("column_sums", P)(((L + 63) // 64, N), (64, 8), (dB, B, r, g, np.int32(L)))
        arguments = (dB, B, P, r, g, decays, cs, ds, tax, np.int64(rows), np.int32(L), own)
        _by_rows("scores_gradient", P, arguments, rows, L)
    shape = (*P.shape[:-2], 1, 1)
    total = tax.reshape(*P.shape[:-2], L).sum(axis=-1).reshape(shape)
    return ds, -np.exp(-lam) * total  # of a CuPy array NumPy's exp is CuPy's


def layer_norm(x, gamma, beta, eps):
    """`ops.layer_norm`: x (..., D) -> y, normed (..., D), rsigma (..., 1)."""
    x, gamma, beta = _in_order(x, gamma, beta)
    cupy, D = _cupy(), x.shape[-1]
    y, normed, rsigma = cupy.empty_like(x), cupy.empty_like(x), cupy.empty((*x.shape[:-1], 1), x.dtype)
    rows = x.size // D
    arguments = (x, gamma, beta, x.dtype.type(eps), y, normed, rsigma, np.int64(rows), np.int32(D))
    _by_rows("layer_norm", x, arguments, rows, D)
    return y, normed, rsigma


def layer_norm_backward(dy, normed, rsigma, gamma):
    """`ops.layer_norm_backward`: dx (..., D), dgamma (D,), dbeta (D,)."""
    dy, normed, rsigma, gamma = _in_order(dy, normed, rsigma, gamma)
    dx, D = _cupy().empty_like(dy), dy.shape[-1]
    rows = dy.size // D
    _by_rows("layer_norm_gradient", dy, (dy, normed, rsigma, gamma, dx, np.int64(rows), np.int32(D)), rows, D)
    return dx, *_column_sums(dy, normed)


def sum_of_rows(dy):
    """dy.sum(axis=0) for dy (N, D): CuPy's own takes six times as long."""
    (dy,) = _in_order(dy)
    return _column_sums(dy, None)[1]


def _column_sums(dy, normed):
    """Sum over all rows of dy * normed, if there is one, and of dy, each (D,): within chunks of rows, then over all."""
    cupy, D = _cupy(), dy.shape[-1]
    rows = dy.size // D
    chunks = min(256, (rows + 31) // 32)
    chunk = (rows + chunks - 1) // chunks
    a, b = cupy.empty((chunks, D), dy.dtype), cupy.empty((chunks, D), dy.dtype)
    threads = min(128, 32 * ((D + 31) // 32))
    grid = ((D + threads - 1) // threads, chunks)
    _kernel("partial_sums", dy)(
        grid, (threads,), (dy, 0 if normed is None else normed, a, b, np.int64(rows), np.int32(D), np.int32(chunk))
    )
    whole = cupy.empty(D, dy.dtype), cupy.empty(D, dy.dtype)
    for part, total in zip((a, b), whole, strict=True):
        if part is b or normed is not None:
            arguments = (part, 0, 0, total, np.int64(chunks), np.int32(D), np.int32(chunks))
            _kernel("partial_sums", dy)((grid[0], 1), (threads,), arguments)
    return whole


@functools.cache
def _gelu():
    return _cupy().ElementwiseKernel(
        "T x",
        "T y, T slope",
        """
        T cdf = T(0.5) * erfc(-x * T(0.70710678118654752));
        slope = cdf + x * exp(T(-0.5) * x * x) * T(0.39894228040143268);
        y = x * cdf
        """,
        "minisaobp_gelu",
    )


def gelu(x):
    """`ops.gelu`: y and dy/dx, of x's shape."""
    return _gelu()(x)


def cross_entropy(logits, labels):
    """`ops.cross_entropy` row by row: losses (N,) and probabilities (N, V)."""
    (logits,) = _in_order(logits)
    cupy = _cupy()
    P, losses = cupy.empty_like(logits), cupy.empty(len(logits), logits.dtype)
    arguments = (logits, labels.astype(np.int64), P, losses, np.int32(logits.shape[1]))
    _kernel("cross_entropy", logits)((len(logits),), (512,), arguments)
    return losses, P


def embedding_backward(dy, ids, dtable):
    """`ops.embedding_backward`: adds up rows of dy (n, D) into dtable (V, D), zero before, in the order of ids (n,)."""
    (dy,) = _in_order(dy)
    cupy = _cupy()
    order = cupy.argsort(ids.astype(np.int64))
    order = order.astype(np.int64)
    arguments = (dy, ids.astype(np.int64)[order], order, dtable, np.int32(len(ids)), np.int32(dy.shape[1]))
    _kernel("embedding_gradient", dy)((len(ids),), (min(256, 32 * ((dy.shape[1] + 31) // 32)),), arguments)
    return dtable


@functools.cache
def _adamw():
    return _cupy().ElementwiseKernel(
        "T g, float64 step, float64 root, float64 beta1, float64 beta2, float64 eps, float64 keep, int64 decayed",
        "T w, T m, T v",
        """
        m = m * T(beta1) + T(1 - beta1) * g;
        v = v * T(beta2) + T(1 - beta2) * g * g;
        T before = i < decayed ? w * T(keep) : w;
        w = before - T(step) * m / (sqrt(v) * T(root) + T(eps))
        """,
        "minisaobp_adamw",
    )


def adamw(weights, gradient, mean, square, step, root, betas, eps, keep, decayed):
    """`AdamW.update` in one pass over the flat arrays."""
    _adamw()(gradient, step, root, *betas, eps, keep, decayed, weights, mean, square)


def product(a, b, transpose_a, transpose_b):
    """`attention.product`: a @ b of stacks of matrices of one dtype, (..., m, k) and (..., k, n) once transposed."""
    cupy = _cupy()
    a, b = _in_order(a, b)
    m, k = a.shape[:-3:-1] if transpose_a else a.shape[-2:]
    n = b.shape[-2] if transpose_b else b.shape[-1]
    out = cupy.empty((*a.shape[:-2], m, n), a.dtype)
    cublas, kind = cupy.cuda.cublas, a.dtype.char
    multiply = {"f": cublas.sgemmStridedBatched, "d": cublas.dgemmStridedBatched}[kind]
    one, zero = np.ones((), kind), np.zeros((), kind)
    # cuBLAS counts columns first: it sees every matrix transposed, and out^T = b^T a^T
    multiply(
        cupy.cuda.device.get_cublas_handle(),
        *(cublas.CUBLAS_OP_T if flag else cublas.CUBLAS_OP_N for flag in (transpose_b, transpose_a)),
        n, m, k, one.ctypes.data,
        b.data.ptr, b.shape[-1], b.shape[-2] * b.shape[-1],
        a.data.ptr, a.shape[-1], a.shape[-2] * a.shape[-1],
        zero.ctypes.data, out.data.ptr, n, m * n, out.size // (m * n),
    )  # fmt: skip
    return out


def allow_tf32():
    """Matrix products in TF32: 10 bits of the factors, float32 sums. CuPy's own ask CUPY_TF32, at their import."""
    tf32 = 3  # CUBLAS_TF32_TENSOR_OP_MATH, which CuPy has no name for
    _cupy().cuda.cublas.setMathMode(_cupy().cuda.device.get_cublas_handle(), tf32)
