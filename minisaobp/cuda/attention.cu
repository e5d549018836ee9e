// Softmax and refinement of attention, forward and backward. L tokens; rows are j or i, columns k.
//
// A matrix of up to 512 tokens is read once and written once, held meanwhile in the registers of a team of warps that
// tell each other what their rows sum up to in each column. Longer ones, and those that want a cluster of blocks where
// the GPU has none, are those of attention_long.cu.

// t = 1 - (1 - decay) P with decay = e^-lam, written so that a small decay does not drown beside the 1
__device__ __forceinline__ REAL message(REAL P, REAL decay) {
    return (1 - P) + decay * P;
}

// Hides from the compiler that x is what it was: it would keep every message that it made of it, for want of registers
// in memory, where making it again is quicker.
__device__ __forceinline__ void opaque(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void opaque(double& x) { asm volatile("" : "+d"(x)); }

// where the product of sixteen messages stays within a float
#define GENTLE (decay > (REAL)1e-2 && decay < (REAL)1e2)

// Below this sum a row of P w / t, or of P w after w has taken up `rows` messages, may have lost terms that count.
__device__ __forceinline__ REAL faint(REAL decay, bool causal, int rows) {
    REAL growth = max((REAL)1, causal ? decay : 1 / decay), least = LOST * growth;
    for (int m = 1; causal && m < rows; m++) least *= growth;
    return least;
}

__device__ __noinline__ double log_of(double x) {
    return log(x);
}

#define FILLS (L == 32 * ITEMS)  // every lane has a key at every n: nothing to ask

// the keys of a row, lane + 32 n, from memory; `otherwise` where there is none
__device__ __forceinline__ void load_row(REAL (&v)[ITEMS], const REAL* row, int L, bool here, REAL otherwise) {
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int k = threadIdx.x % 32 + 32 * n;
        v[n] = here && (FILLS || k < L) ? row[k] : otherwise;
    }
}

__device__ __forceinline__ void store_row(const REAL (&v)[ITEMS], REAL* row, int L, bool here) {
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int k = threadIdx.x % 32 + 32 * n;
        if (here && (FILLS || k < L)) row[k] = v[n];
    }
}

__device__ __forceinline__ void scale_to_one(REAL (&v)[ITEMS], REAL total) {
    REAL scale = total > 0 ? 1 / total : 0;
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) v[n] *= scale;
}

// softmax of row j over the keys that it may see; a row without any is zero. valid: of this sequence, or nullptr
__device__ __forceinline__ void softmax_row(REAL (&v)[ITEMS], int j, int L, const mask_t* valid, int causal,
                                            int mask_rows) {
    if (!FILLS || causal || valid != nullptr) {
        bool used = j < L && (!mask_rows || valid == nullptr || valid[j]);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            int k = threadIdx.x % 32 + 32 * n;
            if (!(used && k < L && (!causal || k <= j) && (valid == nullptr || valid[k]))) v[n] = -INFINITY;
        }
    }
    REAL top = -INFINITY, total = 0;
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) top = max(top, v[n]);
    top = warp_max(top);
    if (top == -INFINITY) top = 0;
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) { v[n] = EXP(v[n] - top); total += v[n]; }
    scale_to_one(v, warp_sum(total));
}

// Beliefs of one row whose weights have left a float's range, by a warp, in logarithms: C (L) is the evidence before it,
// or, causal, before the `above` rows over it that belong to the same warp. Rare, so it reads P again. An empty row,
// which ends here too, stays empty.
__device__ __noinline__ void beliefs_in_logs(const REAL* P, const double* C, REAL* B, REAL decay, int L, int causal,
                                             int above, int include_self) {
    auto log_belief = [&](int k) {
        double l = C[k] + (double)log(P[k]), own = (double)log(message(P[k], decay));
        if (causal)
            for (int m = 1; m <= above; m++) l += (double)log(message(P[k - m * L], decay));
        return causal == include_self ? l + (causal ? own : -own) : l;
    };
    double top = NEVER;
    for (int k = threadIdx.x % 32; k < L; k += 32)
        if (P[k] > 0) top = fmax(top, log_belief(k));
    top = warp_max(top);
    REAL total = 0;
    for (int k = threadIdx.x % 32; k < L; k += 32)
        if (P[k] > 0) total += exp((REAL)(log_belief(k) - top));
    total = warp_sum(total);
    for (int k = threadIdx.x % 32; k < L; k += 32)
        B[k] = P[k] > 0 ? exp((REAL)(log_belief(k) - top)) / total : 0;
}

