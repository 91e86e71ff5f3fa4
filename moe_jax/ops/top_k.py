"""Exact top-k in two stages, for long rows."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array

__all__ = ["top_k"]


def top_k(x: Array, k: int, chunk_size: int = 4096) -> tuple[Array, Array]:
    """The k largest entries along the last axis, best first, ties to the lower index.

    Values and indices equal those of `jax.lax.top_k`, ties included. Rows longer than
    `chunk_size` are first reduced to the top k of each chunk, which is much faster on GPUs, where
    `jax.lax.top_k` sorts the whole row when k is above 16 or the rank is not 2.

    Args:
      x: [..., N], a float or integer dtype.
      k: how many to return, between 0 and N.
      chunk_size: length of a chunk of the first stage, at least 1.

    Returns:
      (values [..., k] of x's dtype, indices [..., k] int32).

    Raises:
      ValueError: if k or chunk_size is out of range.

    Example:
      >>> values, indices = top_k(jnp.array([1.0, 3.0, 2.0, 3.0]), 2, chunk_size=2)
      >>> indices.tolist()
      [1, 3]
    """
    size = x.shape[-1]
    if not 0 <= k <= size:
        raise ValueError(f"k must be between 0 and {size}, the length of the last axis, got {k}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if k == 0 or size <= chunk_size or k >= chunk_size:
        values, indices = jax.lax.top_k(x, k)
        return values, indices
    lead = x.shape[:-1]
    num_chunks = -(-size // chunk_size)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    lowest = -jnp.inf if is_float else jnp.iinfo(x.dtype).min
    # Padding sits after every real entry, so it loses all ties and is never returned.
    padding = [(0, 0)] * len(lead) + [(0, num_chunks * chunk_size - size)]
    x = jnp.pad(x, padding, constant_values=lowest)
    # Two axes, since the fast GPU path of lax.top_k wants rank 2.
    values, indices = jax.lax.top_k(x.reshape(-1, chunk_size), k)
    offset = (jnp.arange(values.shape[0], dtype=jnp.int32) % num_chunks) * chunk_size
    indices = indices + offset[:, None]
    # Chunks are in order and each is sorted, so among equal values lower indices come first.
    values, where = jax.lax.top_k(values.reshape(-1, num_chunks * k), k)
    indices = jnp.take_along_axis(indices.reshape(-1, num_chunks * k), where, axis=-1)
    return values.reshape(*lead, k), indices.reshape(*lead, k)
