// What every kernel uses. REAL, SINGLE, ITEMS, WARPS and LOST are defined where it is compiled (launch.py): the dtype,
// whether that is float, how many numbers of a row a lane holds, rows per block, the smallest sum of beliefs to trust.
typedef unsigned char mask_t;
#define ALL_LANES 0xffffffffu
#define INFINITY __int_as_float(0x7f800000)
#define NEVER (-1e300)

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
    for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(ALL_LANES, x, o);
    return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
    for (int o = 16; o; o >>= 1) x = max(x, __shfl_xor_sync(ALL_LANES, x, o));
    return x;
}

// x, or 0 for what rounding has made less of it
__device__ __forceinline__ float not_below_zero(float x) { return __saturatef(x); }  // of x <= 1, at no cost
__device__ __forceinline__ double not_below_zero(double x) { return fmax(x, 0.0); }

// Quick exponential and quotient: of floats within 2 roundings, the exponential within 2 + |x| of them, and both
// without numbers below a float's smallest normal one, which take several instructions more.
__device__ __forceinline__ float quick_exp(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));  // log2 e
    return y;
}
__device__ __noinline__ double quick_exp(double x) { return exp(x); }

__device__ __forceinline__ float quotient(float a, float b) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(b));
    return a * y;
}
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }
