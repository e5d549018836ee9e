"""minisaobp: self-attention one-step belief propagation (SAOBP, arXiv 2509.07324), from scratch in NumPy."""

from .bp import (
    FactorGraph,
    algorithm1,
    refine,
    refine_vjp,
    refine_with_factor,
    refine_with_factor_vjp,
    streaming_attention,
    streaming_attention_backward,
)
from .crosscheck import crosscheck
from .metrics import (
    attention_entropy,
    betweenness,
    clustering_coefficient,
    cross_layer_gtd,
    gtd,
    gtd_backward,
    indirect_attention,
    indirect_entropy,
    sparsity,
)
from .nn import from_pretrained

__version__ = "0.1.0"
__all__ = [
    "FactorGraph",
    "algorithm1",
    "attention_entropy",
    "betweenness",
    "clustering_coefficient",
    "cross_layer_gtd",
    "crosscheck",
    "from_pretrained",
    "gtd",
    "gtd_backward",
    "indirect_attention",
    "indirect_entropy",
    "refine",
    "refine_vjp",
    "refine_with_factor",
    "refine_with_factor_vjp",
    "sparsity",
    "streaming_attention",
    "streaming_attention_backward",
]
