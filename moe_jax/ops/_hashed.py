"""Cheap bits that depend on a seed and a place, for decisions that need no better ones."""

import math

import jax
import jax.numpy as jnp

from moe_jax._types import Array, UInt32

__all__ = ["hashed_bits"]


def hashed_bits(shape: tuple[int, ...], seed: UInt32[Array, "2"]) -> UInt32[Array, "*B"]:
    """Mixes each entry's place with 64 bits of a seed: multiply and fold.

    A dozen integer operations, which fuse with what uses the bits, where Threefry would be the
    longer part of it; the constants are those of "lowbias32".

    Args:
        shape: of the result. Places from 2^32 on repeat, further apart than anything that meets
            them.
        seed: bits of a key.

    Returns:
        uint32 of the shape; the upper half of the bits is the better one.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        if size > 1:
            step = math.prod(shape[axis + 1 :]) % 2**32
            place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(step)
    x = place * jnp.uint32(0x9E3779B9) + seed[0]
    x ^= x >> 16
    x *= jnp.uint32(0x7FEB352D)
    x ^= seed[1]
    x ^= x >> 15
    return x * jnp.uint32(0x846CA68B)
