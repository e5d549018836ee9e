// Softmax and refinement of attention, forward and backward. L tokens; rows are j or i, columns k.
//
// A matrix of up to 512 tokens is read once and written once, held meanwhile in the registers of a team of warps that
// tell each other what their rows sum up to in each column. The gradient makes the softmax again from the scores, and
// the beliefs from the softmax: these are fewer bytes than to read both. Longer matrices, and those that want a cluster
// of blocks where the GPU has none, are those of attention_long.cu.
//
// What counts beside bytes is instructions, some thirty for each number. So there are kernels for full rows, which ask
// nothing and read several numbers at once; the others ask for every number whether it is there.

#define WIDTH (32 * ITEMS)

// Hides from the compiler that x is what it was: it would keep what it made of it, for want of registers in memory,
// where making it again is quicker.
__device__ __forceinline__ void opaque(float& x) { asm volatile("" : "+f"(x)); }
__device__ __forceinline__ void opaque(double& x) { asm volatile("" : "+d"(x)); }

// Below this sum a row of P w / t, or of P w after w has taken up `rows` messages, may have lost terms that count.
__device__ __forceinline__ REAL faint(REAL decay, bool causal, int rows) {
    REAL growth = max((REAL)1, causal ? decay : 1 / decay), least = LOST * growth;
    for (int m = 1; causal && m < rows; m++) least *= growth;
    return least;
}

__device__ __noinline__ double log_of(double x) {
    return log(x);
}

// log x of a normal x > 0, as well as a float's logarithm knows it; NaN of NaN
__device__ __forceinline__ double log_of_product(double x, float) {
    int high = __double2hiint(x), exponent = (high >> 20) - 1023;
    float mantissa = (float)__hiloint2double((high & 0xfffff) | 0x3ff00000, __double2loint(x));
    if (mantissa > 1.4142f) { mantissa *= 0.5f; exponent += 1; }
    return exponent * 0.69314718055994531 + log(mantissa) + (x - x);
}
__device__ __forceinline__ double log_of_product(double x, double) { return log_of(x); }

// ---- rows -----------------------------------------------------------------------------------------------------------
//
// A warp has a row, a lane ITEMS numbers of it. FULL: L is WIDTH, so there is nothing to ask, and a lane reads several
// numbers that follow each other at once.

#define AT_ONCE (ITEMS < 16 / (int)sizeof(REAL) ? ITEMS : 16 / (int)sizeof(REAL))

struct alignas(sizeof(REAL) * AT_ONCE) Several {
    REAL v[AT_ONCE];
};

// where in the row a lane's number n is
template <bool FULL>
__device__ __forceinline__ int key(int n) {
    int lane = threadIdx.x % 32;
    return FULL ? n / AT_ONCE * (32 * AT_ONCE) + lane * AT_ONCE + n % AT_ONCE : lane + 32 * n;
}

// the numbers of a row from memory; `otherwise` where there is none
template <bool FULL>
__device__ __forceinline__ void load_row(REAL (&v)[ITEMS], const REAL* row, int L, bool here, REAL otherwise) {
    #pragma unroll
    for (int n = 0; n < ITEMS; n += FULL ? AT_ONCE : 1) {
        if (FULL) {
            Several several = *(const Several*)(row + key<FULL>(n));
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++) v[n + i] = several.v[i];
        } else {
            v[n] = here && key<FULL>(n) < L ? row[key<FULL>(n)] : otherwise;
        }
    }
}

template <bool FULL>
__device__ __forceinline__ void store_row(const REAL (&v)[ITEMS], REAL* row, int L, bool here) {
    #pragma unroll
    for (int n = 0; n < ITEMS; n += FULL ? AT_ONCE : 1) {
        if (FULL) {
            Several several;
            #pragma unroll
            for (int i = 0; i < AT_ONCE; i++) several.v[i] = v[n + i];
            *(Several*)(row + key<FULL>(n)) = several;
        } else if (here && key<FULL>(n) < L) {
            row[key<FULL>(n)] = v[n];
        }
    }
}

__device__ __forceinline__ void scale_to_one(REAL (&v)[ITEMS], REAL total) {
    REAL scale = total == 0 ? 0 : 1 / total;
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) v[n] *= scale;
}

