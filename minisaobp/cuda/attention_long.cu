// Softmax and refinement of attention of any length: matrices are read again for each step. As in attention.cu.

// Above this 1 - p of a prior is what the rest of its row has (struct Row): never, unless the decay is small.
__device__ __forceinline__ REAL near_one(REAL decay) { return Row::small(decay) ? NEAR : INFINITY; }

// t = (1 - p) + decay p; a choice and no branch, which would have the numbers of a row read one by one
template <typename T>
__device__ __forceinline__ T message_of(T p, T decay, bool near, T rest) {
    T others = not_below_zero(1 - p);
    return (near ? rest : others) + decay * p;
}

// what the rest of each row has that has a prior near 1; of the other rows it is not asked for
extern "C" __global__ void rests(const REAL* P, const REAL* decays, double* rest, long long rows, int L) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows || !Row::small(decays[row / L])) return;
    REAL near = near_one(decays[row / L]);
    double total = 0;
    for (int k = threadIdx.x % 32; k < L; k += 32) {
        REAL p = P[row * L + k];
        if (p <= near) total += p;
    }
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) rest[row] = total;
}

// the product of the messages of MANY rows i, i + step, ... of a column
template <int MANY>
__device__ __forceinline__ double messages(const REAL* __restrict__ column, const double* __restrict__ rest, REAL decay,
                                           int L, int i, int step) {
    REAL p[MANY], largest = 0, near = near_one(decay);
    double t[MANY];
    #pragma unroll
    for (int m = 0; m < MANY; m++) p[m] = column[(long long)(i + m * step) * L];
    #pragma unroll
    for (int m = 0; m < MANY; m++) {
        largest = max(largest, p[m]);
        t[m] = message_of<double>(p[m], decay, false, 0);
    }
    if (largest > near) {
        #pragma unroll
        for (int m = 0; m < MANY; m++)
            if (p[m] > near) t[m] = message_of<double>(p[m], decay, true, rest[i + m * step]);
    }
    #pragma unroll
    for (int many = MANY / 2; many; many /= 2)
        for (int m = 0; m < many; m++) t[m] *= t[m + many];
    return t[0];
}

// C_k = sum over i of log t_ik, by products that stay within a double's range for |lambda| <= 80. What rounding does to
// it is the same in all beliefs about k, so it is not left to floats.
extern "C" __global__ void evidence(const REAL* __restrict__ P, const double* rest, const REAL* decays, double* C,
                                    int L) {
    __shared__ double part[8][64];
    long long n = blockIdx.y;
    int k = blockIdx.x * 64 + threadIdx.x;
    P += n * L * L + k;
    rest += n * L;
    REAL decay = decays[n];
    double sum = 0, product = 1;
    int i = k < L ? threadIdx.y : L;
    for (; i + 56 < L; i += 64) {
        product *= messages<8>(P, rest, decay, L, i, 8);
        if (product < 1e-20 || product > 1e20) { sum += log(product); product = 1; }
    }
    for (; i < L; i += 8) product *= messages<1>(P, rest, decay, L, i, 8);
    part[threadIdx.y][threadIdx.x] = sum + log(product);
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

// B ~ P w / t row by row; where too little is left of it to trust, in logarithms
extern "C" __global__ void beliefs(const REAL* __restrict__ P, const double* rest, const double* C,
                                   const REAL* __restrict__ w, const REAL* decays, REAL* __restrict__ B, long long rows,
                                   int L, int include_self) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32, matrix = row / L;
    if (row >= rows) return;
    REAL decay = decays[matrix], near = near_one(decay), rest_here = rest[row], p[ITEMS], v[ITEMS], total = 0;
    load_row<false>(p, P + row * L, L, true, 0);
    load_row<false>(v, w + matrix * L, L, true, 0);
    for (int n = 0; n < ITEMS; n++) {
        v[n] = include_self ? p[n] * v[n] : quotient(p[n] * v[n], message_of(p[n], decay, p[n] > near, rest_here));
        total += v[n];
    }
    total = warp_sum(total);
    if (!(total > faint(decay, false, 1))) {
        auto prior = [=](int k) { return P[row * L + k]; };
        auto message = [=](int, int k) {
            return message_of(P[row * L + k], decay, P[row * L + k] > near, rest_here);
        };
        beliefs_in_logs(prior, message, C + matrix * L, B + row * L, L, false, 0, include_self);
        return;
    }
    scale_to_one(v, total);
    store_row<false>(v, B + row * L, L, true);
}

// Causal: token j hears i < j, so that the evidence grows down the rows. A warp has TOGETHER of them.
#define TOGETHER 8

// C_k before the first of every TOGETHER rows, (N, L / TOGETHER rounded up, L). Their messages multiply to a double.
extern "C" __global__ void causal_evidence(const REAL* __restrict__ P, const double* __restrict__ rest,
                                           const REAL* decays, double* __restrict__ C, long long columns, int L) {
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= columns) return;
    long long n = at / L, groups = (L + TOGETHER - 1) / TOGETHER;
    int k = at % L;
    P += n * L * L + k;
    C += n * groups * L + k;
    rest += n * L;
    REAL decay = decays[n];
    double sum = 0;
    for (int i = 0; i < L; i += TOGETHER) {  // the last rows are heard by none
        C[(long long)i / TOGETHER * L] = sum;
        if (i + TOGETHER < L) sum += log(messages<TOGETHER>(P, rest, decay, L, i, 1));
    }
}

