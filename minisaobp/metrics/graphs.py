"""The token graph of an attention matrix: clustering and betweenness (section 5 of the paper), by igraph and networkx.

Graph measures need a graph, and the paper does not say how A becomes one. `attention_graph` is how it does here.
"""

import math
import numbers

import numpy as np

from ..backend import attention_array, to_host, valid_array

THRESHOLD, NODES = 1e-4, 40  # the paper's
CLUSTERING = ("unweighted", "barrat", "onnela")


def attention_graph(A, threshold=THRESHOLD, nodes=NODES, valid=None):
    """Weights of the undirected token graph of one attention matrix A (L, L): symmetric, (n, n), zeros on the diagonal.

    Its nodes are the first `nodes` tokens, padding left out; the weight between j and k is (A_jk + A_kj) / 2, and there
    is an edge where that is at least the threshold. valid: (L,) booleans, False for padding.

    >>> attention_graph(np.array([[0.5, 0.5], [0.00001, 0.99999]]))
    array([[0.      , 0.250005],
           [0.250005, 0.      ]])
    """
    A = attention_array(A)
    if A.ndim != 2:
        raise ValueError(f"A: expected one matrix (L, L), got shape {A.shape}")
    _check(threshold, nodes)
    A = to_host(A).astype(np.float64)
    chosen = np.arange(len(A)) if valid is None else np.flatnonzero(to_host(valid_array(valid, A)))
    A = A[np.ix_(chosen[:nodes], chosen[:nodes])]
    W = (A + A.T) / 2
    np.fill_diagonal(W, 0)
    return np.where(threshold <= W, W, 0)


def clustering_coefficient(A, kind="unweighted", threshold=THRESHOLD, nodes=NODES, *, valid=None):
    """Mean clustering coefficient of the token graphs of A (..., L, L); shape A.shape[:-2], NaN if nobody has two
    neighbours.

    kind: "unweighted", the share of a node's pairs of neighbours that are joined; "barrat", each pair weighted by the
    mean weight of its two edges over the node's mean weight (Barrat et al. 2004); "onnela", the mean over pairs of the
    cube root of the product of the triangle's weights, divided by the largest weight of the graph (Onnela et al. 2005).
    The mean is over the nodes with two neighbours or more, for the others it is not defined; a complete graph has 1
    unweighted, whatever its weights. Other arguments as `attention_graph`, valid (..., L).

    >>> float(clustering_coefficient(np.full((5, 5), 0.2)))
    1.0
    """
    if kind not in CLUSTERING:
        raise ValueError(f"kind: expected one of {', '.join(CLUSTERING)}, got {kind!r}")
    return _each(A, threshold, nodes, valid, lambda W: _clustering(W, kind))


def betweenness(A, weighted=False, threshold=THRESHOLD, nodes=NODES, *, valid=None):
    """Mean unnormalised betweenness of the token graphs of A (..., L, L); shape A.shape[:-2], NaN without two nodes.

    How many pairs' shortest paths a token lies on, as a mean over the tokens; 0 in a complete graph. weighted: an
    edge's length is 1 / its weight, for a weight is nearness and betweenness asks for distance; otherwise 1. Other
    arguments as `attention_graph`, valid (..., L).

    >>> star = np.full((5, 5), 1e-9); star[0] = star[:, 0] = 0.2
    >>> float(betweenness(star).round(6))                      # 6 pairs of 4 leaves, all through the first, over 5
    1.2
    """

    def one(W):
        if len(W) < 2:
            return math.nan
        graph, weights = _igraph(W)
        return float(np.mean(graph.betweenness(weights=1 / weights if weighted and len(weights) else None)))

    return _each(A, threshold, nodes, valid, one)


def _clustering(W, kind):
    neighbours = (W > 0).sum(axis=1)
    if not (neighbours >= 2).any():
        return math.nan
    if kind == "onnela":
        import networkx

        values = networkx.clustering(networkx.from_numpy_array(W), weight="weight")
        values = np.array([values[n] for n in range(len(W))])
    else:
        graph, weights = _igraph(W)
        if kind == "barrat":
            values = np.array(graph.transitivity_local_undirected(weights=weights))
        else:
            values = np.array(graph.transitivity_local_undirected())
    return float(values[neighbours >= 2].mean())


def _igraph(W):
    """The graph and the weights of its edges."""
    import igraph

    first, second = np.nonzero(np.triu(W))
    return igraph.Graph(len(W), np.stack([first, second], 1).tolist()), W[first, second]


def _each(A, threshold, nodes, valid, function):
    """function(weights) of every matrix of A."""
    A = attention_array(A)
    _check(threshold, nodes)
    valid = None if valid is None else np.broadcast_to(to_host(valid_array(valid, A)), A.shape[:-1])
    A = to_host(A)
    values = np.empty(A.shape[:-2])
    for at in np.ndindex(values.shape):
        values[at] = function(attention_graph(A[at], threshold, nodes, None if valid is None else valid[at]))
    return values if values.ndim else values[()]


def _check(threshold, nodes):
    if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real) or not 0 < threshold < math.inf:
        raise ValueError(f"threshold: expected a finite number > 0, got {threshold!r}")
    if isinstance(nodes, bool) or not isinstance(nodes, numbers.Integral) or nodes < 1:
        raise ValueError(f"nodes: expected a whole number >= 1, got {nodes!r}")
