"""Groups of consecutive rows, laid out so that no block of 64 rows belongs to two of them."""

from typing import NamedTuple

import jax.numpy as jnp

from moe_jax._types import Array, Bool, Int

BLOCK = 64
"""Rows of a block: each group starts at a multiple of it."""


class Groups(NamedTuple):
    """E groups of consecutive rows among R, each from a multiple of 64 on.

    Rows of no group, at the end of a group's last block or after the last group, are padding.

    Attributes:
        start: [E] int32, first row.
        size: [E] int32, rows; the group's own, without padding.
        block_group: [R / 64] int32, the group of each block of 64 rows; E where there is none.
    """

    start: Int[Array, "E"]
    size: Int[Array, "E"]
    block_group: Int[Array, "I"]

    @property
    def num_rows(self) -> int:
        """R."""
        return self.block_group.shape[0] * BLOCK

    @property
    def num_groups(self) -> int:
        """E."""
        return self.size.shape[0]

    @property
    def num_blocks(self) -> Int[Array, "E"]:
        """[E] int32, blocks of each group."""
        return -(-self.size // BLOCK)


def padded_rows(num_rows: int, num_groups: int) -> int:
    """R that holds `num_rows` rows however they are spread over the groups."""
    # No more groups than rows have any, and each of those fills its last block in part.
    return (num_rows + min(num_rows, num_groups) * (BLOCK - 1)) // BLOCK * BLOCK


def make_groups(size: Int[Array, "E"], num_rows: int) -> Groups:
    """Lays out groups of the given sizes.

    Args:
        size: [E] int32, rows of each group; their sum is at most `num_rows`.
        num_rows: the most rows that there can be, known before compilation.

    Returns:
        The layout, of `padded_rows(num_rows, E)` rows.

    Example:
        >>> import jax.numpy as jnp
        >>> make_groups(jnp.array([3, 0, 65]), 68).start.tolist()
        [0, 64, 64]
    """
    size = size.astype(jnp.int32)
    num_blocks = -(-size // BLOCK)
    last = jnp.cumsum(num_blocks)
    block = jnp.arange(padded_rows(num_rows, size.shape[0]) // BLOCK, dtype=jnp.int32)
    group = first_above(last, block)
    return Groups(start=(last - num_blocks) * BLOCK, size=size, block_group=group)


def first_above(ascending: Int[Array, "E"], value: Int[Array, "I"]) -> Int[Array, "I"]:
    """Where the first entry lies that is larger than a value, by comparing all.

    Args:
        ascending: [E] int32.
        value: [I] int32.

    Returns:
        [I] int32; E where there is none.
    """
    # A search in halves is a loop of small launches on a GPU; this is a single one.
    return jnp.searchsorted(ascending, value, side="right", method="compare_all").astype(jnp.int32)


def group_of_rows(groups: Groups) -> Int[Array, "R"]:
    """The group that each row's block belongs to; E for none.

    Args:
        groups: the layout.

    Returns:
        [R] int32.
    """
    return jnp.repeat(groups.block_group, BLOCK)


def is_row(groups: Groups) -> Bool[Array, "R"]:
    """Which rows are a group's own, and not padding.

    Args:
        groups: the layout.

    Returns:
        [R] bool.

    Example:
        >>> import jax.numpy as jnp
        >>> int(is_row(make_groups(jnp.array([3, 0, 65]), 68)).sum())
        68
    """
    group = group_of_rows(groups)
    end = jnp.append(groups.start + groups.size, 0)
    return jnp.arange(groups.num_rows, dtype=jnp.int32) < end[group]
