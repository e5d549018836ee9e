// What every kernel uses. REAL, ITEMS, WARPS, LOST, DIVIDE and EXP are defined where it is compiled (launch.py): the
// dtype, how many numbers of a row a lane holds, rows per block, the smallest sum of beliefs to trust, a quick quotient
// and a quick exponential.
typedef unsigned char mask_t;
#define FULL 0xffffffffu
#define INFINITY __int_as_float(0x7f800000)
#define NEVER (-1e300)

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
