"""Kernels of the search by codes on NVIDIA GPUs; `_codes_gpu` says what each is for."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array
from moe_jax.ops._hardware import triton as plgpu
from moe_jax.ops.search._kernel_parts import (
    Found,
    code_of,
    direction,
    load_queries,
    score_and_store,
    step_of,
    unit_of,
)
from moe_jax.ops.search._kernel_picks import (
    chunk_of,
    largest,
    largest_chunks,
    largest_within,
    row_of,
)

__all__ = [
    "CHUNK", "TILE", "chunk_bounds_kernel", "encode_kernel", "longest_code", "select_kernel",
]  # fmt: skip

TILE = 128
"""Rows of codes that one program multiplies."""

CHUNK = 16
"""Rows that share a bound, by which they are picked."""

_GROUP = 512  # rows that a query's program scores at a time, _STEP coordinates in one go
_STEP = 128


def encode_kernel(query_ref, code_ref, scale_ref):
    """One query's code and scale; zeros past the last query."""
    at, dim = pl.program_id(0), code_ref.shape[1]
    x = load_queries(query_ref, at, 1)
    towards = direction(x)
    column = jax.lax.iota(jnp.int32, x.shape[1])[None, :]
    code = code_of(x, towards).astype(jnp.int8)
    place = at + jnp.zeros_like(column), jnp.minimum(column, dim - 1)
    plgpu.store(code_ref.at[place], code, mask=column < dim)
    scale_ref[at] = jnp.max(towards.scale)


