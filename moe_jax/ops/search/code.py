"""Vectors in eight bits a coordinate, for a first pass over many of them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float, Int

__all__ = ["Code", "encode"]

_STEPS = 2.0**14


class Code(NamedTuple):
    """Vectors rounded to eight bits.

    Attributes:
      code: int8 [..., D].
      scale: float32 [...], so that the vector is about code * scale.
      error: float32 [...], at least the length of the difference.
    """

    code: Int[Array, "*N D"]
    scale: Float[Array, "*N"]
    error: Float[Array, "*N"]


def encode(x: Float[Array, "*N D"]) -> Code:
    """Round vectors to int8, each to its own scale, so that the largest coordinate is about 127.

    Args:
      x: float32 [..., D], each entry in [-1, 1].

    Returns:
      The `Code`, zero for a zero vector.

    Example:
      >>> code = encode(jnp.array([0.6, -0.8]))
      >>> code.code.tolist(), round(float(code.scale), 4)
      ([95, -127], 0.0063)
    """
    # Every step gives the same bits in every shape and program. A scale of nine bits times a code
    # of eight is exact, so it does not matter whether the product is fused into the difference.
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scale = jax.lax.reduce_precision(largest * (1.003 / 127.0), exponent_bits=8, mantissa_bits=8)
    # Nor does it matter how a device divides: none of the 256 quotients is near a rounding point.
    inverse = 1.0 / jnp.maximum(scale, 1e-30)
    inverse = jax.lax.reduce_precision(inverse, exponent_bits=8, mantissa_bits=12)
    code = jnp.round(x * inverse)
    # Lengths are measured in whole steps: their squares add up exactly in any order, and no
    # rounding is left that a fused multiply-add could change.
    steps = jnp.round((x - code * scale) * _STEPS).astype(jnp.int32)
    squares = jnp.sum(steps * steps, axis=-1, dtype=jnp.int32).astype(jnp.float32)
    most = jnp.floor(jnp.sqrt(squares)) + (1.0 + math.ceil(0.5 * x.shape[-1] ** 0.5))
    error = most * (1.0 / _STEPS)
    is_zero = scale[..., 0] == 0
    return Code(code.astype(jnp.int8), scale[..., 0], jnp.where(is_zero, 0.0, error))
