"""Vectors in eight bits a coordinate, for a first pass over many of them."""

import jax.numpy as jnp

from moe_jax._types import Array, Float, Int

__all__ = ["encode"]


def encode(x: Float[Array, "*N D"]) -> tuple[Int[Array, "*N D"], Float[Array, "*N"]]:
    """Round vectors to int8, each to its own scale, so that the largest coordinate is 127.

    Args:
      x: float32 [..., D].

    Returns:
      (code int8 [..., D], scale float32 [...]) with x about code * scale, off by at most half a
      scale in each coordinate; both zero for a zero vector.

    Example:
      >>> code, scale = encode(jnp.array([0.6, -0.8]))
      >>> code.tolist(), round(float(scale), 4)
      ([95, -127], 0.0063)
    """
    scale = jnp.max(jnp.abs(x), axis=-1) / 127.0
    code = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return code.astype(jnp.int8), scale
