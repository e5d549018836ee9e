"""Sections 3 and 4 of the paper: belief propagation on an attention matrix."""

from .algorithm1 import algorithm1, algorithm1_row_product
from .custom_factor import refine_with_factor, refine_with_factor_vjp
from .factor_graph import FactorGraph
from .potts import bp_high, bp_low, potts
from .refine import refine, refine_vjp
from .streaming import streaming_attention, streaming_attention_backward

__all__ = [
    "FactorGraph",
    "algorithm1",
    "algorithm1_row_product",
    "bp_high",
    "bp_low",
    "potts",
    "refine",
    "refine_vjp",
    "refine_with_factor",
    "refine_with_factor_vjp",
    "streaming_attention",
    "streaming_attention_backward",
]