// Where the decay is large P / t may be as little as 1e-35, and what it adds to a gradient less than a float's smallest
// number before 1 - decay makes much of it again. The gradient is as many times what it is meanwhile; a power of 2.
#define MEANWHILE ((REAL)(1ull << 60))

// Above this a prior is near 1: of two at once, rounded up, the sum would not be 1.
#define NEAR ((REAL)0.75)

// A row of priors P = scale e. The softmax of scores s has e = exp(s - top), top the largest of them, so that scale is at
// most 1; it is 0 where a row sees nothing. Where decay = e^-lam makes much of P, a P below a float's smallest normal
// number counts too: where the decay is large, top is 16 less, and e larger. A row that comes as P has scale 1, and as
// top what its prior near 1 becomes if it is sharp, else 0. Its messages are
// t = 1 - (1 - decay) P = (1 - P) + kept e, kept = decay scale: so a small decay = e^-lam does not drown beside the 1.
struct Row {
    REAL top, scale, kept;
    __device__ __forceinline__ REAL e_of_score(REAL s) const { return quick_exp(s - top); }
    __device__ __forceinline__ REAL e_of_prior(REAL P) const { return P > NEAR && top > 0 ? top : P; }
    __device__ __forceinline__ REAL message(REAL e) const { return not_below_zero(1 - scale * e) + kept * e; }
    __device__ __forceinline__ static bool large(REAL decay) { return decay > (REAL)1e20; }

    // A decay below this, lam above 2, drowns beside the rounding of a P near 1 too. A row that has one is sharp: there
    // 1 - P is what the others have. P becomes what leaves them that, as near as rounding lets it, and what it is off
    // by, no more than they have, goes into kept.
    __device__ __forceinline__ static bool small(REAL decay) { return decay < (REAL)0.13533528; }
    __device__ __forceinline__ void sharpen(REAL decay, REAL others, bool softmax) {
        if (softmax) {
            scale = 1 / (1 + others);
            kept = decay * scale + (scale * others - (1 - scale));
        } else {
            top = 1 - others;
            kept = decay + (others - (1 - top)) / top;
        }
    }
};

// from masked scores s to e(s)
template <bool QUICK>
__device__ __forceinline__ Row row_of_scores(REAL (&s)[ITEMS], REAL decay) {
    REAL top = -INFINITY, total = 0;
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) top = max(top, s[n]);
    top = warp_max(top);
    Row row = {top == -INFINITY ? 0 : top - (Row::large(decay) ? 16 : 0), 0, 0};
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) { s[n] = QUICK ? row.e_of_score(s[n]) : exp(s[n] - row.top); total += s[n]; }
    total = warp_sum(total);
    if (total != 0) row.scale = 1 / total;
    row.kept = decay * row.scale;
    return row;
}

// Beliefs of one row whose weights have left a float's range, by a warp, in logarithms: C (L) is the evidence before
// it, or, causal, before the `above` rows over it that belong to the same warp. prior(k), message(m, k): of label k, m
// rows above. Rare, so it reads them again. An empty row, which ends here too, stays empty.
template <typename Prior, typename Message>
__device__ __noinline__ void beliefs_in_logs(Prior prior, Message message, const double* C, REAL* B, int L, int causal,
                                             int above, int include_self) {
    auto log_belief = [&](int k) {
        double l = C[k] + log_of(prior(k)), own = log_of(message(0, k));
        if (causal)
            for (int m = 1; m <= above; m++) l += log_of(message(m, k));
        return causal == include_self ? l + (causal ? own : -own) : l;
    };
    double top = NEVER;
    for (int k = threadIdx.x % 32; k < L; k += 32)
        if (prior(k) > 0) top = fmax(top, log_belief(k));
    top = warp_max(top);
    REAL total = 0;
    for (int k = threadIdx.x % 32; k < L; k += 32)
        if (prior(k) > 0) total += exp((REAL)(log_belief(k) - top));
    total = warp_sum(total);
    for (int k = threadIdx.x % 32; k < L; k += 32)
        B[k] = prior(k) > 0 ? exp((REAL)(log_belief(k) - top)) / total : prior(k);  // 0, or NaN
}

