"""Dropout whose mask is a hash of key and place: cheap enough to be made again, never stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax._types import Array, Float, PRNGKey, UInt32
from moe_jax.ops._hashed import hashed_bits

__all__ = ["dropout"]


def dropout(x: Float[Array, "*B"], rate: float, key: PRNGKey) -> Float[Array, "*B"]:
    """Zeroes each entry with probability `rate` and scales the others by 1 / (1 - rate).

    Srivastava et al. (2014). Which entries, is a hash of the key and the entry's place, which fuses
    with what makes `x`; the gradient makes the mask again.

    Args:
        x: [...].
        rate: probability of zero, in [0, 1).
        key: decides which; the same key gives the same mask for the same shape.

    Returns:
        [...], of the same dtype.

    Raises:
        ValueError: `rate` is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = dropout(jnp.ones((64, 64)), 0.25, jax.random.key(0))
        >>> sorted(set(x.ravel().tolist())), round(float(x.mean()), 1)
        ([0.0, 1.3333333730697632], 1.0)
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    return _drop(x, jax.random.bits(key, (2,)), rate) if rate else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x: Float[Array, "*B"], seed: UInt32[Array, "2"], rate: float) -> Float[Array, "*B"]:
    is_kept = hashed_bits(x.shape, seed) >= jnp.uint32(round(rate * 2**32))
    scale = jnp.asarray(1 / (1 - rate), x.dtype)
    return jnp.where(is_kept, x * scale, jnp.zeros((), x.dtype))


def _drop_fwd(x, seed, rate):
    return _drop(x, seed, rate), seed


def _drop_bwd(rate, seed, grad):
    # Held apart, or the compiler would rather store the mask of the first pass.
    seed = jax.lax.optimization_barrier(seed)
    return _drop(grad, seed, rate), np.zeros(seed.shape, jax.dtypes.float0)


_drop.defvjp(_drop_fwd, _drop_bwd)
