"""What a model is made of: its sizes and its attention, under Hugging Face's keys where they have one."""

import dataclasses
import math
import numbers

from ..bp.refinement import MAX_LAM, VARIANTS


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a BERT-style encoder ("bert") or a GPT-2-style decoder ("gpt2") and the attention of its layers.

    attention_variant and lam are one value, or a list with one per layer. The embedding of pad_token_id takes no
    gradient where it is read (as the output table of a tied decoder it does), which is Hugging Face's convention.
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
    attention_variant: str | list = "original"
    lam: float | list = 0.2
    model_type: str = "bert"

    def __post_init__(self):
        for name in [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"{name}: expected a whole number >= 1, got {value!r}")
        if self.model_type not in ("bert", "gpt2"):
            raise ValueError(f"model_type: expected bert or gpt2, got {self.model_type!r}")
        pad = self.pad_token_id
        if pad is not None and (not isinstance(pad, numbers.Integral) or not 0 <= pad < self.vocab_size):
            raise ValueError(f"pad_token_id: expected null or 0..{self.vocab_size - 1}, got {pad!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size = {self.hidden_size}, "
                f"got {self.num_attention_heads}"
            )
        for variant in self.variants:
            if variant not in VARIANTS:
                raise ValueError(f"attention_variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        for lam in self.lams:
            if isinstance(lam, bool) or not isinstance(lam, numbers.Real) or not abs(lam) <= MAX_LAM:
                raise ValueError(f"lam: expected a finite number with |lam| <= {MAX_LAM:g}, got {lam!r}")
            if not math.isfinite(lam):
                raise ValueError(f"lam: expected a finite number, got {lam!r}")

    @property
    def variants(self):
        """The attention variant of every layer."""
        return self._per_layer("attention_variant")

    @property
    def lams(self):
        """lambda of every layer."""
        return self._per_layer("lam")

    def _per_layer(self, name):
        value = getattr(self, name)
        if not isinstance(value, (list, tuple)):
            return [value] * self.num_hidden_layers
        if len(value) != self.num_hidden_layers:
            raise ValueError(f"{name}: expected {self.num_hidden_layers} values, one per layer, got {len(value)}")
        return list(value)