extern "C" __global__ void softmax_rows(const REAL* s, const mask_t* valid, REAL* P, long long rows, int L, int heads,
                                        int causal, int mask_rows) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    REAL v[ITEMS];
    load_row<false>(v, s + row * L, L, true, -INFINITY);
    if (valid != nullptr) valid += row / L / heads * L;
    int j = row % L;
    bool used = !mask_rows || valid == nullptr || valid[j];
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int k = key<false>(n);
        if (!(used && (!causal || k <= j) && (valid == nullptr || (k < L && valid[k])))) v[n] = -INFINITY;
    }
    REAL scale = row_of_scores<false>(v, 1).scale;  // its bytes take longer than exp does
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) v[n] *= scale;
    store_row<false>(v, P + row * L, L, true);
}

// ds = P (dP - sum of dP P) of every row
extern "C" __global__ void softmax_gradient(const REAL* dP, const REAL* P, REAL* ds, long long rows, int L) {
    long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= rows) return;
    REAL d[ITEMS], p[ITEMS], total = 0;
    load_row<false>(d, dP + row * L, L, true, 0);
    load_row<false>(p, P + row * L, L, true, 0);
    for (int n = 0; n < ITEMS; n++) total += d[n] * p[n];
    total = warp_sum(total);
    for (int n = 0; n < ITEMS; n++) d[n] = p[n] * (d[n] - total);
    store_row<false>(d, ds + row * L, L, true);
}

// ---- a matrix in registers ------------------------------------------------------------------------------------------
//
// BLOCKS blocks of TEAM warps have a matrix; where they are several they are a cluster, whose blocks read each other's
// shared memory. A warp holds up to ROWS rows that follow each other.

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

__device__ __forceinline__ double read_in_block(const double* mine, int block) {
    double x;
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(x) : "r"(in_block(mine, block)) : "memory");
    return x;
}

__device__ __forceinline__ void write_in_block(double* mine, int block, double x) {
    asm volatile("st.shared::cluster.f64 [%0], %1;" :: "r"(in_block(mine, block)), "d"(x) : "memory");
}
#endif

#ifdef BLOCKS
#define TEAM 8
#define ROWS (WIDTH / (BLOCKS * TEAM))

struct Columns {
    double part[TEAM][WIDTH], own[WIDTH], base[WIDTH];
};

// Column sums over the rows of a matrix, in an order that never changes. On entry part[w][k] is what the rows of warp w
// give to column k. On return base[k] + part[w][k] is: for order 1 the sum over the warps before w, for order -1 that
// over the warps after it; for order 0 base[k] is the sum over all, and part is of no use. products, for order 0: what
// is in part is to be multiplied, and base is the logarithm of the product.
__device__ __forceinline__ void sum_columns(Columns& columns, int order, bool products = false) {
    double(*part)[WIDTH] = columns.part, *base = columns.base;
    __syncthreads();
    #pragma unroll
    for (int at = 0; at < WIDTH; at += 32 * TEAM) {
        int k = at + threadIdx.x;
        if (WIDTH < 32 * TEAM && k >= WIDTH) break;
        double sum = 0, x[TEAM];
        #pragma unroll
        for (int w = 0; w < TEAM; w++) x[w] = part[w][k];
        if (order == 0 && products) {
            sum = ((x[0] * x[1]) * (x[2] * x[3])) * ((x[4] * x[5]) * (x[6] * x[7]));
            sum = log_of_product(sum, (REAL)0);
        } else if (order == 0) {
            sum = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
        } else {
            #pragma unroll
            for (int v = 0; v < TEAM; v++) {
                int w = order < 0 ? TEAM - 1 - v : v;
                part[w][k] = sum;
                sum += x[w];
            }
        }
#if BLOCKS == 1
        base[k] = order ? 0 : sum;
#else
        columns.own[k] = sum;
#endif
    }
#if BLOCKS == 1
    __syncthreads();
#else
    wait_for_cluster();
    // each block sums its share of the columns over the blocks: a lane reads of one block and answers it
    int share = blockIdx.x % BLOCKS * (WIDTH / BLOCKS);
    #pragma unroll
    for (int at = 0; at < WIDTH; at += 32 * TEAM) {
        int block = (at + threadIdx.x) % BLOCKS, k = share + (at + threadIdx.x) / BLOCKS;
        double x = read_in_block(columns.own + k, block), sum = 0;
        if (order == 0) {
            sum = x;
            #pragma unroll
            for (int o = BLOCKS / 2; o; o >>= 1) sum += __shfl_xor_sync(ALL_LANES, sum, o);
        } else {
            #pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                double other = __shfl_sync(ALL_LANES, x, b, BLOCKS);
                if (order > 0 ? b < block : b > block) sum += other;
            }
        }
        write_in_block(base + k, block, sum);
    }
    wait_for_cluster();