// as `beliefs` has them; from row to row w takes up the messages of the row before. groups: of all matrices
extern "C" __global__ void causal_beliefs(const REAL* __restrict__ P, const double* rest, const double* C,
                                          const REAL* decays, REAL* __restrict__ B, long long groups, int L,
                                          int include_self) {
    long long group = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (group >= groups) return;
    int of_a_matrix = (L + TOGETHER - 1) / TOGETHER, first = group % of_a_matrix * TOGETHER;
    long long matrix = group / of_a_matrix, row = matrix * L + first;
    C += group * L;
    P += row * L;
    B += row * L;
    rest += row;
    REAL decay = decays[matrix], near = near_one(decay), least = faint(decay, true, TOGETHER), w[ITEMS];
    float top = -INFINITY;  // about the largest C is good enough
    for (int k = threadIdx.x % 32; k < L; k += 32) top = fmaxf(top, (float)C[k]);
    top = warp_max(top);
    for (int n = 0; n < ITEMS; n++) w[n] = key<false>(n) < L ? quick_exp((REAL)(C[key<false>(n)] - top)) : 0;
    for (int m = 0; m < TOGETHER && first + m < L; m++) {
        REAL b[ITEMS], total = 0, rest_here = rest[m];
        load_row<false>(b, P + m * L, L, true, 0);
        for (int n = 0; n < ITEMS; n++) {
            REAL t = message_of(b[n], decay, b[n] > near, rest_here), own = include_self ? t : 1;
            b[n] *= w[n] * own;
            w[n] *= t;
            total += b[n];
        }
        total = warp_sum(total);
        if (total > least && total < INFINITY) {
            scale_to_one(b, total);
            store_row<false>(b, B + m * L, L, true);
        } else {
            auto prior = [=](int k) { return P[m * L + k]; };
            auto message = [=](int above, int k) {
                REAL p = P[(m - above) * L + k];
                return message_of(p, decay, p > near, (REAL)rest[m - above]);
            };
            beliefs_in_logs(prior, message, C, B + m * L, L, true, m, include_self);
        }
    }
}

// r_j = sum over k of dB_jk B_jk, over that of B_jk, which is 1 but for rounding: so the rows of dl sum to zero
extern "C" __global__ void row_dots(const REAL* dB, const REAL* B, double* r, long long rows, int L) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    double total = 0, mass = 0;
    for (int k = threadIdx.x % 32; k < L; k += 32) {
        total += (double)dB[row * L + k] * B[row * L + k];
        mass += B[row * L + k];
    }
    total = warp_sum(total);
    mass = warp_sum(mass);
    if (threadIdx.x % 32 == 0) r[row] = mass == 0 ? 0 : total / mass;
}

// g_k = sum over j of dl_jk, dl = B (dB - r)
extern "C" __global__ void column_sums(const REAL* dB, const REAL* B, const double* r, REAL* g, int L) {
    __shared__ double part[8][64];
    long long n = blockIdx.y;
    int k = blockIdx.x * 64 + threadIdx.x;
    double total = 0;
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

__device__ __forceinline__ REAL lift_of(REAL decay) { return Row::large(decay) ? MEANWHILE : 1; }

// g -> ds, as scores_gradient_in_registers has it; tax: the sum of dlog_t P / t of each row
extern "C" __global__ void scores_gradient(const REAL* dB, const REAL* B, const REAL* P, const double* rest,
                                           const double* r, const REAL* g, const REAL* decays, const REAL* cs, REAL* ds,
                                           double* tax, long long rows, int L) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    int lane = threadIdx.x % 32;
    long long n = row / L;
    REAL decay = decays[n], near = near_one(decay), rest_here = rest[row], lift = lift_of(decay), c = cs[n] / lift;
    REAL x[ITEMS], p[ITEMS], total = 0;
    double taxes = 0;
    for (int m = 0; m < ITEMS; m++) {
        int k = lane + 32 * m;
        x[m] = p[m] = 0;
        if (k < L) {
            p[m] = P[row * L + k];
            REAL dl = B[row * L + k] * (dB[row * L + k] - r[row]);
            REAL part = (g[n * L + k] - dl) * (lift * p[m]) / message_of(p[m], decay, p[m] > near, rest_here);
            x[m] = dl - c * part;
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
    if (lane == 0) tax[row] = taxes / lift;
}

// the same for the causal form: log t_ik collects from the j > i, a running sum up each column; x, and tax by column
extern "C" __global__ void causal_gradient(const REAL* __restrict__ dB, const REAL* __restrict__ B,
                                           const REAL* __restrict__ P, const double* __restrict__ rest,
                                           const double* __restrict__ r, const REAL* decays, const REAL* cs,
                                           REAL* __restrict__ x, double* tax, long long columns, int L) {
    long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= columns) return;
    long long n = at / L;
    int k = at % L;
    REAL decay = decays[n], near = near_one(decay), lift = lift_of(decay), c = cs[n] / lift;
    double later = 0, taxes = 0;
    #pragma unroll 4
    for (int i = L - 1; i >= 0; i--) {
        long long here = (n * L + i) * L + k;
        REAL p = P[here], dl = B[here] * (dB[here] - r[n * L + i]), rest_here = p > near ? rest[n * L + i] : 0;
        REAL part = (REAL)later * (lift * p) / message_of(p, decay, p > near, rest_here);
        x[here] = dl - c * part;
        taxes += part;
        later += dl;
    }
    tax[at] = taxes / lift;
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
