"""Sums of rows by group, the same bits every time."""

import functools

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float, Int

__all__ = ["group_sums"]

# So many (row, group) pairs are held at once: 64 MiB of float32.
_PAIRS_AT_ONCE = 2**24


@functools.partial(jax.jit, static_argnums=(3,))
def group_sums(
    x: Float[Array, "N D"], group: Int[Array, "N"], weight: Float[Array, "N"], num_groups: int
) -> Float[Array, "L D"]:
    """The weighted sum of the rows of each group.

    By one-hot matmuls over chunks of rows, in order, because adding floats with a scatter depends
    on the order of threads on GPUs.

    Args:
      x: float32 [N, D].
      group: int32 [N]; rows whose group is out of range are left out.
      weight: float32 [N].
      num_groups: L, at least 1.

    Returns:
      float32 [L, D].

    Example:
      >>> group_sums(jnp.eye(2), jnp.array([1, 1]), jnp.array([1.0, 3.0]), 2).tolist()
      [[0.0, 0.0], [1.0, 3.0]]
    """
    rows = x.shape[0]
    size = max(1, min(rows, _PAIRS_AT_ONCE // num_groups))

    def one(i: Array, sums: Array) -> Array:
        start = jnp.minimum(i * size, rows - size)
        own = jax.lax.dynamic_slice_in_dim(group, start, size)
        share = jax.lax.dynamic_slice_in_dim(weight, start, size)
        # The last chunk reaches back over rows that were counted before.
        share = jnp.where(start + jnp.arange(size) >= i * size, share, 0.0)
        member = jnp.where(own[:, None] == jnp.arange(num_groups)[None], share[:, None], 0.0)
        part = jax.lax.dynamic_slice_in_dim(x, start, size)
        return sums + jnp.matmul(member.T, part, precision=jax.lax.Precision.HIGHEST)

    none = jnp.zeros((num_groups, x.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, -(-rows // size), one, none) if rows else none