extern "C" __global__ void softmax_rows(const REAL* s, const mask_t* valid, REAL* P, long long rows, int L, int heads,
                                        int causal, int mask_rows) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    REAL v[ITEMS];
    load_row(v, s + row * L, L, true, -INFINITY);
    softmax_row(v, row % L, L, valid == nullptr ? valid : valid + row / L / heads * L, causal, mask_rows);
    store_row(v, P + row * L, L, true);
}

// ds = P (dP - sum of dP P) of every row
extern "C" __global__ void softmax_gradient(const REAL* dP, const REAL* P, REAL* ds, long long rows, int L) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    REAL d[ITEMS], p[ITEMS], total = 0;
    load_row(d, dP + row * L, L, true, 0);
    load_row(p, P + row * L, L, true, 0);
    for (int n = 0; n < ITEMS; n++) total += d[n] * p[n];
    total = warp_sum(total);
    for (int n = 0; n < ITEMS; n++) d[n] = p[n] * (d[n] - total);
    store_row(d, ds + row * L, L, true);
}

// ---- a matrix in registers ------------------------------------------------------------------------------------------
//
// BLOCKS blocks of TEAM warps have a matrix; where they are several they are a cluster, whose blocks read each other's
// shared memory. A warp holds up to ROWS rows that follow each other, a lane ITEMS numbers of each.

#define TEAM 8
#if ITEMS <= 4
#define BLOCKS 1
#define CLUSTER
#elif ITEMS <= 16 && __CUDA_ARCH__ >= 900
#define BLOCKS (ITEMS == 8 ? 4 : 16)
#define CLUSTER __cluster_dims__(BLOCKS, 1, 1)

__device__ __forceinline__ void wait_for_cluster() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// the same place in the shared memory of another block of the cluster
__device__ __forceinline__ unsigned in_block(const double* mine, int block) {
    unsigned there;
    unsigned here = __cvta_generic_to_shared(mine);
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
    return there;
}
#endif

#ifdef BLOCKS
#define WIDTH (32 * ITEMS)
#define ROWS (WIDTH / (BLOCKS * TEAM))

// Column sums over the rows of a matrix, in an order that never changes. On entry part[w][k] is what the rows of warp w
// give to column k. On return base[k] + part[w][k] is: for order 1 the sum over the warps before w, for order -1 that
// over the warps after it; for order 0 base[k] is the sum over all, and part is of no use.
__device__ void sum_columns(double (*part)[WIDTH], double* own, double* base, int order) {
    __syncthreads();
    for (int k = threadIdx.x; k < WIDTH; k += 32 * TEAM) {
        double sum = 0;
        for (int w = 0; w < TEAM; w++) {
            double* at = &part[order < 0 ? TEAM - 1 - w : w][k];
            double x = *at;
            *at = sum;
            sum += x;
        }
        own[k] = sum;
        if (BLOCKS == 1) base[k] = order ? 0 : sum;
    }
#if BLOCKS > 1
    wait_for_cluster();
    // each block sums its share of the columns over the blocks: a lane reads of one block and answers it
    int rank = blockIdx.x % BLOCKS;
    for (int a = threadIdx.x; a < WIDTH; a += 32 * TEAM) {
        int block = a % BLOCKS, k = rank * (WIDTH / BLOCKS) + a / BLOCKS;
        double x, sum = 0;
        asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(x) : "r"(in_block(own + k, block)) : "memory");
        for (int b = 0; b < BLOCKS; b++) {
            double other = __shfl_sync(FULL, x, b, BLOCKS);
            if (order == 0 || (order > 0 ? b < block : b > block)) sum += other;
        }
        asm volatile("st.shared::cluster.f64 [%0], %1;" :: "r"(in_block(base + k, block)), "d"(sum) : "memory");
    }
    wait_for_cluster();
