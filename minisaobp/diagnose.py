"""What the paper measures on attention, for any model or any attention arrays, one batch of sequences at a time.

Axis letters: N layers, B sequences of a batch, H heads, L tokens. Only running sums are kept, so memory does not grow
with the number of sequences.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from scipy import stats

from . import metrics
from .backend import array_namespace, in_pieces, to_host
from .metrics.entropy import mean_over_rows

# by layer, head and sequence; `cross_layer_gtd` by layer and sequence, of the mean over heads
MEASURES = ("entropy", "gtd", "indirect_entropy", "sparsity", "sink", "normalised_entropy", "local")
GRAPH_MEASURES = ("clustering", "clustering_barrat", "clustering_onnela", "betweenness", "betweenness_weighted")
TOLERANCE = 1e-3  # of the row sums of attention from elsewhere, which may have been stored in half precision


class NotAttention(ValueError):
    """An array that is no attention; says where."""


@dataclasses.dataclass
class Diagnosis:
    """Running sums over the sequences seen so far."""

    name: str
    beta: float = 0.9
    hops: float = 4  # or math.inf
    graph_sequences: int = 16  # how many sequences have their token graphs measured, which takes long
    causal: bool = False  # whether no token attends to a later one
    sequences: int = 0  # with a token at least
    seen: int = 0
    tokens: int = 0
    sums: dict = dataclasses.field(default_factory=dict)
    squares: dict = dataclasses.field(default_factory=dict)
    position_sums: Any = None  # (N, L)
    position_counts: Any = None  # (L,)
    graphs: list = dataclasses.field(default_factory=list)
    example: Any = None  # (N, L, L) of the first sequence, mean over heads

    def add(self, maps, valid=None):
        """Count a batch: maps (N, B, H, L, L), rows of sum 1; valid (B, L) booleans or None. Raises NotAttention.

        CuPy maps are measured on their GPU, but for what is of graphs.
        """
        xp = array_namespace(maps)
        maps = xp.asarray(maps)
        valid = np.ones((maps.shape[1], maps.shape[-1]), bool) if valid is None else np.asarray(valid, bool)
        check_attention(maps, valid, self.seen)
        self.seen += len(valid)
        some = valid.any(axis=1)
        if not some.any():
            return
        if not some.all():
            maps, valid = maps[:, xp.asarray(some)], valid[some]
        maps = maps.astype(np.float32) if maps.dtype == np.float16 else maps
        values, entropies = self._measure(maps, valid)
        mean = maps.mean(axis=2)  # [N, B, L, L]
        across = metrics.cross_layer_gtd(mean, self.beta, self.hops, valid=xp.asarray(valid))
        values["cross_layer_gtd"], mean = to_host(across), to_host(mean)
        for name, value in values.items():
            value = value.astype(np.float64)
            self.sums[name] = self.sums.get(name, 0) + value.sum(axis=1)
            self.squares[name] = self.squares.get(name, 0) + (value * value).sum(axis=1)
        if self.position_sums is None:
            self.position_sums, self.position_counts = np.zeros((len(maps), maps.shape[-1])), np.zeros(maps.shape[-1])
        self.position_sums += np.where(valid, entropies, 0).sum(axis=1)
        self.position_counts += valid.sum(axis=0)
        for b in range(min(len(valid), self.graph_sequences - self.sequences)):
            self._add_graphs(mean[:, b], valid[b], self.sequences + b)
        if self.example is None:
            self.example = mean[:, 0][:, valid[0]][:, :, valid[0]]
        self.sequences += len(valid)
        self.tokens += int(valid.sum())

    def _measure(self, maps, valid):
        """{measure: (N, B, H)} and the entropy of every row, mean over heads, (N, B, L)."""
        N, B, H, L, _ = maps.shape
        stack = maps.reshape(N * B * H, L, L)
        rows = np.broadcast_to(valid[None, :, None], (N, B, H, L)).reshape(-1, L)
        rows = array_namespace(maps).asarray(rows)
        padded = not valid.all()
        values = {name: np.empty(len(stack)) for name in MEASURES}
        entropies = np.empty((len(stack), L))

        def work(part):
            A, some = stack[part], rows[part] if padded else None
            of_rows = metrics.row_entropy(A)
            entropies[part] = to_host(of_rows)
            gtd, indirect_entropy = metrics.gtd_and_indirect_entropy(A, self.beta, self.hops, valid=some)
            features = metrics.head_features(A, valid=some, causal=self.causal)
            found = {
                "entropy": mean_over_rows(of_rows, some),
                "gtd": gtd,
                "indirect_entropy": indirect_entropy,
                "sparsity": metrics.sparsity(A, valid=some, causal=self.causal),
                "sink": features["sink"],
                "normalised_entropy": features["entropy"],
                "local": features["local"],
            }
            for name in MEASURES:
                values[name][part] = to_host(found[name])

        in_pieces(work, stack)
        values = {name: value.reshape(N, B, H) for name, value in values.items()}
        return values, entropies.reshape(N, B, H, L).mean(axis=2)

    def _add_graphs(self, maps, valid, sequence):
        """Token graphs of one sequence, maps (N, L, L) mean over heads: a point per layer."""
        for layer, A in enumerate(maps):
            self.graphs.append(
                {
                    "sequence": sequence,
                    "layer": layer + 1,
                    "complete": _is_complete(A, valid),
                    "gtd": float(metrics.gtd(A, self.beta, self.hops, valid=valid)),
                    "clustering": metrics.clustering_coefficient(A, valid=valid),
                    "clustering_barrat": metrics.clustering_coefficient(A, "barrat", valid=valid),
                    "clustering_onnela": metrics.clustering_coefficient(A, "onnela", valid=valid),
                    "betweenness": metrics.betweenness(A, valid=valid),
                    "betweenness_weighted": metrics.betweenness(A, weighted=True, valid=valid),
                }
            )

    def result(self):
        """Everything as JSON: means over sequences by layer and by head, with the standard deviation by layer."""
        means = {name: total / self.sequences for name, total in self.sums.items()}  # [N, H], cross-layer [N]
        by_head = [name for name in MEASURES if name in means]
        features = {"sink": means["sink"], "entropy": means["normalised_entropy"], "local": means["local"]}
        regimes = metrics.regime(features)
        layers = []
        for n in range(len(regimes)):
            row = {"layer": n + 1}
            for name in by_head:
                row[name] = float(means[name][n].mean())
                spread = self.squares[name][n] / self.sequences - means[name][n] ** 2
                row[name + "_std"] = float(np.sqrt(np.maximum(spread, 0)).mean())
            row["cross_layer_gtd"] = float(means["cross_layer_gtd"][n])
            row["regimes"] = {kind: int((regimes[n] == kind).sum()) for kind in metrics.attention.REGIMES}
            layers.append(row)
        heads = [
            {"layer": n + 1, "head": h + 1, "regime": str(regimes[n, h])}
            | {name: float(means[name][n, h]) for name in by_head}
            for n in range(regimes.shape[0])
            for h in range(regimes.shape[1])
        ]
        seen = self.position_counts > 0
        return {
            "name": self.name,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "causal": bool(self.causal),
            "beta": self.beta,
            "hops": None if self.hops == math.inf else self.hops,
            "layers": layers,
            "heads": heads,
            "positional_entropy": [
                [float(total / count) for total, count in zip(row[seen], self.position_counts[seen], strict=True)]
                for row in self.position_sums
            ],
            "graphs": [_without_nan(point) for point in self.graphs],
            "complete_graphs": sum(point["complete"] for point in self.graphs),
            "graph_correlations": [correlation(self.graphs, "gtd", name) for name in GRAPH_MEASURES],
        }


def by_layer(model, batches, measures):
    """{measure: [a number for every layer]} of a model on text as it stands: means over heads and sequences.

    batches: an iterable of Batch; of choices each is a sequence. measures: some of "entropy", "indirect_entropy", "gtd"
    and "sparsity", measured where the model is. Padding does not count.
    """
    sums, sequences = dict.fromkeys(measures, 0), 0
    for batch in batches:
        maps = model.attention_maps(batch.ids, batch.attention_mask, batch.token_type_ids)  # [N, B, H, L, L]
        valid = array_namespace(maps).asarray(batch.attention_mask.reshape(-1, 1, maps.shape[-1]))
        values = {}
        if "entropy" in measures:
            values["entropy"] = metrics.attention_entropy(maps, valid=valid)
        if {"gtd", "indirect_entropy"} & set(measures):  # one G serves both
            both = metrics.gtd_and_indirect_entropy(maps, valid=valid)
            values |= dict(zip(("gtd", "indirect_entropy"), both, strict=True))
        if "sparsity" in measures:
            values["sparsity"] = metrics.sparsity(maps, valid=valid, causal=model.config.model_type == "gpt2")
        for name in measures:
            sums[name] += to_host(values[name]).mean(axis=2).sum(axis=1, dtype=np.float64)
        sequences += maps.shape[1]
    return {name: [float(x) for x in total / sequences] for name, total in sums.items()}


def graphs_by_layer(model, batch):
    """{"clustering", "betweenness", "cross_layer_gtd": [a number for every layer]} of the token graphs of a batch.

    Means over sequences, of attention that is a mean over heads, as the paper's Fig. 2 has it. The first layer has no
    GTD across layers: 0."""
    maps = to_host(model.attention_maps(batch.ids, batch.attention_mask, batch.token_type_ids).mean(axis=2))
    valid = np.broadcast_to(batch.attention_mask.reshape(-1, maps.shape[-1]), maps.shape[:-1])
    found = {
        "clustering": metrics.clustering_coefficient(maps, valid=valid),
        "betweenness": metrics.betweenness(maps, valid=valid),
        "cross_layer_gtd": metrics.cross_layer_gtd(maps, valid=valid),
    }  # [N, B]
    return {name: [float(x) for x in values.mean(axis=1)] for name, values in found.items()}


def check_attention(maps, valid, first=0):
    """Raise NotAttention unless maps (N, B, H, L, L) are attention: finite, not negative, rows of sum 1.

    Rows of padding (valid (B, L) False) may be anything finite. first: number of the batch's first sequence.
    """
    if maps.ndim != 5 or maps.shape[-1] != maps.shape[-2] or 0 in maps.shape:
        raise NotAttention(f"expected shape (layers, batch, heads, L, L), got {maps.shape}")
    if maps.dtype.name not in ("float16", "float32", "float64"):
        raise NotAttention(f"expected float16, float32 or float64, got {maps.dtype}")
    with np.errstate(invalid="ignore", over="ignore"):
        totals = to_host(maps.sum(axis=-1, dtype=np.float64))
        lowest = to_host(maps.min(axis=-1))
        used = np.broadcast_to(valid[None, :, None], totals.shape)
        wrong = ~(np.isfinite(totals) & (lowest >= 0)) | (used & ~(abs(totals - 1) <= TOLERANCE))
    if wrong.any():
        n, b, h, j = (int(i) for i in np.argwhere(wrong)[0])
        what = f"sums to {totals[n, b, h, j]:.6g}" if lowest[n, b, h, j] >= 0 else f"has {lowest[n, b, h, j]:.6g}"
        raise NotAttention(
            f"layer {n + 1}, sequence {first + b + 1}, head {h + 1}, row {j + 1} {what}, expected numbers >= 0 of sum "
            f"1 to within {TOLERANCE:g}"
        )
    if not valid.all():
        xp = array_namespace(maps)
        padding = xp.asarray(~valid).astype(np.float64)
        lost = used * to_host(xp.einsum("nbhjk,bk->nbhj", maps.astype(np.float64), padding))
        if (lost > TOLERANCE).any():
            n, b, h, j = (int(i) for i in np.argwhere(lost > TOLERANCE)[0])
            raise NotAttention(
                f"layer {n + 1}, sequence {first + b + 1}, head {h + 1}, row {j + 1} gives {lost[n, b, h, j]:.3g} to "
                "padding, expected none"
            )


def correlation(points, x, y, resamples=2000):
    """Pearson's r of two measures over points (dicts), its p-value (scipy) and a 95% bootstrap interval over points.

    Points where either is NaN or missing are left out and counted; r is None where fewer than three are left or one of
    the two is constant.
    """
    pairs = [(point.get(x), point.get(y)) for point in points]
    kept = np.array([pair for pair in pairs if None not in pair and not any(map(math.isnan, pair))]).reshape(-1, 2)
    found = {"x": x, "y": y, "points": len(kept), "left_out": len(pairs) - len(kept), "r": None, "p": None}
    found["interval"] = None
    if len(kept) < 3 or (np.ptp(kept, axis=0) <= 1e-9 * abs(kept).max(axis=0)).any():  # constant but for rounding
        return found
    result = stats.pearsonr(*kept.T)
    found["r"], found["p"] = float(result.statistic), float(result.pvalue)
    rows = np.random.default_rng(0).integers(0, len(kept), (resamples, len(kept)))
    drawn = kept[rows] - kept[rows].mean(axis=1, keepdims=True)  # [resamples, points, 2]
    lengths = np.sqrt((drawn**2).sum(axis=1))
    varied = (lengths > 1e-9 * abs(kept).max(axis=0) * len(kept) ** 0.5).all(axis=1)  # not constant but for rounding
    drawn = (drawn[..., 0] * drawn[..., 1]).sum(axis=1)[varied] / lengths[varied].prod(axis=-1)
    drawn = drawn.clip(-1, 1)
    found["interval"] = [float(q) for q in np.quantile(drawn, [0.025, 0.975])]
    return found


def _is_complete(A, valid):
    """Whether every two nodes of the token graph are joined."""
    W = metrics.attention_graph(A, valid=valid)
    return bool((W > 0).sum() == len(W) * (len(W) - 1))


def _without_nan(point):
    """NaN, which JSON has no word for, as None."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in point.items()}


