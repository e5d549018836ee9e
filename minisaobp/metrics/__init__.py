"""Sections 3 and 5 of the paper: what is measured on an attention matrix."""

from .attention import column_mass, head_features, regime, sparsity
from .entropy import attention_entropy, row_entropy
from .graphs import attention_graph, betweenness, clustering_coefficient
from .gtd import (
    cross_layer_gtd,
    gtd,
    gtd_and_indirect_entropy,
    gtd_backward,
    idempotent_gtd,
    indirect_attention,
    indirect_entropy,
)

__all__ = [
    "attention_entropy",
    "attention_graph",
    "betweenness",
    "clustering_coefficient",
    "column_mass",
    "cross_layer_gtd",
    "gtd",
    "gtd_and_indirect_entropy",
    "gtd_backward",
    "head_features",
    "idempotent_gtd",
    "indirect_attention",
    "indirect_entropy",
    "regime",
    "row_entropy",
    "sparsity",
]