#else
    __syncthreads();
#endif
}

// where a warp finds its rows: the matrix, how many rows a warp has, the first of this one, and that of its numbers
struct Place {
    int matrix, many, first;
    long long start;
    __device__ Place(int L) {
        matrix = blockIdx.x / BLOCKS;
        many = (L + BLOCKS * TEAM - 1) / (BLOCKS * TEAM);
        first = (blockIdx.x % BLOCKS * TEAM + threadIdx.x / 32) * many;
        start = ((long long)matrix * L + first) * L;
    }
    __device__ bool has(int m, int L) { return m < many && first + m < L; }
};

// Beliefs B of priors P, which are `in` or, with SOFTMAX, the softmax of the scores `in`; P is then written too.
template <bool SOFTMAX, bool CAUSAL>
__device__ __forceinline__ void refine(const REAL* in, const mask_t* valid, REAL* P, REAL* B, const REAL* decays, int L,
                                       int heads, int include_self) {
    __shared__ double part[TEAM][WIDTH], own[WIDTH], base[WIDTH];
    Place at(L);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    REAL decay = decays[at.matrix], p[ROWS][ITEMS];
    #pragma unroll
    for (int m = 0; m < ROWS; m++) load_row(p[m], in + at.start + m * L, L, at.has(m, L), SOFTMAX ? -INFINITY : 0);
    if (SOFTMAX) {
        if (valid != nullptr) valid += at.matrix / heads * L;
        #pragma unroll
        for (int m = 0; m < ROWS; m++) {
            softmax_row(p[m], at.has(m, L) ? at.first + m : L, L, valid, CAUSAL, true);
            store_row(p[m], P + at.start + m * L, L, at.has(m, L));
        }
    }
    if (GENTLE) {
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            REAL product = 1;
            #pragma unroll
            for (int m = 0; m < ROWS; m++) product *= message(p[m][n], decay);
            part[warp][lane + 32 * n] = log(product);  // near 1: a float's logarithm will do
        }
    } else {
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            double product = 1, sum = 0;
            #pragma unroll
            for (int m = 0; m < ROWS; m++) {
                product *= message(p[m][n], decay);
                if (m == ROWS / 2 - 1) { sum = log_of(product); product = 1; }  // of up to eight within e^-80 .. e^80
            }
            part[warp][lane + 32 * n] = sum + log_of(product);
        }
    }
    sum_columns(part, own, base, CAUSAL ? 1 : 0);
    // w = exp(C - max C); from row to row a causal one takes up the messages of the row before
    const double* C = CAUSAL ? part[warp] : base;
    float top = -INFINITY;  // about the largest C is good enough
    REAL w[ITEMS];
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int k = lane + 32 * n;
        if (CAUSAL) part[warp][k] += base[k];
        if (k < L) top = fmaxf(top, (float)C[k]);
    }
    top = warp_max(top);
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) w[n] = lane + 32 * n < L ? EXP((REAL)(C[lane + 32 * n] - top)) : 0;
    REAL least = faint(decay, CAUSAL, ROWS);
    unsigned rare = 0;
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
        REAL total = 0;
        opaque(decay);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            REAL t = message(p[m][n], decay), pw = p[m][n] * w[n];
            p[m][n] = CAUSAL ? (include_self ? pw * t : pw) : (include_self ? pw : DIVIDE(pw, t));
            if (CAUSAL) w[n] *= t;
            total += p[m][n];
        }
        total = warp_sum(total);
        if (at.has(m, L) && !(total > least && total < INFINITY)) rare |= 1u << m;
        scale_to_one(p[m], total);
        store_row(p[m], B + at.start + m * L, L, at.has(m, L));
    }
    for (int m = 0; rare >> m; m++)
        if (rare >> m & 1)
            beliefs_in_logs((SOFTMAX ? P : in) + at.start + m * L, C, B + at.start + m * L, decay, L, CAUSAL, m,
                            include_self);
}