#endif
}

// bit n: whether a lane's number n is of a token that may be seen. valid: of this sequence, or nullptr
template <bool FULL>
__device__ __forceinline__ unsigned visible_keys(int L, const mask_t* valid) {
    unsigned keys = 0;
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int k = key<FULL>(n);
        if ((FULL || k < L) && (valid == nullptr || valid[k])) keys |= 1u << n;
    }
    return keys;
}

// -inf for what row j may not see; one that is not used sees nothing
template <bool FULL>
__device__ __forceinline__ void mask_row(REAL (&s)[ITEMS], int j, bool used, unsigned keys, bool causal) {
    #pragma unroll
    for (int n = 0; n < ITEMS; n++)
        if (!(used && (keys >> n & 1) && (!causal || key<FULL>(n) <= j))) s[n] = -INFINITY;
}

// where a warp finds its rows: the matrix, how many rows a warp has, the first of this one, and that of its numbers
struct Place {
    int matrix, many, first;
    long long start;
    __device__ __forceinline__ Place(int L) {
        matrix = blockIdx.x / BLOCKS;
        many = (L + BLOCKS * TEAM - 1) / (BLOCKS * TEAM);
        first = (blockIdx.x % BLOCKS * TEAM + threadIdx.x / 32) * many;
        start = ((long long)matrix * L + first) * L;
    }
    __device__ __forceinline__ bool has(int m, int L) const { return m < many && first + m < L; }
    __device__ __forceinline__ bool sees(int m, int L, const mask_t* valid) const {
        return has(m, L) && (valid == nullptr || valid[first + m]);
    }
};

