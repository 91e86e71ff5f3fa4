"""The tanh form of GELU, as kernels and XLA both compute it."""

import math
from collections.abc import Callable

from moe_jax._types import Array

__all__ = ["CUBIC", "SCALE", "gelu_tanh"]

SCALE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def gelu_tanh(x: Array, sigmoid: Callable[[Array], Array]) -> Array:
    """0.5 x (1 + tanh(u)) as x sigmoid(2 u), which takes fewer operations."""
    return x * sigmoid(SCALE * x * (1 + CUBIC * x * x))
