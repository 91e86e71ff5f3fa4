"""Which keys of a graph changed, and those keys on the host, without copying all of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt

from moe_jax._types import Array, Float, Int

__all__ = ["fingerprint", "rows"]


@jax.jit
def fingerprint(key: Float[Array, "N D"]) -> UInt[Array, "N 2"]:
    """Two words from the bits of each key, by the mixing steps of MurmurHash3's finaliser.

    Args:
      key: float32 [N, D].

    Returns:
      uint32 [N, 2]; keys of other bits differ in it but for a chance of about 2**-32 at most.

    Example:
      >>> marks = fingerprint(jnp.array([[1.0, 0.0], [1.0, -0.0], [1.0, 0.0]]))
      >>> bool((marks[0] == marks[2]).all()), bool((marks[0] == marks[1]).all())
      (True, False)
    """
    lanes = 16  # summing over an axis that is not the last one vectorises on CPUs
    bits = jax.lax.bitcast_convert_type(key, jnp.uint32)
    bits = jnp.pad(bits, ((0, 0), (0, -bits.shape[1] % lanes)))
    salt = jnp.arange(1, bits.shape[1] + 1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = _mixed(bits ^ salt[None]).reshape(bits.shape[0], -1, lanes)
    lane = jnp.sum(bits, axis=1, dtype=jnp.uint32)
    salts = jnp.arange(1, 2 * lanes + 1, dtype=jnp.uint32).reshape(1, 2, lanes)
    words = _mixed(lane[:, None] ^ (salts * jnp.uint32(0x85EBCA77)))
    return jnp.sum(words, axis=-1, dtype=jnp.uint32)


def _mixed(x: UInt[Array, "*N"]) -> UInt[Array, "*N"]:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    return (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)


def rows(key: Float[Array, "N D"] | np.ndarray, at: np.ndarray) -> np.ndarray:
    """Some rows on the host; from another device only about those are copied."""
    num_nodes = key.shape[0]
    is_host = not isinstance(key, jax.Array) or next(iter(key.devices())).platform == "cpu"
    padded = 1 << max(len(at) - 1, 0).bit_length()  # so that few programs are compiled
    if is_host or padded >= num_nodes:
        return np.asarray(key)[at]
    index = np.zeros(padded, np.int32)
    index[: len(at)] = at
    return np.asarray(_take(key, index))[: len(at)]


@jax.jit
def _take(key: Float[Array, "N D"], at: Int[Array, "R"]) -> Float[Array, "R D"]:
    return key[at]
