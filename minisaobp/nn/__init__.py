"""The autograd-free transformer: every operation a forward and a backward function, side by side."""

from .config import PRESETS, Config, preset
from .model import Bert, Gpt2, from_pretrained
from .parameters import Parameters

__all__ = ["PRESETS", "Bert", "Config", "Gpt2", "Parameters", "from_pretrained", "preset"]
