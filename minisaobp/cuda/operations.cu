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

// ids sorted, order: where each came from; the block of the first of equal ids adds up its rows, in order, which may be
// those of all tokens
extern "C" __global__ void embedding_gradient(const REAL* dy, const long long* sorted, const long long* order,
                                              REAL* dtable, int count, int D) {
    int at = blockIdx.x;
    long long id = sorted[at];
    if (at > 0 && sorted[at - 1] == id) return;
    for (int k = threadIdx.x; k < D; k += blockDim.x) {
        double total = 0;
        for (int n = at; n < count && sorted[n] == id; n++) total += dy[order[n] * D + k];
        dtable[id * D + k] = total;
    }
}