def chunk_bounds_kernel(
    code_ref, scale_ref, rows_ref, rows_scale_ref, rows_error_ref, counts_ref, out_ref,
    *tile_refs, block, step, is_certain,
):  # fmt: skip
    """Bounds on the cosines of a block of queries over each chunk of a tile of rows, and over it.

    `tile_refs` is that of the tiles' bounds, or none. If not certain, they are estimates.
    """
    num_rows, dim = rows_ref.shape
    tile, first_query = pl.program_id(0), pl.program_id(1) * block
    start = jnp.minimum(tile * TILE, num_rows - TILE)

    def multiply(i, total):
        query = code_ref[pl.ds(first_query, block), pl.ds(i * step, step)]
        rows = rows_ref[pl.ds(start, TILE), pl.ds(i * step, step)]
        return total + jax.lax.dot_general(
            query, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )

    total = jnp.zeros((block, TILE), jnp.int32)
    total = jax.lax.fori_loop(0, dim // step, multiply, total)
    # The rows that the tile before has do not count again.
    counts = start + jax.lax.iota(jnp.int32, TILE) >= tile * TILE
    counts = counts & counts_ref[pl.ds(start, TILE)]
    # One multiply-add for each product; a chunk's largest error and the query's scale come after.
    out_of_play = jnp.where(counts, 0.0, -jnp.inf)
    error = out_of_play + rows_error_ref[pl.ds(start, TILE)] if is_certain else out_of_play
    scale = rows_scale_ref[pl.ds(start, TILE)]
    bound = total.astype(jnp.float32) * scale[None, :] + out_of_play[None, :]
    per_tile = TILE // CHUNK
    best = jnp.max(bound.reshape(block, per_tile, CHUNK), axis=2)
    error = jnp.max(error.reshape(per_tile, CHUNK), axis=1)
    # No direction has the scale 0, which would make a nothing of minus infinity.
    query_scale = jnp.maximum(scale_ref[pl.ds(first_query, block)], 1e-30)
    best = best * query_scale[:, None] + error[None, :] * longest_code(query_scale, dim)[:, None]
    out_ref[pl.ds(first_query, block), pl.ds(tile * per_tile, per_tile)] = best
    for ref in tile_refs:
        ref[pl.ds(first_query, block), tile] = jnp.max(best, axis=1)


def select_kernel(
    sections_ref, chunks_ref, query_ref, rows_ref, rows_scale_ref, rows_error_ref, counts_ref,
    *refs, num_picked, per_section, parts, is_certain,
):  # fmt: skip
    """The rows picked for one query, or the best of them by full scores, and a bound on the rest.

    First the sections of so many chunks with the largest bounds, then the chunks in these, then
    the rows in those. `refs` are those of ids and bound, or of the keys and of what `Found` holds.
    """
    query = pl.program_id(0)
    num_rows, dim = rows_ref.shape
    x = load_queries(query_ref, query, 1)
    towards = direction(x)
    chunks, left_out = largest_chunks(sections_ref, query, num_picked, parts)
    if per_section > 1:
        chunks, others = largest_within(chunks_ref, query, chunks, per_section, num_picked, parts)
        left_out = jnp.maximum(left_out, others)

    num_positions = num_picked * CHUNK
    group = min(_GROUP, num_positions)
    scale = jnp.max(towards.scale)
    step = step_of(dim, _STEP)

    def score(g, bounds):
        position = g * group + jax.lax.iota(jnp.int32, group)
        own = chunk_of(position, g * group, chunks, CHUNK)
        row, counts = _row(own * CHUNK + position % CHUNK, num_rows)
        row = jnp.where(counts, row, 0)
        counts = counts & plgpu.load(counts_ref.at[row])

        def multiply(i, total):
            at = i * step + jax.lax.iota(jnp.int32, step)
            part = code_of(query_ref[query, pl.ds(i * step, step)][None, :], towards)
            part = jnp.broadcast_to(part.astype(jnp.int8), (16, step))
            rows = plgpu.load(rows_ref.at[row[:, None], at[None, :]])
            return total + jax.lax.dot_general(
                rows, part, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
            )

        total = jax.lax.fori_loop(0, dim // step, multiply, jnp.zeros((group, 16), jnp.int32))
        total = jnp.max(total, axis=1).astype(jnp.float32)
        bound = total * plgpu.load(rows_scale_ref.at[row]) * scale
        if is_certain:
            bound = bound + plgpu.load(rows_error_ref.at[row]) * longest_code(scale, dim)
        bound = jnp.where(counts, bound, -jnp.inf)
        is_group = jax.lax.iota(jnp.int32, num_positions // group) == g
        return jnp.where(is_group[:, None], bound[None, :], bounds)

    shape = (num_positions // group, group)
    bound = jax.lax.fori_loop(0, shape[0], score, jnp.full(shape, -jnp.inf, jnp.float32))
    picked, second = largest(bound.reshape(num_positions), num_picked, parts)
    ids, counts = _row(row_of(picked, chunks, CHUNK), num_rows)
    ids = jnp.where(counts & (picked < num_positions), ids, num_rows)
    # The bounds are on the product of the query's code with the row: its own rounding comes on top.
    rest = unit_of(x, towards) - code_of(x, towards) * towards.scale[:, None]
    own_error = jnp.sqrt(jnp.sum(jnp.sum(rest * rest, axis=1))) * 1.001 + 1e-5
    refs[-1][query] = jnp.maximum(left_out, second) + own_error
    if len(refs) == 2:
        refs[0][query, pl.ds(0, num_picked)] = ids
    else:
        score_and_store(ids, query, query_ref, refs[0], towards, Found(*refs[1:]))


def longest_code(scale: Array, dim: int) -> Array:
    """How long a unit vector's code may be: each coordinate is off by half a step at most.

    A row's error counts so many times in a product with the code.
    """
    return 1.001 + 0.501 * dim**0.5 * scale


def _row(position: Array, num_rows: int) -> tuple[Array, Array]:
    """The row at a position, and whether it counts.

    Tiles are numbered from row zero. The last one starts early, so that it is whole, and its rows
    that the tile before it has do not count.
    """
    tile = position // TILE
    row = jnp.minimum(tile * TILE, num_rows - TILE) + position % TILE
    return row, (row >= tile * TILE) & (row < num_rows)
