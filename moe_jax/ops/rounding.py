"""Rounding that is right on average."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float, PRNGKey
from moe_jax.ops._hashed import hashed_bits

__all__ = ["stochastic_round"]


def stochastic_round(x: Float[Array, "*B"], key: PRNGKey) -> Float[Array, "*B"]:
    """Rounds float32 to bfloat16, up or down by chance so that the mean is kept.

    A running mean in bfloat16 that is rounded to nearest stands still as soon as its steps are
    less than half of the last bit (Gupta et al. 2015, "Deep learning with limited numerical
    precision", section 3). The chance comes from a hash of the key and the entry's place.

    Args:
        x: [...] float32.
        key: decides.

    Returns:
        [...] bfloat16; one of the two neighbours of each entry. Infinities and NaN stay.

    Raises:
        ValueError: `x` is not float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = stochastic_round(jnp.full(1000, 1.001), jax.random.key(0)).astype(jnp.float32)
        >>> sorted(set(x.tolist())), bool(abs(x.mean() - 1.001) < 2e-4)
        ([1.0, 1.0078125], True)
    """
    if x.dtype != jnp.float32:
        raise ValueError(f"x must be float32, got {x.dtype}")
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = hashed_bits(x.shape, jax.random.bits(key, (2,))) >> 16
    # The upper half of a float32 is a bfloat16; a carry from the lower rounds away from zero.
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
