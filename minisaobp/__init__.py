"""minisaobp: self-attention one-step belief propagation (SAOBP, arXiv 2509.07324), from scratch in NumPy."""

from .bp import algorithm1, refine, refine_vjp
from .metrics import attention_entropy, gtd, indirect_attention, indirect_entropy

__version__ = "0.1.0"
__all__ = [
    "algorithm1",
    "attention_entropy",
    "gtd",
    "indirect_attention",
    "indirect_entropy",
    "refine",
    "refine_vjp",
]
