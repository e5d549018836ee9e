"""Sections 3 and 4 of the paper: belief propagation on an attention matrix."""

from .algorithm1 import algorithm1, algorithm1_row_product
from .potts import bp_high, bp_low, potts
from .refinement import refine, refine_vjp

__all__ = ["algorithm1", "algorithm1_row_product", "bp_high", "bp_low", "potts", "refine", "refine_vjp"]