// Beliefs B of priors, which are `in` or, with SOFTMAX, the softmax of the scores `in`. For the gradient it then leaves
// what each row's softmax is, and, unless CAUSAL, the weights (L) that all rows share.
template <bool SOFTMAX, bool CAUSAL, bool FULL>
__device__ __forceinline__ void refine(const REAL* in, const mask_t* valid, Row* softmaxes, REAL* weights, REAL* B,
                                       const REAL* decays, int L, int heads, int include_self) {
    __shared__ Columns columns;
    __shared__ Row rows[TEAM][ROWS];
    double(*part)[WIDTH] = columns.part, *base = columns.base;
    if (FULL) L = WIDTH;
    if (SOFTMAX) include_self = false;
    Place at(L);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Row* row_of = rows[warp];
    REAL decay = decays[at.matrix], e[ROWS][ITEMS];
    #pragma unroll
    for (int m = 0; m < ROWS; m++)
        load_row<FULL>(e[m], in + at.start + m * L, L, at.has(m, L), SOFTMAX ? -INFINITY : 0);
    if (valid != nullptr) valid += (long long)(at.matrix / heads) * L;
    if (SOFTMAX) {
        unsigned keys = visible_keys<FULL>(L, valid);
        #pragma unroll
        for (int m = 0; m < ROWS; m++) {
            if (!FULL || CAUSAL || valid != nullptr)
                mask_row<FULL>(e[m], at.first + m, at.sees(m, L, valid), keys, CAUSAL);
            Row row = row_of_scores<true>(e[m], decay);
            if (lane == 0) row_of[m] = row;
        }
    } else if (lane < ROWS) {
        row_of[lane] = {0, 1, decay};
    }
    __syncwarp();
    // of row m of this warp and label k, for what is rare: so it reads it again
    auto e_of = [=](int m, int k) -> REAL {
        REAL x = in[at.start + m * L + k];
        if (!SOFTMAX) return row_of[m].e_of_prior(x);
        bool seen = row_of[m].scale != 0 && (valid == nullptr || valid[k]) && (!CAUSAL || k <= at.first + m);
        return seen ? exp(x - row_of[m].top) : 0;
    };
    if (Row::small(decay)) {
        #pragma unroll 1
        for (int m = 0; at.has(m, L); m++) {
            Row row = row_of[m];
            REAL largest = 0, others = 0;
            for (int k = lane; k < L; k += 32) {
                REAL e = e_of(m, k);
                largest = max(largest, e);
                if (row.scale * e <= NEAR) others += e;
            }
            largest = warp_max(largest);
            others = warp_sum(others);
            if (row.scale * largest > NEAR) row.sharpen(decay, others, SOFTMAX);
            if (lane == 0) row_of[m] = row;
        }
        __syncwarp();
        #pragma unroll
        for (int m = 0; m < ROWS && !SOFTMAX; m++) {
            #pragma unroll
            for (int n = 0; n < ITEMS; n++) e[m][n] = row_of[m].e_of_prior(e[m][n]);
        }
    }
    if (SOFTMAX && at.has(lane, L)) softmaxes[(long long)at.matrix * L + at.first + lane] = row_of[lane];
    // then the product of sixteen messages stays within a float, and of 128 within a double
    bool gentle = decay > (REAL)1e-2 && decay < (REAL)1e2;
    if (gentle) {
        REAL product[ITEMS];
        #pragma unroll
        for (int m = 0; m < ROWS; m++) {
            Row row = row_of[m];
            #pragma unroll
            for (int n = 0; n < ITEMS; n++) {
                REAL t = row.message(e[m][n]);
                product[n] = m ? product[n] * t : t;
            }
        }
        #pragma unroll
        for (int n = 0; n < ITEMS; n++)
            part[warp][key<FULL>(n)] = CAUSAL ? log_of_product(product[n], (REAL)0) : product[n];
    } else {
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            double product = 1, sum = 0;
            #pragma unroll
            for (int m = 0; m < ROWS; m++) {
                product *= row_of[m].message(e[m][n]);
                if (m == ROWS / 2 - 1) { sum = log_of(product); product = 1; }  // of up to eight within e^-80 .. e^80
            }
            part[warp][key<FULL>(n)] = sum + log_of(product);
        }
    }
    sum_columns(columns, CAUSAL ? 1 : 0, gentle);
    // w = exp(C - max C); from row to row a causal one takes up the messages of the row before
    const double* C = CAUSAL ? part[warp] : base;
    float top = -INFINITY;  // about the largest C is good enough
    REAL w[ITEMS];
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        int k = key<FULL>(n);
        if (CAUSAL) part[warp][k] += base[k];
        if (k < L) top = fmaxf(top, (float)C[k]);
    }
    top = warp_max(top);
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) w[n] = key<FULL>(n) < L ? quick_exp((REAL)(C[key<FULL>(n)] - top)) : 0;
    if (SOFTMAX && !CAUSAL && blockIdx.x % BLOCKS == 0 && warp == 0)
        store_row<FULL>(w, weights + (long long)at.matrix * L, L, true);
    REAL least = faint(decay, CAUSAL, ROWS);
    unsigned rare = 0;
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
        REAL total = 0;
        Row row = row_of[m];
        opaque(row.kept);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            REAL t = row.message(e[m][n]), ew = e[m][n] * w[n];
            e[m][n] = CAUSAL ? (include_self ? ew * t : ew) : (include_self ? ew : quotient(ew, t));
            if (CAUSAL) w[n] *= t;
            total += e[m][n];
        }
        total = warp_sum(total);
        if (at.has(m, L) && !(total > least && total < INFINITY)) rare |= 1u << m;
        scale_to_one(e[m], total);
        store_row<FULL>(e[m], B + at.start + m * L, L, at.has(m, L));
    }
    __syncwarp();
    for (int m = 0; rare >> m; m++)
        if (rare >> m & 1) {
            auto prior = [=](int k) { return (double)row_of[m].scale * e_of(m, k); };  // as a float it may be none
            auto message = [=](int above, int k) { return row_of[m - above].message(e_of(m - above, k)); };
            beliefs_in_logs(prior, message, C, B + at.start + m * L, L, CAUSAL, m, include_self);
        }
}

