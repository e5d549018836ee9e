"""The autograd-free transformer: every operation a forward and a backward function, side by side."""

from .config import Config
from .model import Bert
from .parameters import Parameters

__all__ = ["Bert", "Config", "Parameters"]
