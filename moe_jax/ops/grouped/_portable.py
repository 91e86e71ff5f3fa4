"""Grouped matmuls in plain XLA, on any device.

Where no group is much larger than the mean, groups are gathered into buffers of one capacity and
multiplied in one batched matmul; a few capacities are compiled and the smallest that holds the
largest group is taken at run time. Where none does, a loop goes over blocks of 64 rows. Where there
are half as many blocks as groups, as in decoding, the loop comes first, since it reads the matrices
of those groups only that have rows; if none has more than 8, of each block it takes the first 8.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float, Int
from moe_jax.ops.grouped.groups import BLOCK, Groups, is_row

_OVER_THE_MEAN = (1.25, 2.0, 4.0)
_FEW = 8


def rows_by_matrices(
    x: Float[Array, "R I"], w: Float[Array, "E I J"], groups: Groups
) -> Float[Array, "R J"]:
    """Row r of group e times w[e]; zero in padding."""

    def padded(capacity: int) -> Array:
        buffer, row = _buffers(x, groups, capacity)
        out = jnp.einsum("eci,eij->ecj", buffer, w, preferred_element_type=jnp.float32)
        nothing = jnp.zeros((groups.num_rows, w.shape[2]), x.dtype)
        return nothing.at[row].set(out.astype(x.dtype), mode="drop")

    def by_blocks(height: int) -> Array:
        def one(block: tuple[Array, Array]) -> Array:
            rows, group = block
            out = jnp.dot(rows, w[group], preferred_element_type=jnp.float32).astype(x.dtype)
            return jnp.pad(out, ((0, BLOCK - height), (0, 0)))

        # A block of no group takes the last matrix, and its rows are masked below.
        blocks = x.reshape(-1, BLOCK, x.shape[1])[:, :height]
        out = jax.lax.map(one, (blocks, groups.block_group)).reshape(groups.num_rows, -1)
        return jnp.where(is_row(groups)[:, None], out, 0)

    return _smallest(groups, padded, by_blocks)


def rows_by_rows(
    x: Float[Array, "R I"], y: Float[Array, "R J"], groups: Groups
) -> Float[Array, "E I J"]:
    """The sum over the rows r of group e of the outer products of x[r] and y[r]."""

    def padded(capacity: int) -> Array:
        left, right = (_buffers(a, groups, capacity)[0] for a in (x, y))
        out = jnp.einsum("eci,ecj->eij", left, right, preferred_element_type=jnp.float32)
        return out.astype(x.dtype)

    def by_blocks(height: int) -> Array:
        counts = is_row(groups)[:, None]
        left, right = (
            jnp.where(counts, a, 0).reshape(-1, BLOCK, a.shape[1])[:, :height] for a in (x, y)
        )

        def add(sums: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
            a, b, group = block
            part = jnp.einsum("ri,rj->ij", a, b, preferred_element_type=jnp.float32)
            return sums.at[group].add(part, mode="drop"), None

        nothing = jnp.zeros((groups.num_groups, x.shape[1], y.shape[1]), jnp.float32)
        return jax.lax.scan(add, nothing, (left, right, groups.block_group))[0].astype(x.dtype)

    return _smallest(groups, padded, by_blocks)


def _smallest(
    groups: Groups, padded: Callable[[int], Array], by_blocks: Callable[[int], Array]
) -> Array:
    """Runs what does the least work for the largest group: a buffer or blocks of some height."""
    largest, num_blocks = jnp.max(groups.size), groups.block_group.shape[0]
    if 2 * num_blocks <= groups.num_groups:
        return jax.lax.cond(largest <= _FEW, lambda: by_blocks(_FEW), lambda: by_blocks(BLOCK))
    mean = groups.num_rows / groups.num_groups
    capacities = sorted({-(-int(factor * mean) // BLOCK) * BLOCK for factor in _OVER_THE_MEAN})
    if num_blocks <= groups.num_groups:
        capacities = [_FEW, *capacities]
    # A buffer for all rows in every group is never needed: blocks are less work.
    capacities = [c for c in capacities if c < groups.num_rows] or [groups.num_rows]
    fits = jnp.searchsorted(jnp.array(capacities), largest)
    branches = [lambda c=c: padded(c) for c in capacities]
    return jax.lax.switch(fits, [*branches, lambda: by_blocks(BLOCK)])


def _buffers(
    x: Float[Array, "R I"], groups: Groups, capacity: int
) -> tuple[Float[Array, "E C I"], Int[Array, "E C"]]:
    """Each group's rows in a buffer, zero where it has no more, and the rows they came from."""
    place = jnp.arange(capacity, dtype=jnp.int32)[None]
    row = groups.start[:, None] + place
    row = jnp.where(place < groups.size[:, None], row, groups.num_rows)
    return x.at[row].get(mode="fill", fill_value=0), row