// dl = B (dB - sum of dB B) is the gradient of the log-beliefs, and log t_ik collects it from the others, all or
// (causal) the later ones. x_ik = P_ik dP_ik = dl_ik - c P_ik dlog_t_ik / t_ik, then through the softmax
// ds = x - P sum x. P = scale e is made again from the scores, B from P unless CAUSAL. tax: what the rows of each warp
// add to the sum of dlog_t P / t, if lambda is LEARNED.
template <bool CAUSAL, bool FULL, bool LEARNED>
__device__ __forceinline__ void gradient(const REAL* __restrict__ dB, const REAL* __restrict__ B,
                                         const REAL* __restrict__ scores, const mask_t* __restrict__ valid,
                                         const Row* __restrict__ softmaxes, const REAL* __restrict__ weights,
                                         const REAL* __restrict__ decays, const REAL* __restrict__ cs,
                                         REAL* __restrict__ ds, double* __restrict__ tax, int L, int heads) {
    __shared__ Columns columns;
    double(*part)[WIDTH] = columns.part, *base = columns.base;
    if (FULL) L = WIDTH;
    Place at(L);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    REAL decay = decays[at.matrix], c = cs[at.matrix], least = faint(decay, CAUSAL, ROWS), x[ROWS][ITEMS];
    bool large = Row::large(decay);
    if (valid != nullptr) valid += (long long)(at.matrix / heads) * L;
    softmaxes += (long long)at.matrix * L + at.first;
    weights += (long long)at.matrix * L;
    unsigned keys = visible_keys<FULL>(L, valid);
    auto load_e = [&](REAL (&e)[ITEMS], int m) {
        load_row<FULL>(e, scores + at.start + m * L, L, at.has(m, L), -INFINITY);
        if (!FULL || CAUSAL || valid != nullptr)
            mask_row<FULL>(e, at.first + m, at.sees(m, L, valid), keys, CAUSAL);
        Row row = {at.has(m, L) ? softmaxes[m].top : 0, 0, 0};
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) e[n] = row.e_of_score(e[n]);
        row.scale = at.has(m, L) ? softmaxes[m].scale : 0;  // here: there are registers for it now
        row.kept = at.has(m, L) ? softmaxes[m].kept : 0;
        opaque(row.kept);
        return row;
    };
    #pragma unroll
    for (int m = 0; m < ROWS; m++) load_row<FULL>(x[m], dB + at.start + m * L, L, at.has(m, L), 0);
    #pragma unroll
    for (int m = 0; m < ROWS; m++) {
        REAL b[ITEMS], along = 0, total = 0;
        Row row = load_e(b, m);
        bool again = !CAUSAL;
        if (again) {
            REAL w[ITEMS];
            load_row<FULL>(w, weights, L, true, 0);
            #pragma unroll
            for (int n = 0; n < ITEMS; n++) {
                b[n] = quotient(b[n] * w[n], row.message(b[n]));
                total += b[n];
                along += x[m][n] * b[n];
            }
            total = warp_sum(total);
            along = warp_sum(along);
            again = total > least && total < INFINITY && fabs(along) < INFINITY;
        }
        if (!again) {  // it has to be read; so do rows that are too faint to make again
            load_row<FULL>(b, B + at.start + m * L, L, at.has(m, L), 0);
            total = 1;
            along = 0;
            #pragma unroll
            for (int n = 0; n < ITEMS; n++) along += x[m][n] * b[n];
            along = warp_sum(along);
        }
        REAL scale = 1 / total;
        along *= scale;
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) x[m][n] = b[n] * (scale * x[m][n] - scale * along);  // dl
        if (LEARNED) {  // a row of dl sums to zero but for rounding, which the tax, a sum that cancels, would show
            REAL left = 0;
            #pragma unroll
            for (int n = 0; n < ITEMS; n++) left += x[m][n];
            left = scale * warp_sum(left);
            #pragma unroll
            for (int n = 0; n < ITEMS; n++) x[m][n] -= b[n] * left;
        }
        if (large) {
            #pragma unroll
            for (int n = 0; n < ITEMS; n++) x[m][n] *= MEANWHILE;
        }
    }
    #pragma unroll
    for (int n = 0; n < ITEMS; n++) {
        REAL sum = 0;
        #pragma unroll
        for (int m = 0; m < ROWS; m++) sum += x[m][n];
        part[warp][key<FULL>(n)] = sum;
    }
    sum_columns(columns, CAUSAL ? -1 : 0);
    REAL g[ITEMS];
    double taxes = 0;
    #pragma unroll
    for (int n = 0; n < ITEMS; n++)
        g[n] = base[key<FULL>(n)] + (CAUSAL ? part[warp][key<FULL>(n)] : 0);
    #pragma unroll
    for (int m = ROWS - 1; m >= 0; m--) {  // upwards: a causal row collects from those below it
        REAL e[ITEMS], total = 0, taxed = 0;
        Row row = load_e(e, m);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) {
            REAL dl = x[m][n], heard = CAUSAL ? g[n] : g[n] - dl;
            REAL taxed_here = quotient(heard * e[n], row.message(e[n]));
            if (CAUSAL) g[n] += dl;
            x[m][n] = dl - (c * row.scale) * taxed_here;
            taxed += taxed_here;
            total += x[m][n];
        }
        taxes += (double)row.scale * taxed;
        total = row.scale * warp_sum(total);
        #pragma unroll
        for (int n = 0; n < ITEMS; n++) x[m][n] -= e[n] * total;
        if (large) {
            #pragma unroll
            for (int n = 0; n < ITEMS; n++) x[m][n] /= MEANWHILE;
        }
        store_row<FULL>(x[m], ds + at.start + m * L, L, at.has(m, L));
    }
    taxes = warp_sum(taxes) / (large ? MEANWHILE : 1);
    if (LEARNED && lane == 0) tax[blockIdx.x * TEAM + warp] = taxes;
}

