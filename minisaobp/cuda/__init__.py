"""The hand-written CUDA, all of it: attention.cu and operations.cu, and the functions that launch them.

One warp of 32 lanes works on one row wherever rows are short; sums over columns are made in a fixed order, so a run
repeats bit for bit.
"""

from .attention import product, refine_rows, refined_softmax, refined_softmax_backward, softmax_backward, softmax_rows
from .launch import cupy_library
from .operations import (
    adamw,
    bias_gelu,
    cross_entropy,
    embedding_backward,
    layer_norm,
    layer_norm_backward,
    sum_of_rows,
)

__all__ = [
    "adamw",
    "allow_tf32",
    "bias_gelu",
    "cross_entropy",
    "embedding_backward",
    "layer_norm",
    "layer_norm_backward",
    "product",
    "refine_rows",
    "refined_softmax",
    "refined_softmax_backward",
    "softmax_backward",
    "softmax_rows",
    "sum_of_rows",
]


def allow_tf32():
    """Matrix products in TF32: 10 bits of the factors, float32 sums. CuPy's own ask CUPY_TF32, at the first."""
    tf32 = 3  # CUBLAS_TF32_TENSOR_OP_MATH, which CuPy has no name for
    cupy_library().cuda.cublas.setMathMode(cupy_library().cuda.device.get_cublas_handle(), tf32)
