"""What a model is made of: its sizes and its attention, under Hugging Face's keys where they have one."""

import dataclasses
import math
import numbers

from ..bp.refinement import MAX_LAM, VARIANTS

# attention that gives up one principle of the original (Xue, Moosavi & Aletras, arXiv 2510.11602): `attention.py`
MIXINGS = ("none", "uniform", "fixed", "static", "linear")
REGULARISERS = ("entropy", "eigen")
HEAD_NAMES = ("lm", "none", "classification", "regression", "multiple_choice", "span")


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a BERT-style encoder ("bert") or a GPT-2-style decoder ("gpt2"), the attention of its layers, its head.

    attention_variant and lam are one value, or a list with one per layer: the original attention, its refinements
    (bp.refinement.VARIANTS) and its simplifications (MIXINGS) make any hybrid. learn_lam: None for a fixed lambda,
    "layer" or "head" for one that is trained, from `lam` on, for every refined layer or for each of its heads. The
    embedding of pad_token_id takes no gradient where it is read (as the output table of a tied decoder it does), which
    is Hugging Face's convention; "gpt2" has none, so there it is always None. Dropout acts in training alone.

    regulariser: "entropy" or "eigen" for a penalty of `regularisers.py` that every training adds to its loss,
    regulariser_strength times.

    head: "lm" is the language model, masked for "bert" and causal for "gpt2", which has no other; "none" the encoder
    with its pooler; the others read the pooler, "span" every token. num_labels: classes, or numbers of a regression.
    """

    vocab_size: int
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    attention_variant: str | list = "original"
    lam: float | list = 0.2
    learn_lam: str | None = None
    regulariser: str | None = None
    regulariser_strength: float = 0.0
    model_type: str = "bert"
    head: str = "lm"
    num_labels: int = 2

    def __post_init__(self):
        for name in [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "num_labels",
        ]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not 1 <= value < 2**31:
                raise ValueError(f"{name}: expected a whole number from 1 to 2**31 - 1, got {value!r}")
            object.__setattr__(self, name, int(value))  # of NumPy's kinds, which JSON does not know
        for name in ["layer_norm_eps", "initializer_range"]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
                raise ValueError(f"{name}: expected a number above 0 and below 1, got {value!r}")
        if self.model_type not in ("bert", "gpt2"):
            raise ValueError(f"model_type: expected bert or gpt2, got {self.model_type!r}")
        if self.model_type == "gpt2":
            object.__setattr__(self, "pad_token_id", None)
        heads = HEAD_NAMES if self.model_type == "bert" else HEAD_NAMES[:1]
        if self.head not in heads:
            raise ValueError(f"head: expected one of {', '.join(heads)} for {self.model_type}, got {self.head!r}")
        for name in ["hidden_dropout_prob", "attention_probs_dropout_prob"]:
            rate = getattr(self, name)
            if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not 0 <= rate < 1:
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {rate!r}")
        pad = self.pad_token_id
        if pad is not None and (
            isinstance(pad, bool) or not isinstance(pad, numbers.Integral) or not 0 <= pad < self.vocab_size
        ):
            raise ValueError(f"pad_token_id: expected null or 0..{self.vocab_size - 1}, got {pad!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size = {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        for variant in self.variants:
            if variant not in VARIANTS + MIXINGS:
                expected = ", ".join(VARIANTS + MIXINGS)
                raise ValueError(f"attention_variant: expected one of {expected}, got {variant!r}")
        for lam in self.lams:
            if isinstance(lam, bool) or not isinstance(lam, numbers.Real) or not abs(lam) <= MAX_LAM:
                raise ValueError(f"lam: expected a finite number with |lam| <= {MAX_LAM:g}, got {lam!r}")
            if not math.isfinite(lam):
                raise ValueError(f"lam: expected a finite number, got {lam!r}")
        if self.learn_lam not in (None, "layer", "head"):
            raise ValueError(f"learn_lam: expected null, layer or head, got {self.learn_lam!r}")
        if self.learn_lam and not any(self.learned_lams):
            raise ValueError(f"learn_lam: expected a layer of variant high or low, got {self.attention_variant!r}")
        if self.regulariser not in (None, *REGULARISERS):
            expected = f"null, {' or '.join(REGULARISERS)}"
            raise ValueError(f"regulariser: expected {expected}, got {self.regulariser!r}")
        if self.regulariser and not self.regularised:
            raise ValueError(f"regulariser: expected a layer that it can change, got {self.attention_variant!r}")
        strength = self.regulariser_strength
        expected = "a finite number above 0" if self.regulariser else "0 without a regulariser"
        number = not isinstance(strength, bool) and isinstance(strength, numbers.Real)
        if not number or not (0 < strength < math.inf if self.regulariser else strength == 0):
            raise ValueError(f"regulariser_strength: expected {expected}, got {strength!r}")

    @property
    def variants(self):
        """The attention variant of every layer."""
        return self._per_layer("attention_variant")

    @property
    def lams(self):
        """lambda of every layer."""
        return self._per_layer("lam")

    @property
    def learned_lams(self):
        """How many lambdas every layer learns: 0, 1 or one per head. Only a Potts factor has any."""
        count = {None: 0, "layer": 1, "head": self.num_attention_heads}[self.learn_lam]
        return [count if variant in ("high", "low") else 0 for variant in self.variants]

    @property
    def projections(self):
        """How many linear maps the attention of every layer has: 3 for queries, keys and values, 1 for values alone."""
        return [1 if variant in ("none", "uniform", "fixed") else 3 for variant in self.variants]

    def own_shapes(self, n):
        """{name: shape} of what the attention of layer n has of its own, beside linear maps."""
        shapes = {}
        if self.learned_lams[n]:
            shapes["lam"] = (self.learned_lams[n],)
        if self.variants[n] == "fixed":
            shapes["scores"] = (self.num_attention_heads, *[self.max_position_embeddings] * 2)
        if self.regulariser == "entropy" and n in self.regularised:
            shapes["theta"] = (self.num_attention_heads,)
        return shapes

    @property
    def regularised(self):
        """Numbers of the layers that the regulariser can change: an attention that is learned, or queries and keys."""
        fixed = {"entropy": ("none", "uniform"), "eigen": ("none", "uniform", "fixed")}[self.regulariser]
        return [n for n, variant in enumerate(self.variants) if variant not in fixed]

    def _per_layer(self, name):
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            return [value] * self.num_hidden_layers
        if len(value) != self.num_hidden_layers:
            raise ValueError(f"{name}: expected {self.num_hidden_layers} values, one per layer, got {len(value)}")
        return list(value)


# Table 4 and Appendix C: layers, width, heads, feed-forward width, and the paper's lambda for that size
_SIZES = {
    "mini": (4, 256, 4, 1024, 0.2),
    "small": (4, 512, 8, 2048, 0.08),
    "medium": (8, 512, 8, 2048, 0.05),
}
PRESETS = tuple(f"{kind}-{size}" for kind in ("bert", "gpt2") for size in _SIZES)


def preset(name, vocab_size=None, **changes):
    """The Config of a model of the paper: bert-mini, bert-small, bert-medium, gpt2-mini, gpt2-small, gpt2-medium.

    The vocabulary is that of the original BERT (30,522) or GPT-2 (50,257) unless given; any other field of Config can
    be changed by name. Raises ValueError for a name that is not one of these.

    >>> preset("bert-small").hidden_size, preset("gpt2-mini", attention_variant="high").lam
    (512, 0.2)
    """
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    kind, size = name.split("-")
    layers, width, heads, feed_forward, lam = _SIZES[size]
    described = {
        "vocab_size": {"bert": 30522, "gpt2": 50257}[kind] if vocab_size is None else vocab_size,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": feed_forward,
        "lam": lam,
        "model_type": kind,
    }
    if kind == "gpt2":
        described |= {"max_position_embeddings": 1024, "layer_norm_eps": 1e-5, "pad_token_id": None}
    return Config(**described | changes)