def training_correlations(points):
    """Over the models of one training run: (result of `Diagnosis`, line of metrics.jsonl) of each -> points and
    correlations of GTD and cross-layer GTD, means over layers, with held-out loss and accuracy."""
    rows = []
    for result, line in points:
        layers = result["layers"]
        rows.append(
            {
                "step": line["step"],
                "gtd": float(np.mean([row["gtd"] for row in layers])),
                # the first layer has no path down
                "cross_layer_gtd": float(np.mean([row["cross_layer_gtd"] for row in layers[1:] or layers])),
                "held_out_loss": line["held_out_loss"],
                "held_out_accuracy": line["held_out_accuracy"],
            }
        )
    pairs = [(x, y) for x in ("gtd", "cross_layer_gtd") for y in ("held_out_loss", "held_out_accuracy")]
    return {"points": rows, "correlations": [correlation(rows, x, y) for x, y in pairs]}


def attention_file(path, size):
    """How many sequences an attention file holds, and an iterator over (maps, valid) of `size` of them at a time.

    .npy and .safetensors are read piece by piece. Raises NotAttention, a ValueError, if there is no such array.
    """
    path = Path(path)
    mask = None
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            shape, read = array.shape, lambda part: np.asarray(array[:, part])
        elif path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                array, mask = _named(path, file, file.files)
            shape, read = array.shape, lambda part: array[:, part]
        elif path.suffix == ".safetensors":
            file = safe_open(path, "np")
            name, mask = _named(path, {key: key for key in file.keys()}, list(file.keys()))  # noqa: SIM118
            mask = None if mask is None else file.get_tensor(mask)
            stored = file.get_slice(name)
            if stored.get_dtype() not in ("F16", "F32", "F64"):
                raise NotAttention(f"{path}: expected float16, float32 or float64, got {stored.get_dtype()}")
            shape, read = tuple(stored.get_shape()), lambda part: stored[:, part]
        else:
            raise NotAttention(f"{path}: expected a file that ends in .npy, .npz or .safetensors")
    except NotAttention:
        raise
    except Exception as error:  # of three formats and their libraries
        raise NotAttention(f"{path} cannot be read as an array ({error})") from None
    if len(shape) != 5 or shape[-1] != shape[-2] or 0 in shape:
        raise NotAttention(f"{path}: expected shape (layers, batch, heads, L, L), got {shape}")
    if mask is not None and (mask.shape != (shape[1], shape[-1]) or mask.dtype.kind not in "biu"):
        raise NotAttention(
            f"{path}: attention_mask: expected integers or booleans of shape {(shape[1], shape[-1])}, got {mask.dtype} "
            f"of shape {mask.shape}"
        )

    def batches():
        for a in range(0, shape[1], size):
            part = slice(a, min(a + size, shape[1]))
            yield read(part), None if mask is None else mask[part].astype(bool)

    return shape[1], batches()


def _named(path, arrays, names):
    """The array named attention, or the only one, and that named attention_mask or None."""
    others = [name for name in names if name != "attention_mask"]
    if "attention" not in others and len(others) != 1:
        raise NotAttention(f"{path}: expected one array, or one named attention, got {', '.join(names) or 'none'}")
    name = "attention" if "attention" in others else others[0]
    return arrays[name], arrays["attention_mask"] if "attention_mask" in names else None
