"""Vectors in eight bits a coordinate, for a first pass over many of them."""

from typing import NamedTuple

import jax.numpy as jnp

from moe_jax._types import Array, Float, Int

__all__ = ["Code", "encode"]


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
    """Round vectors to int8, each to its own scale, so that the largest coordinate is 127.

    Args:
      x: float32 [..., D].

    Returns:
      The `Code`, zero for a zero vector.

    Example:
      >>> code = encode(jnp.array([0.6, -0.8]))
      >>> code.code.tolist(), round(float(code.scale), 4)
      ([95, -127], 0.0063)
    """
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    code = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    rest = x - code * scale[..., None]
    # The sum of squares may round down.
    error = jnp.sqrt(jnp.sum(rest * rest, axis=-1)) * 1.001
    return Code(code.astype(jnp.int8), scale, error)
