"""Sections 3 and 5 of the paper: what is measured on an attention matrix."""

from .entropy import attention_entropy, row_entropy
from .gtd import gtd, indirect_attention, indirect_entropy

__all__ = ["attention_entropy", "gtd", "indirect_attention", "indirect_entropy", "row_entropy"]