#define REFINE(name, SOFTMAX, CAUSAL)                                                                                   \
    extern "C" __global__ void CLUSTER __launch_bounds__(32 * TEAM, 2)                                                  \
    name(const REAL* in, const mask_t* valid, REAL* P, REAL* B, const REAL* decays, int L, int heads,                   \
         int include_self) {                                                                                            \
        refine<SOFTMAX, CAUSAL>(in, valid, P, B, decays, L, heads, include_self);                                       \
    }
REFINE(refine_in_registers, false, false)
REFINE(refine_causal_in_registers, false, true)
REFINE(softmax_refine_in_registers, true, false)
REFINE(softmax_refine_causal_in_registers, true, true)

// dl = B (dB - sum of dB B) is the gradient of the log-beliefs, and log t_ik collects it from the others, all or
// (causal) the later ones. x_ik = P_ik dP_ik = dl_ik - c P_ik dlog_t_ik / t_ik, then through the softmax
// ds = x - P sum x. tax: what the rows of each warp add to the sum of dlog_t P / t.
extern "C" __global__ void CLUSTER __launch_bounds__(32 * TEAM, 2)
scores_gradient_in_registers(const REAL* __restrict__ dB, const REAL* __restrict__ B, const REAL* __restrict__ P,
                             const REAL* decays, const REAL* cs, REAL* __restrict__ ds, double* tax, int L, int causal,
                             int include_self) {
    __shared__ double part[TEAM][WIDTH], own[WIDTH], base[WIDTH];
    Place at(L);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    REAL decay = decays[at.matrix], c = cs[at.matrix], x[ROWS][ITEMS];
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
        REAL b[ITEMS], along = 0;
        load_row(x[m], dB + at.start + m * L, L, at.has(m, L), 0);
        load_row(b, B + at.start + m * L, L, at.has(m, L), 0);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) along += x[m][n] * b[n];
        along = warp_sum(along);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) x[m][n] = b[n] * (x[m][n] - along);  // dl
    }
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        REAL sum = 0;
        #pragma unroll
        for (int m = 0; m < ROWS; m++) sum += x[m][n];
        part[warp][lane + 32 * n] = sum;
    }
    sum_columns(part, own, base, causal ? -1 : 0);
    REAL g[ITEMS];
    double taxes = 0;
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) g[n] = base[lane + 32 * n] + (causal ? part[warp][lane + 32 * n] : 0);
    #pragma unroll
    for (int m = ROWS - 1; m >= 0; m--) {  // upwards: a causal row collects from those below it
        REAL p[ITEMS], total = 0, taxed_here = 0;
        load_row(p, P + at.start + m * L, L, at.has(m, L), 0);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            REAL dl = x[m][n], heard = g[n];
            if (!causal && !include_self) heard -= dl;
            if (causal && include_self) heard += dl;
            REAL taxed = DIVIDE(heard * p[n], message(p[n], decay));
            if (causal) g[n] += dl;
            x[m][n] = dl - c * taxed;
            taxed_here += taxed;
            total += x[m][n];
        }
        taxes += taxed_here;
        total = warp_sum(total);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) x[m][n] -= p[n] * total;
        store_row(x[m], ds + at.start + m * L, L, at.has(m, L));
    }
    taxes = warp_sum(taxes);
    if (lane == 0) tax[blockIdx.x * TEAM + warp] = taxes;
}
#endif
