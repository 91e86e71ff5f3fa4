"""Where the first true entries of a mask are."""

import jax.numpy as jnp

from moe_jax._types import Array, Bool, Int

__all__ = ["first_true"]


def first_true(mask: Bool[Array, "N"], count: int) -> Int[Array, "R"]:
    """Where the first true entries of a mask are, N where there are fewer.

    What `jnp.nonzero(mask, size=count, fill_value=N)` gives. That one adds every entry to a
    histogram, where a GPU's threads queue up for one address if many entries in a row are false.

    Args:
        mask: bool [N].
        count: R.

    Returns:
        int32 [R], ascending.

    Example:
        >>> first_true(jnp.array([False, True, True]), 4).tolist()
        [1, 2, 3, 3]
    """
    size = mask.shape[0]
    rank = jnp.cumsum(mask, dtype=jnp.int32)
    if count * size.bit_length() < size:
        wanted = jnp.arange(1, count + 1, dtype=jnp.int32)
        return jnp.searchsorted(rank, wanted, method="scan_unrolled").astype(jnp.int32)
    place = jnp.where(mask, rank - 1, count)
    return jnp.full(count, size, jnp.int32).at[place].set(jnp.arange(size), mode="drop")
