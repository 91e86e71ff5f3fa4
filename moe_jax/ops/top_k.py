"""Exact top-k of long rows, reading them once."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array

__all__ = ["top_k"]


def top_k(x: Array, k: int, chunk_size: int | None = None) -> tuple[Array, Array]:
    """The k largest entries along the last axis, best first, ties to the lower index.

    Values and indices equal those of `jax.lax.top_k`, ties included, except that in long rows
    zeros of either sign may count as equal. The k chunks with the largest maxima hold the k
    largest entries: whatever lies in another chunk has k maxima ahead of it. So a long row is
    read once, for its chunks' maxima, and only k chunks of it are searched; on GPUs
    `jax.lax.top_k` takes many times longer, and sorts the whole row when k is above 16. Callers
    may use any part of what is returned: where they use `jax.lax.top_k` so, XLA on CPUs may sort
    whole rows.

    Args:
      x: [..., N], a float or integer dtype.
      k: how many to return, between 0 and N.
      chunk_size: length of a chunk, at least 1; by default 32 on GPUs, and no chunks elsewhere,
        where `jax.lax.top_k` itself reads the row once.

    Returns:
      (values [..., k] of x's dtype, indices [..., k] int32).

    Raises:
      ValueError: if k or chunk_size is out of range.

    Example:
      >>> values, indices = top_k(jnp.array([1.0, 3.0, 2.0, 3.0, 0.0]), 2, chunk_size=2)
      >>> indices.tolist()
      [1, 3]
    """
    size = x.shape[-1]
    if not 0 <= k <= size:
        raise ValueError(f"k must be between 0 and {size}, the length of the last axis, got {k}")
    if chunk_size is None:
        chunk_size = 32 if jax.default_backend() == "gpu" else size + 1
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if k == 0 or k * chunk_size >= size:
        return _kept_apart(*jax.lax.top_k(x, k))
    lead = x.shape[:-1]
    num_chunks = -(-size // chunk_size)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    lowest = -jnp.inf if is_float else jnp.iinfo(x.dtype).min
    # Padding sits after every real entry, so it loses all ties and is never returned.
    padding = [(0, 0)] * len(lead) + [(0, num_chunks * chunk_size - size)]
    x = jnp.pad(x, padding, constant_values=lowest).reshape(-1, num_chunks, chunk_size)
    # Rank 2, which the fast GPU path of lax.top_k wants; ties of maxima go to the lower chunk.
    _, chunk = jax.lax.top_k(jnp.max(x, axis=2), k)
    # Back in the row's order, so that among equal values lower indices come first.
    chunk = jnp.sort(chunk, axis=1)[:, :, None]
    index = chunk * chunk_size + jnp.arange(chunk_size, dtype=jnp.int32)[None, None]
    found = jnp.take_along_axis(x, chunk, axis=1).reshape(-1, k * chunk_size)
    values, where = jax.lax.top_k(found, k)
    indices = jnp.take_along_axis(index.reshape(found.shape), where, axis=1)
    return _kept_apart(values.reshape(*lead, k), indices.reshape(*lead, k))


def _kept_apart(values: Array, indices: Array) -> tuple[Array, Array]:
    """Keeps XLA on CPUs from moving a caller's slice into the top-k, which makes it a full sort."""
    # One barrier each: XLA fails on one around both when the rows are sharded.
    return jax.lax.optimization_barrier(values), jax.lax.optimization_barrier(indices)