#define REFINE(name, SOFTMAX, CAUSAL, FULL)                                                                            \
    extern "C" __global__ void CLUSTER __launch_bounds__(32 * TEAM, 2)                                                 \
    name(const REAL* in, const mask_t* valid, Row* softmaxes, REAL* weights, REAL* B, const REAL* decays, int L,       \
         int heads, int include_self) {                                                                                \
        refine<SOFTMAX, CAUSAL, FULL>(in, valid, softmaxes, weights, B, decays, L, heads, include_self);               \
    }
#define GRADIENT(name, CAUSAL, FULL, LEARNED)                                                                          \
    extern "C" __global__ void CLUSTER __launch_bounds__(32 * TEAM, 2)                                                 \
    name(const REAL* dB, const REAL* B, const REAL* scores, const mask_t* valid, const Row* softmaxes,                 \
         const REAL* weights, const REAL* decays, const REAL* cs, REAL* ds, double* tax, int L, int heads) {           \
        gradient<CAUSAL, FULL, LEARNED>(dB, B, scores, valid, softmaxes, weights, decays, cs, ds, tax, L, heads);      \
    }
#define ALL(suffix, FULL)                                                                                              \
    REFINE(refine##suffix, false, false, FULL)                                                                         \
    REFINE(refine_causal##suffix, false, true, FULL)                                                                   \
    REFINE(softmax_refine##suffix, true, false, FULL)                                                                  \
    REFINE(softmax_refine_causal##suffix, true, true, FULL)                                                            \
    GRADIENT(scores_gradient##suffix, false, FULL, false)                                                              \
    GRADIENT(scores_gradient_causal##suffix, true, FULL, false)                                                        \
    GRADIENT(scores_and_lambda_gradient##suffix, false, FULL, true)                                                    \
    GRADIENT(scores_and_lambda_gradient_causal##suffix, true, FULL, true)
ALL(_in_registers, false)
#if SINGLE  // where speed counts; to compile them takes seconds
ALL(_of_full_rows_in_registers, true)
#endif
#endif
