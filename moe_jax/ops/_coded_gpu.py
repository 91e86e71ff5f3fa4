"""First pass of a search on NVIDIA GPUs: two fused kernels over eight-bit codes.

The first multiplies queries by codes and keeps only an upper bound of the cosine for every chunk of
rows, so that queries x rows never exists; it is limited by reading the codes, or by the integer
matrix units. The second takes the most promising chunks of a query, scores their rows by code,
picks the most promising rows, scores those in full and sorts them. No row outside the pick has a
larger cosine than the bound returned. A small kernel before them normalises and codes the queries
at once: for few queries every launch counts.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops._hardware import triton as plgpu
from moe_jax.ops._kernel_parts import (
    MAX_CHUNKS,
    Found,
    chunk_of,
    code_of,
    direction,
    found_shapes,
    largest,
    largest_chunks,
    launch,
    load_queries,
    score_and_store,
    step_of,
    takes_width,
    unit_of,
)
from moe_jax.ops.code import Code

__all__ = ["LARGE_K", "MANY_ROWS", "MAX_K", "is_supported", "num_to_pick", "pick"]

MAX_K = 48
"""The largest k that `pick` is meant for."""

LARGE_K = 25
"""From this k on, `pick` takes at most `MANY_ROWS` rows."""

MANY_ROWS = 2**22

_TILE = 128  # rows of codes that one program multiplies
_GROUP = 512  # rows that the second kernel scores at a time, _STEP coordinates in one go
_STEP = 128
_SOME = 16  # queries of which one is easily an odd one
_MANY = 1024  # queries that fill a GPU with programs of four warps
_IN_FOUR_WARPS = 4096  # rows whose bounds leave room in the registers of such a program


def is_supported(num_rows: int, dim: int, k: int) -> bool:
    """Whether `pick` can take such sizes: at least a tile of rows, and a width in whole steps.

    The bounds of all rows in the picked chunks have to fit a program's registers.
    """
    has_room = k < LARGE_K or (k <= MAX_K and num_rows <= MANY_ROWS)
    return has_room and num_rows >= _TILE and takes_width(dim)


def num_to_pick(k: int, num_queries: int, num_rows: int, *, is_certain: bool = False) -> int:
    """How many rows to score in full for the best k: some more, and a power of two.

    Args:
        k: how many are wanted.
        num_queries: of so many queries; where they are many, more rows cost time.
        num_rows: among so many.
        is_certain: take so many that their bounds mostly tell that no other row is one of the
            best. Of 100,000 random rows of 512 numbers, 36 lie within the bounds' error of the
            tenth, and more than 64 for a few queries in a hundred.
    """
    if is_certain and k > 1 and num_rows <= MANY_ROWS:
        # One query left open costs as much as many, and is more likely among many.
        has_room = 128 * _rows_per_chunk(num_rows) <= MAX_CHUNKS
        return 128 if has_room and _SOME <= num_queries < _MANY else 64
    if k <= 11:
        return 16 if k == 1 or num_queries >= _MANY else 32
    return 32 if k < LARGE_K else 64


def pick(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    num_picked: int,
    k: int,
    *,
    interpret: bool = False,
) -> Found:
    """Pick the rows that may have the largest cosines to each query, and score them.

    Args:
      queries: float32 [Q, D], of any length; one without a direction finds nothing.
      keys: float32 [N, D], unit vectors.
      table: their codes.
      is_candidate: bool [N], the rows that may be picked.
      num_picked: F, a power of two from 16, how many are scored in full.
      k: how many of them are returned, at most F.
      interpret: run the kernels as ordinary operations, on any device, to test them.

    Returns:
      `Found`.
    """
    coded = _encode(queries, interpret=interpret)
    bounds = _chunk_bounds(*coded, table, is_candidate, interpret=interpret)
    rows_per_chunk = _rows_per_chunk(table.code.shape[0])
    joined = rows_per_chunk // min(rows_per_chunk, _TILE)
    if joined > 1:
        pad = -bounds.shape[1] % joined
        bounds = jnp.pad(bounds, ((0, 0), (0, pad)), constant_values=-jnp.inf)
        bounds = jnp.max(bounds.reshape(bounds.shape[0], -1, joined), axis=2)
    kernel = functools.partial(_select_kernel, num_picked=num_picked, rows_per_chunk=rows_per_chunk)
    is_small = num_picked <= 32 or num_picked * rows_per_chunk <= _IN_FOUR_WARPS
    num_warps = 4 if queries.shape[0] >= _MANY and is_small else 8
    inputs = (bounds, queries, keys, table.code, table.scale, table.error, is_candidate)
    return launch(
        kernel, (queries.shape[0],), inputs, found_shapes(queries.shape[0], k),
        num_warps=num_warps, num_stages=2, interpret=interpret,
    )  # fmt: skip


def _rows_per_chunk(num_rows: int) -> int:
    """The least power of two, from 16, that keeps the number of chunks small."""
    size = 16
    while -(-num_rows // _TILE) * _TILE > size * MAX_CHUNKS:
        size *= 2
    return size


def _row(position: Array, num_rows: int) -> tuple[Array, Array]:
    """The row at a position, and whether it counts.

    Tiles are numbered from row zero. The last one starts early, so that it is whole, and its rows
    that the tile before it has do not count.
    """
    tile = position // _TILE
    row = jnp.minimum(tile * _TILE, num_rows - _TILE) + position % _TILE
    return row, (row >= tile * _TILE) & (row < num_rows)


def _query_block(num_queries: int) -> int:
    return next((size for size in (16, 32, 64) if num_queries <= size), 128)


def _encode(
    queries: Float[Array, "Q D"], *, interpret: bool
) -> tuple[Int[Array, "P D"], Float[Array, "P"]]:
    """Codes of queries and their scales, filled up with zeros to whole blocks of queries."""
    num_queries, dim = queries.shape
    rows = num_queries + -num_queries % _query_block(num_queries)

    outputs = (
        jax.ShapeDtypeStruct((rows, dim), jnp.int8),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    how = {"num_warps": 4, "num_stages": None, "interpret": interpret}
    return launch(_encode_kernel, (rows,), (queries,), outputs, **how)


def _encode_kernel(query_ref, code_ref, scale_ref):
    at, dim = pl.program_id(0), code_ref.shape[1]
    x = load_queries(query_ref, at, 1)
    towards = direction(x)
    column = jax.lax.iota(jnp.int32, x.shape[1])[None, :]
    code = code_of(x, towards).astype(jnp.int8)
    place = at + jnp.zeros_like(column), jnp.minimum(column, dim - 1)
    plgpu.store(code_ref.at[place], code, mask=column < dim)
    scale_ref[at] = jnp.max(towards.scale)


def _chunk_bounds(
    code: Int[Array, "P D"],
    scale: Float[Array, "P"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    *,
    interpret: bool,
) -> Float[Array, "P C"]:
    """An upper bound on the cosine, but for the query's own error, over each chunk of rows."""
    num_queries, dim = code.shape
    num_rows = table.code.shape[0]
    block = _query_block(num_queries)
    tiles = -(-num_rows // _TILE)
    per_tile = _TILE // min(_rows_per_chunk(num_rows), _TILE)
    step = step_of(dim, 256 if block < 128 else 128)
    kernel = functools.partial(_chunk_bounds_kernel, block=block, step=step, per_tile=per_tile)
    bounds = jax.ShapeDtypeStruct((num_queries, tiles * per_tile), jnp.float32)
    return launch(
        kernel, (tiles, num_queries // block), (code, scale, *table, is_candidate), bounds,
        num_warps=4 if block < 128 else 8, interpret=interpret,
    )  # fmt: skip


def _chunk_bounds_kernel(
    code_ref, scale_ref, rows_ref, rows_scale_ref, rows_error_ref, counts_ref, out_ref,
    *, block, step, per_tile,
):  # fmt: skip
    num_rows, dim = rows_ref.shape
    tile, first_query = pl.program_id(0), pl.program_id(1) * block
    start = jnp.minimum(tile * _TILE, num_rows - _TILE)

    def multiply(i, total):
        query = code_ref[pl.ds(first_query, block), pl.ds(i * step, step)]
        rows = rows_ref[pl.ds(start, _TILE), pl.ds(i * step, step)]
        return total + jax.lax.dot_general(
            query, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )

    total = jnp.zeros((block, _TILE), jnp.int32)
    total = jax.lax.fori_loop(0, dim // step, multiply, total)
    # The rows that the tile before has do not count again.
    counts = start + jax.lax.iota(jnp.int32, _TILE) >= tile * _TILE
    counts = counts & counts_ref[pl.ds(start, _TILE)]
    error = jnp.where(counts, rows_error_ref[pl.ds(start, _TILE)], -jnp.inf)
    # One multiply-add for each product; a chunk's largest error and the query's scale come after.
    out_of_play = jnp.where(counts, 0.0, -jnp.inf)
    scale = rows_scale_ref[pl.ds(start, _TILE)]
    bound = total.astype(jnp.float32) * scale[None, :] + out_of_play[None, :]
    # In two steps, since a reduction across a whole tile row takes Triton twice as long.
    fine = max(per_tile, _TILE // 32)
    best = jnp.max(bound.reshape(block, fine, _TILE // fine), axis=2)
    if fine > per_tile:
        best = jnp.max(best.reshape(block, per_tile, fine // per_tile), axis=2)
    error = jnp.max(error.reshape(per_tile, _TILE // per_tile), axis=1)
    # No direction has the scale 0, which would make a nothing of minus infinity.
    query_scale = jnp.maximum(scale_ref[pl.ds(first_query, block)], 1e-30)
    best = best * query_scale[:, None] + error[None, :]
    out_ref[pl.ds(first_query, block), pl.ds(tile * per_tile, per_tile)] = best


def _select_kernel(
    bounds_ref, query_ref, key_ref, rows_ref, rows_scale_ref, rows_error_ref, counts_ref,
    ids_ref, scores_ref, is_found_ref, unseen_ref, *, num_picked, rows_per_chunk,
):  # fmt: skip
    query = pl.program_id(0)
    num_rows, dim = rows_ref.shape
    x = load_queries(query_ref, query, 1)
    towards = direction(x)
    chunks, left_out = largest_chunks(bounds_ref, query, num_picked)

    num_positions = num_picked * rows_per_chunk
    group = min(_GROUP, num_positions)
    scale = jnp.max(towards.scale)
    step = step_of(dim, _STEP)

    def score(g, found):
        position = g * group + jax.lax.iota(jnp.int32, group)
        own = chunk_of(position, g * group, chunks, rows_per_chunk)
        row, counts = _row(own * rows_per_chunk + position % rows_per_chunk, num_rows)
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
        bound = bound + plgpu.load(rows_error_ref.at[row])
        bound = jnp.where(counts, bound, -jnp.inf)
        is_group = jax.lax.iota(jnp.int32, num_positions // group) == g
        return (
            jnp.where(is_group[:, None], bound[None, :], found[0]),
            jnp.where(is_group[:, None], row[None, :], found[1]),
        )

    shape = (num_positions // group, group)
    found = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, num_rows, jnp.int32))
    bound, row = jax.lax.fori_loop(0, shape[0], score, found)
    bound, row = bound.reshape(num_positions), row.reshape(num_positions)
    ids, second = largest(bound, row, num_picked, nothing=num_rows)
    # The bounds are on the product with the query's code: its own rounding comes on top.
    rest = unit_of(x, towards) - code_of(x, towards) * towards.scale[:, None]
    own_error = jnp.sqrt(jnp.sum(jnp.sum(rest * rest, axis=1))) * 1.001 + 1e-5
    unseen_ref[query] = jnp.maximum(left_out, second) + own_error
    out = Found(ids_ref, scores_ref, is_found_ref, unseen_ref)
    score_and_store(ids, query, query_ref, key_ref, towards, out)
