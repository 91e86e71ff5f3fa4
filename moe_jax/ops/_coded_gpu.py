"""First pass of a search on NVIDIA GPUs: two fused kernels over eight-bit codes.

The first multiplies queries by codes and keeps only an upper bound of the cosine for every chunk of
rows, so that queries x rows never exists; it is limited by reading the codes, or by the integer
matrix units. The second takes the most promising chunks of a query, scores their rows by code, and
picks the most promising rows. No row outside the pick has a larger cosine than the bound returned.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.code import Code, encode

__all__ = ["is_supported", "pick"]

_TILE = 128  # rows of codes that one program multiplies
_GROUP = 512  # rows that the second kernel scores at a time
_MAX_CHUNKS = 8192  # bounds of a query that fit the second kernel's registers
_LOWEST = -(2**31)


class Picked(NamedTuple):
    """The most promising rows of each query.

    Attributes:
      ids: int32 [Q, F], by descending score, then ascending; N where there are fewer candidates.
      scores: float32 [Q, F], cosines as a float32 sum gives them; -inf where there are fewer.
      unseen: float32 [Q], a bound on the cosine of every candidate that was not picked.
    """

    ids: Int[Array, "Q F"]
    scores: Float[Array, "Q F"]
    unseen: Float[Array, "Q"]


def is_supported(num_rows: int, dim: int) -> bool:
    """Whether `pick` can take such sizes: at least a tile of rows, and a width in whole steps."""
    return num_rows >= _TILE and dim % 64 == 0


def pick(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    num_picked: int,
    *,
    interpret: bool = False,
) -> Picked:
    """Pick the rows that may have the largest cosines to each query, and score them.

    Args:
      queries: float32 [Q, D], unit vectors.
      keys: float32 [N, D], unit vectors.
      table: their codes.
      is_candidate: bool [N], the rows that may be picked.
      num_picked: F, 16 or 32.
      interpret: run the kernels as ordinary operations, on any device, to test them.

    Returns:
      The rows `Picked`.
    """
    short = encode(queries)
    table = table._replace(error=jnp.where(is_candidate, table.error, -jnp.inf))
    bounds = _chunk_bounds(short, table, interpret=interpret)
    rows_per_chunk = _rows_per_chunk(table.code.shape[0])
    joined = rows_per_chunk // min(rows_per_chunk, _TILE)
    if joined > 1:
        pad = -bounds.shape[1] % joined
        bounds = jnp.pad(bounds, ((0, 0), (0, pad)), constant_values=-jnp.inf)
        bounds = jnp.max(bounds.reshape(bounds.shape[0], -1, joined), axis=2)
    picked = _select(
        queries, short, keys, table, bounds, rows_per_chunk, num_picked, interpret=interpret
    )
    return picked._replace(unseen=picked.unseen + short.error)


def _rows_per_chunk(num_rows: int) -> int:
    """The least power of two, from 16, that keeps the number of chunks small."""
    size = 16
    while -(-num_rows // _TILE) * _TILE > size * _MAX_CHUNKS:
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


def _chunk_bounds(queries: Code, table: Code, *, interpret: bool) -> Float[Array, "Q C"]:
    """An upper bound on the cosine, but for the query's own error, over each chunk of rows."""
    num_queries, dim = queries.code.shape
    num_rows = table.code.shape[0]
    block = next((size for size in (16, 32, 64) if num_queries <= size), 128)
    pad = -num_queries % block
    code = jnp.pad(queries.code, ((0, pad), (0, 0)))
    scale = jnp.pad(queries.scale, (0, pad))
    tiles = -(-num_rows // _TILE)
    per_tile = _TILE // min(_rows_per_chunk(num_rows), _TILE)
    step = next(s for s in ((256, 128, 64) if block < 128 else (128, 64)) if dim % s == 0)
    kernel = functools.partial(_chunk_bounds_kernel, block=block, step=step, per_tile=per_tile)
    inputs = (code, scale, table.code, table.scale, table.error)
    bounds = pl.pallas_call(
        kernel,
        grid=(tiles, code.shape[0] // block),
        in_specs=[_whole(x.shape) for x in inputs],
        out_specs=_whole((code.shape[0], tiles * per_tile)),
        out_shape=jax.ShapeDtypeStruct((code.shape[0], tiles * per_tile), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4 if block < 128 else 8, num_stages=3),
        interpret=interpret,
        name="chunk_bounds",
    )(*inputs)
    return bounds[:num_queries]


def _chunk_bounds_kernel(
    code_ref, scale_ref, rows_ref, rows_scale_ref, rows_error_ref, out_ref, *, block, step, per_tile
):
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
    is_own = start + jax.lax.iota(jnp.int32, _TILE) >= tile * _TILE
    error = jnp.where(is_own, rows_error_ref[pl.ds(start, _TILE)], -jnp.inf)
    # One multiply-add for each product; a chunk's largest error and the query's scale come after.
    out_of_play = jnp.where(error > -jnp.inf, 0.0, -jnp.inf)
    scale = rows_scale_ref[pl.ds(start, _TILE)]
    bound = total.astype(jnp.float32) * scale[None, :] + out_of_play[None, :]
    # In two steps, since a reduction across a whole tile row takes Triton twice as long.
    fine = max(per_tile, _TILE // 32)
    best = jnp.max(bound.reshape(block, fine, _TILE // fine), axis=2)
    if fine > per_tile:
        best = jnp.max(best.reshape(block, per_tile, fine // per_tile), axis=2)
    error = jnp.max(error.reshape(per_tile, _TILE // per_tile), axis=1)
    best = best * scale_ref[pl.ds(first_query, block)][:, None] + error[None, :]
    out_ref[pl.ds(first_query, block), pl.ds(tile * per_tile, per_tile)] = best


def _select(
    queries: Float[Array, "Q D"],
    short: Code,
    keys: Float[Array, "N D"],
    table: Code,
    bounds: Float[Array, "Q C"],
    rows_per_chunk: int,
    num_picked: int,
    *,
    interpret: bool,
) -> Picked:
    """The rows with the largest bounds, but for the queries' own error in `unseen`."""
    num_queries = bounds.shape[0]
    kernel = functools.partial(_select_kernel, num_picked=num_picked, rows_per_chunk=rows_per_chunk)
    inputs = (bounds, queries, short.code, short.scale, keys, *table)
    shape = (num_queries, num_picked)
    shapes = (shape, jnp.int32), (shape, jnp.float32), ((num_queries,), jnp.float32)
    found = pl.pallas_call(
        kernel,
        grid=(num_queries,),
        in_specs=[_whole(x.shape) for x in inputs],
        out_specs=[_whole(shape) for shape, _ in shapes],
        out_shape=[jax.ShapeDtypeStruct(*shape) for shape in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="select",
    )(*inputs)
    return Picked(*found)


def _select_kernel(
    bounds_ref, query_ref, code_ref, scale_ref, key_ref, rows_ref, rows_scale_ref, rows_error_ref,
    ids_ref, scores_ref, unseen_ref, *, num_picked, rows_per_chunk,
):  # fmt: skip
    query, num_chunks = pl.program_id(0), bounds_ref.shape[1]
    num_rows, dim = rows_ref.shape
    chunk = jax.lax.iota(jnp.int32, pl.next_power_of_2(num_chunks))
    bound = plgpu.load(bounds_ref.at[query, chunk], mask=chunk < num_chunks, other=-jnp.inf)
    chunks, left_out = _largest(bound, None, num_picked, nothing=chunk.shape[0])

    num_positions = num_picked * rows_per_chunk
    group = min(_GROUP, num_positions)
    scale = scale_ref[query]
    slot = jax.lax.iota(jnp.int32, num_picked)

    def score(g, found):
        position = g * group + jax.lax.iota(jnp.int32, group)
        is_mine = (position // rows_per_chunk)[:, None] == slot[None, :]
        own = jnp.sum(jnp.where(is_mine, chunks[None, :], 0), axis=1)
        row, counts = _row(own * rows_per_chunk + position % rows_per_chunk, num_rows)
        row = jnp.where(counts, row, 0)

        def multiply(i, total):
            at = i * 64 + jax.lax.iota(jnp.int32, 64)
            part = jnp.broadcast_to(code_ref[query, pl.ds(i * 64, 64)][None, :], (16, 64))
            rows = plgpu.load(rows_ref.at[row[:, None], at[None, :]])
            return total + jax.lax.dot_general(
                rows, part, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
            )

        total = jax.lax.fori_loop(0, dim // 64, multiply, jnp.zeros((group, 16), jnp.int32))
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
    ids, second = _largest(bound, row, num_picked, nothing=num_rows)
    unseen_ref[query] = jnp.maximum(left_out, second)

    def add(i, total):
        at = i * 64 + jax.lax.iota(jnp.int32, 64)
        key = plgpu.load(key_ref.at[jnp.minimum(ids, num_rows - 1)[:, None], at[None, :]])
        return total + jnp.sum(key * query_ref[query, pl.ds(i * 64, 64)][None, :], axis=1)

    score = jax.lax.fori_loop(0, dim // 64, add, jnp.zeros(num_picked, jnp.float32))
    score = jnp.where(ids < num_rows, score, -jnp.inf)
    # Each goes where as many as are before it leave it; slots part those that are not there.
    is_level = (score[None, :] == score[:, None]) & (ids[None, :] == ids[:, None])
    is_before = (score[None, :] > score[:, None]) | (
        (score[None, :] == score[:, None]) & (ids[None, :] < ids[:, None])
    )
    is_before = is_before | (is_level & (slot[None, :] < slot[:, None]))
    rank = jnp.sum(is_before.astype(jnp.int32), axis=1)
    plgpu.store(ids_ref.at[query, rank], ids)
    plgpu.store(scores_ref.at[query, rank], score)


def _largest(
    bound: Float[Array, "C"], label: Int[Array, "C"] | None, count: int, *, nothing: int
) -> tuple[Int[Array, "F"], Float[Array, ""]]:
    """Labels (or positions) of the largest bounds, `nothing` where none is left; bound of the rest.

    Value and position share one integer, so that one reduction finds both: bounds, which lie in
    [-2, 2], are rounded up to as many bits as the position leaves.
    """
    size = bound.shape[0]
    bits = max(size - 1, 1).bit_length()
    steps = 2.0 ** (29 - bits)
    place = jax.lax.iota(jnp.int32, size)
    packed = jnp.ceil(jnp.clip(bound, -2.0, 2.0) * steps).astype(jnp.int32)
    packed = packed * 2**bits + (2**bits - 1 - place)
    packed = jnp.where(bound > -jnp.inf, packed, _LOWEST)
    slot = jax.lax.iota(jnp.int32, count)

    def take(i, state):
        packed, taken = state
        best = jnp.max(packed)
        is_it = (packed == best) & (packed > _LOWEST)
        own = 2**bits - 1 - (best & (2**bits - 1))
        if label is not None:
            own = jnp.max(jnp.where(is_it, label, -1))
        own = jnp.where(best > _LOWEST, own, -1)
        taken = jnp.where((slot == i) & (own >= 0), own, taken)
        return jnp.where(is_it, _LOWEST, packed), taken

    state = (packed, jnp.full((count,), nothing, jnp.int32))
    packed, taken = jax.lax.fori_loop(0, count, take, state)
    rest = jnp.max(packed)
    bound = ((rest >> bits) + 1).astype(jnp.float32) / steps
    return taken, jnp.where(rest > _LOWEST, bound, -jnp.inf)


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
