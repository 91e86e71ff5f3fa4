"""Search of a few cells of rows on NVIDIA GPUs, in four fused kernels.

The first scores cells by their centroids, the second picks those that a query probes, the third
scores the rows in them by eight-bit codes, the fourth picks the most promising rows, scores those
in full and sorts them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops._hardware import launch
from moe_jax.ops._hardware import triton as plgpu
from moe_jax.ops.search._kernel_parts import (
    Found,
    code_of,
    direction,
    fits_offsets,
    found_shapes,
    load_queries,
    score_and_store,
    step_of,
    takes_width,
    unit_of,
)
from moe_jax.ops.search._kernel_picks import largest_chunks, largest_within, parts_for
from moe_jax.ops.search.code import Code

__all__ = ["is_supported", "probe"]

_TILE = 128  # places of a cell that one program scores
_CELLS = 16  # centroids that one program scores
_QUERIES = 16  # queries that one program scores centroids for, unless there are few
_FEW_QUERIES = 2  # for so few a sum of products is faster than matrix units
_RANKS_PER_COSINE = 2**15
_UNUSED = -1.05  # below every cosine, and above where the search for a rank begins
_MAX_CELLS = 16384  # cosines of a query that fit the second kernel's registers
_MAX_CHUNKS = 8192  # bounds of a query that fit the last kernel's registers


def is_supported(num_rows: int, num_cells: int, dim: int) -> bool:
    """Whether `probe` can take such sizes."""
    return takes_width(dim) and fits_offsets(num_rows, dim) and num_cells <= _MAX_CELLS


def probe(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    centroids: Float[Array, "L D"],
    members: Int[Array, "L P"],
    overflow: Int[Array, "V"],
    counts: Int[Array, "L"],
    probes: int,
    num_picked: int,
    k: int,
    *,
    interpret: bool = False,
) -> Found:
    """The rows with the largest cosines to each query among those in the cells nearest to it.

    Args:
      queries: float32 [Q, D], of any length; one without a direction finds nothing.
      keys: float32 [N, D], unit vectors.
      table: their codes.
      is_candidate: bool [N], the rows that may be picked.
      centroids: float32 [L, D], unit vectors.
      members: int32 [L, P], the rows in each cell, N in an empty place.
      overflow: int32 [V], rows that every query looks at, likewise.
      counts: int32 [L], the rows in each cell; one without is not worth a probe.
      probes: how many cells each query looks into, at most L.
      num_picked: F, a power of two from 16, how many rows are scored in full.
      k: how many of them are returned, at most F.
      interpret: run the kernels as ordinary operations, on any device, to test them.

    Returns:
      `Found`, whose `unseen` is not set.
    """
    call = functools.partial(launch, interpret=interpret)
    num_queries, dim = queries.shape
    num_cells, places = members.shape
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    block = 1 if num_queries <= _FEW_QUERIES else _QUERIES
    grid = -(-num_cells // _CELLS), -(-num_queries // block)
    cosine = call(
        functools.partial(_cosine_kernel, block=block, step=step_of(dim, 512)), grid,
        (queries, centroids, counts), floats((num_queries, num_cells)), num_warps=4,
    )  # fmt: skip
    cell = call(
        functools.partial(_pick_cells_kernel, probes=probes), (num_queries,),
        (cosine,), ints((num_queries, probes)), num_warps=8,
    )  # fmt: skip

    parts = -(-places // _TILE)
    extra = -(-overflow.shape[0] // (parts * _TILE))
    total = (probes + extra) * parts * _TILE
    rows_per_chunk = 16
    while total > rows_per_chunk * _MAX_CHUNKS and rows_per_chunk < _TILE:
        rows_per_chunk *= 2
    score, row, bounds = call(
        functools.partial(_scan_kernel, probes=probes, parts=parts, step=step_of(dim, 256),
                          rows_per_chunk=rows_per_chunk),
        (probes + extra, parts, num_queries),
        (queries, cell, members, overflow, table.code, table.scale, is_candidate),
        (
            floats((num_queries, total)),
            ints((num_queries, total)),
            floats((num_queries, total // rows_per_chunk)),
        ),
        num_warps=4,
    )  # fmt: skip
    return Found(*call(
        functools.partial(_select_kernel, num_picked=num_picked, rows_per_chunk=rows_per_chunk,
                          parts=parts_for(k, num_picked)),
        (num_queries,), (bounds, score, row, queries, keys), found_shapes(num_queries, k)[:3],
        num_warps=4,
    ), None)  # fmt: skip


def _cosine_kernel(query_ref, centroid_ref, counts_ref, out_ref, *, block, step):
    num_cells, dim = centroid_ref.shape
    num_queries = query_ref.shape[0]
    first_cell, first_query = pl.program_id(0) * _CELLS, pl.program_id(1) * block
    towards = direction(load_queries(query_ref, first_query, block))
    cell = first_cell + jax.lax.iota(jnp.int32, _CELLS)
    at = first_query + jax.lax.iota(jnp.int32, block)
    is_there = jnp.broadcast_to((at < num_queries)[:, None], (block, step))

    def multiply(i, total):
        column = i * step + jax.lax.iota(jnp.int32, step)
        centroid = plgpu.load(
            centroid_ref.at[jnp.minimum(cell, num_cells - 1)[:, None], column[None, :]]
        )
        x = plgpu.load(
            query_ref.at[jnp.minimum(at, num_queries - 1)[:, None], column[None, :]],
            mask=is_there, other=0.0,
        )  # fmt: skip
        x = unit_of(x, towards)
        if block == 1:
            return total + jnp.sum(centroid * x, axis=1)[None, :]
        return total + jax.lax.dot_general(
            x, centroid, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    total = jnp.zeros((block, _CELLS), jnp.float32)
    total = jax.lax.fori_loop(0, dim // step, multiply, total)
    is_used = plgpu.load(counts_ref.at[jnp.minimum(cell, num_cells - 1)]) > 0
    total = jnp.where(is_used[None, :], total, _UNUSED)
    mask = (at < num_queries)[:, None] & (cell < num_cells)[None, :]
    plgpu.store(out_ref.at[at[:, None], cell[None, :]], total, mask=mask)


def _pick_cells_kernel(cosine_ref, cell_ref, *, probes):
    """The cells with the largest cosines, in no order; ties, up to 2**-15, to the lower cell."""
    query, num_cells = pl.program_id(0), cosine_ref.shape[1]
    cell = jax.lax.iota(jnp.int32, pl.next_power_of_2(num_cells))
    cosine = plgpu.load(cosine_ref.at[query, cell], mask=cell < num_cells, other=-2.0)
    # Cells that differ by less than a rank are as good as each other.
    rank = jnp.floor((cosine + 2.0) * _RANKS_PER_COSINE).astype(jnp.int32)

    def halve(_, ends):
        low, high = ends  # at least `probes` are above low, fewer are above high
        middle = (low + high) // 2
        is_enough = jnp.sum((rank > middle).astype(jnp.int32)) >= probes
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    # Cosines are at least -1, up to rounding, and at most 1.
    low, high = int(0.9 * _RANKS_PER_COSINE), int(3.1 * _RANKS_PER_COSINE)
    count = (high - low).bit_length()
    _, last = jax.lax.fori_loop(0, count, halve, (jnp.int32(low), jnp.int32(high)))
    is_above, is_level = rank > last, (rank == last) & (cell < num_cells)
    num_above = jnp.sum(is_above.astype(jnp.int32))
    turn = jnp.cumsum(is_level.astype(jnp.int32), axis=0) - 1
    is_picked = is_above | (is_level & (turn < probes - num_above))
    place = jnp.where(is_picked, jnp.cumsum(is_picked.astype(jnp.int32), axis=0) - 1, probes)
    plgpu.store(cell_ref.at[query, place], cell, mask=is_picked)


def _scan_kernel(
    query_ref, cell_ref, member_ref, overflow_ref, code_ref, code_scale_ref, counts_ref,
    score_ref, row_ref, bound_ref, *, probes, parts, step, rows_per_chunk,
):  # fmt: skip
    turn, part, query = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    num_rows, dim = code_ref.shape
    places, spare = member_ref.shape[1], overflow_ref.shape[0]
    place = part * _TILE + jax.lax.iota(jnp.int32, _TILE)
    beyond = place + (turn - probes) * parts * _TILE
    is_inside = turn < probes
    cell = cell_ref[query, jnp.minimum(turn, probes - 1)]
    row = jnp.where(
        is_inside,
        plgpu.load(member_ref.at[cell, place], mask=is_inside & (place < places), other=num_rows),
        plgpu.load(
            overflow_ref.at[jnp.maximum(beyond, 0)],
            mask=~is_inside & (beyond < spare), other=num_rows,
        ),
    )  # fmt: skip
    counts = row < num_rows
    at = jnp.where(counts, row, 0)
    counts = counts & plgpu.load(counts_ref.at[at], mask=counts, other=False)
    towards = direction(load_queries(query_ref, query, 1))

    def multiply(i, total):
        column = i * step + jax.lax.iota(jnp.int32, step)
        x = code_of(query_ref[query, pl.ds(i * step, step)][None, :], towards)
        x = jnp.broadcast_to(x.astype(jnp.int8), (16, step))
        codes = plgpu.load(
            code_ref.at[at[:, None], column[None, :]],
            mask=jnp.broadcast_to(counts[:, None], (_TILE, step)), other=0,
        )  # fmt: skip
        return total + jax.lax.dot_general(
            codes, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )

    # A part of a cell in which no place is taken costs nothing.
    nothing = jnp.zeros((_TILE, 16), jnp.int32)
    total = jax.lax.cond(
        jnp.max(counts.astype(jnp.int32)) > 0,
        lambda: jax.lax.fori_loop(0, dim // step, multiply, nothing),
        lambda: nothing,
    )
    scale = plgpu.load(code_scale_ref.at[at]) * jnp.max(towards.scale)
    score = jnp.where(counts, jnp.max(total, axis=1).astype(jnp.float32) * scale, -jnp.inf)
    first = (turn * parts + part) * _TILE
    score_ref[query, pl.ds(first, _TILE)] = score
    row_ref[query, pl.ds(first, _TILE)] = row
    chunks = _TILE // rows_per_chunk
    best = jnp.max(score.reshape(chunks, rows_per_chunk), axis=1)
    bound_ref[query, pl.ds((turn * parts + part) * chunks, chunks)] = best


def _select_kernel(
    bound_ref, score_ref, row_ref, query_ref, key_ref, ids_ref, scores_ref, is_found_ref,
    *, num_picked, rows_per_chunk, parts,
):  # fmt: skip
    query, num_rows = pl.program_id(0), key_ref.shape[0]
    chunks, _ = largest_chunks(bound_ref, query, num_picked, parts)
    at, _ = largest_within(score_ref, query, chunks, rows_per_chunk, num_picked, parts)
    is_there = at < score_ref.shape[1]
    at = jnp.where(is_there, at, 0)
    ids = plgpu.load(row_ref.at[query, at], mask=is_there, other=num_rows)
    towards = direction(load_queries(query_ref, query, 1))
    out = Found(ids_ref, scores_ref, is_found_ref, None)
    score_and_store(ids, query, query_ref, key_ref, towards, out)
