"""First pass of a search on NVIDIA GPUs: two fused kernels over eight-bit codes.

The first multiplies queries by codes and keeps only an upper bound of the cosine for every chunk of
rows, so that queries x rows never exists; it is limited by reading the codes, or by the integer
matrix units. For many queries Hopper has one of its own, `_codes_hopper`. The second takes the most
promising chunks of a query, by way of the most promising sections of many chunks where there are
too many for one program, scores their rows by code, picks the most promising rows, scores those in
full and sorts them. No row outside the pick has a larger cosine than the bound returned. A small
kernel before them normalises and codes the queries at once: for few queries every launch counts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops._hardware import compute_capability, launch
from moe_jax.ops.search import _codes_hopper
from moe_jax.ops.search._codes_kernels import (
    CHUNK,
    TILE,
    chunk_bounds_kernel,
    encode_kernel,
    select_kernel,
)
from moe_jax.ops.search._kernel_parts import (
    Found,
    fits_offsets,
    found_shapes,
    step_of,
    takes_width,
)
from moe_jax.ops.search._kernel_picks import parts_for
from moe_jax.ops.search.code import Code

__all__ = [
    "MAX_K", "NEEDS", "find", "has_parts", "is_supported", "num_bounds", "num_to_pick", "pick",
    "pick_in_parts",
]  # fmt: skip

MAX_K = 48
"""The largest k that these kernels are meant for."""

NEEDS = (
    "at least 128 keys, a width that 64 divides, up to 4096, rows and width whose product is not "
    f"between 2**31 and 2**32, k up to {MAX_K} (less for many millions of keys)"
)
"""What `is_supported` asks for, in words."""

_MANY = 1024  # queries that fill a GPU with programs of four warps
_FEW_ROWS = 2**18
# What leaves room in the registers of a program: bounds among which it picks sections, and chunks.
_SECTIONS = 8192
_CHUNKS = 16384
_PARTS = 4  # of all rows, from each of which as many are picked in a second look


def is_supported(num_rows: int, dim: int, k: int) -> bool:
    """Whether the kernels can take such sizes: at least a tile of rows, and a width in whole steps.

    The bounds of all chunks in the picked sections have to fit a program's registers.
    """
    if k > MAX_K or num_rows < TILE or not takes_width(dim) or not fits_offsets(num_rows, dim):
        return False
    return _has_room(num_to_pick(k, 1, num_rows), num_rows)


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
    if is_certain and k > 1:
        # Many queries of few rows: looking again at those left open is the quicker way.
        is_worth_it = num_queries < _MANY or num_rows >= _FEW_ROWS
        return 128 if is_worth_it and _has_room(128, num_rows) else 64
    if k <= 11:
        return 16 if k == 1 or num_queries >= _MANY else 32
    return 32 if k < 25 else 64


def _has_room(num_picked: int, num_rows: int) -> bool:
    return num_picked * _chunks_per_section(num_rows) <= _CHUNKS


def pick(
    queries: Float[Array, "Q D"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    num_picked: int,
    *,
    is_certain: bool = True,
    interpret: bool = False,
) -> tuple[Int[Array, "Q F"], Float[Array, "Q"]]:
    """Pick the rows that may have the largest cosines to each query.

    Args:
      queries: float32 [Q, D], of any length.
      table: codes of N unit vectors.
      is_candidate: bool [N], the rows that may be picked.
      num_picked: F, a power of two from 16.
      is_certain: pick by bounds on the cosines, not by estimates of them, which find more of the
        best where rows are coded more or less coarsely.
      interpret: run the kernels as ordinary operations, on any device, to test them.

    Returns:
      The rows, N where there are fewer, in no order; and, if certain, a bound on the cosine of
      every candidate that was not picked. Both mean nothing for a query without a direction.
    """
    how = {"is_certain": is_certain, "interpret": interpret}
    bounds = _bounds(queries, table, is_candidate, **how)
    return _pick(bounds, queries, table, is_candidate, num_picked, **how)


def has_parts(num_rows: int) -> bool:
    """Whether `pick_in_parts` is worth it: a program that may do it takes the host longer."""
    return num_rows >= _FEW_ROWS


def pick_in_parts(
    queries: Float[Array, "Q D"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    k: int,
    *,
    interpret: bool = False,
) -> tuple[Int[Array, "Q F"], Float[Array, "Q"]]:
    """Pick several times as many rows as `pick`, as many from each of a few parts of the rows.

    Args:
      queries: as in `pick`.
      table: as in `pick`.
      is_candidate: as in `pick`.
      k: how many are wanted.
      interpret: as in `pick`.

    Returns:
      As `pick`, if certain.
    """
    how = {"is_certain": True, "interpret": interpret}
    sections, chunks = _bounds(queries, table, is_candidate, **how)
    part = jnp.arange(sections.shape[1]) * _PARTS // sections.shape[1]
    num_picked = num_to_pick(k, 1, is_candidate.shape[0], is_certain=True)
    picked = []
    for i in range(_PARTS):
        own = jnp.where(part == i, sections, -jnp.inf), chunks
        picked.append(_pick(own, queries, table, is_candidate, num_picked, **how))
    ids, bound = zip(*picked, strict=True)
    return jnp.concatenate(ids, axis=1), functools.reduce(jnp.maximum, bound)


def find(
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
      queries: as in `pick`; one without a direction finds nothing.
      keys: float32 [N, D], unit vectors.
      table: as in `pick`.
      is_candidate: as in `pick`.
      num_picked: as in `pick`.
      k: how many of those picked are returned, at most F.
      interpret: as in `pick`.

    Returns:
      `Found`.
    """
    how = {"is_certain": False, "interpret": interpret}
    bounds = _bounds(queries, table, is_candidate, **how)
    return _select(
        bounds, queries, (keys,), table, is_candidate, found_shapes(queries.shape[0], k),
        num_picked=num_picked, parts=parts_for(k, num_picked), **how,
    )  # fmt: skip


def _pick(
    bounds: tuple[Array, Array],
    queries: Float[Array, "Q D"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    num_picked: int,
    **how: bool,
) -> tuple[Int[Array, "Q F"], Float[Array, "Q"]]:
    outputs = (
        jax.ShapeDtypeStruct((queries.shape[0], num_picked), jnp.int32),
        jax.ShapeDtypeStruct((queries.shape[0],), jnp.float32),
    )
    # In two parts a bound is higher than it need be, which does not matter where it has room.
    parts = 2 if num_picked >= 128 else 1
    return _select(bounds, queries, (), table, is_candidate, outputs, num_picked=num_picked,
                   parts=parts, **how)  # fmt: skip


def _select(
    bounds: tuple[Array, Array],
    queries: Float[Array, "Q D"],
    keys: tuple[Array, ...],
    table: Code,
    is_candidate: Bool[Array, "N"],
    outputs: Any,
    *,
    num_picked: int,
    parts: int,
    is_certain: bool,
    interpret: bool,
) -> Any:
    num_queries, per_section = queries.shape[0], _chunks_per_section(table.code.shape[0])
    how = {"num_picked": num_picked, "per_section": per_section, "parts": parts,
           "is_certain": is_certain}  # fmt: skip
    # Picking 128 of thousands in four warps takes most of their registers, and half as long again.
    is_small = num_picked <= 64 and num_picked * per_section <= _CHUNKS // 2
    inputs = (*bounds, queries, table.code, table.scale, table.error, is_candidate, *keys)
    num_warps = 4 if num_queries >= _MANY and is_small else 8
    # Programs of four warps share a multiprocessor's memory, and an A100 has less of it.
    num_stages = 3 if num_warps == 8 and compute_capability()[0] > 8 else 2
    return launch(
        functools.partial(select_kernel, **how), (num_queries,), inputs, outputs,
        num_warps=num_warps, num_stages=num_stages, interpret=interpret,
    )  # fmt: skip


def _bounds(
    queries: Float[Array, "Q D"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    *,
    is_certain: bool,
    interpret: bool,
) -> tuple[Float[Array, "P S"], Float[Array, "P C"]]:
    """Bounds (or, if not certain, estimates) of every section of chunks, and of every chunk."""
    per_section = _chunks_per_section(table.code.shape[0])
    coded = _encode(queries, interpret=interpret)
    bounds = _chunk_bounds(*coded, table, is_candidate, with_tiles=per_section > 1,
                           is_certain=is_certain, interpret=interpret)  # fmt: skip
    chunks, sections = bounds[0], bounds[-1]
    tiles = per_section * CHUNK // TILE
    if tiles > 1:
        pad = -sections.shape[1] % tiles
        sections = jnp.pad(sections, ((0, 0), (0, pad)), constant_values=-jnp.inf)
        sections = jnp.max(sections.reshape(sections.shape[0], -1, tiles), axis=2)
    return sections, chunks


def num_bounds(num_rows: int) -> int:
    """How many numbers each query takes on the device, but for some of its sections."""
    return -(-num_rows // TILE) * (TILE // CHUNK)


def _chunks_per_section(num_rows: int) -> int:
    """1, or a tile's or the least power of two above that keeps the number of sections small."""
    num_chunks = num_bounds(num_rows)
    if num_chunks <= _SECTIONS:
        return 1
    size = TILE // CHUNK
    while num_chunks > size * _SECTIONS:
        size *= 2
    return size


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
    return launch(encode_kernel, (rows,), (queries,), outputs, **how)


def _chunk_bounds(
    code: Int[Array, "P D"],
    scale: Float[Array, "P"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    *,
    with_tiles: bool,
    is_certain: bool,
    interpret: bool,
) -> tuple[Float[Array, "P C"], ...]:
    """Upper bounds on the cosine, but for the query's own error, over each chunk, and each tile.

    If not certain, the largest estimates.
    """
    num_queries, dim = code.shape
    num_rows = table.code.shape[0]
    if not interpret and _codes_hopper.takes(num_queries, num_rows, dim):
        return _codes_hopper.chunk_bounds(
            code, scale, table, is_candidate, with_tiles=with_tiles, is_certain=is_certain
        )
    block = _query_block(num_queries)
    tiles = -(-num_rows // TILE)
    step = step_of(dim, 256 if block < 128 else 128)
    kernel = functools.partial(chunk_bounds_kernel, block=block, step=step, is_certain=is_certain)
    sizes = (num_bounds(num_rows), tiles) if with_tiles else (num_bounds(num_rows),)
    bounds = tuple(jax.ShapeDtypeStruct((num_queries, size), jnp.float32) for size in sizes)
    return launch(
        kernel, (tiles, num_queries // block), (code, scale, *table, is_candidate), bounds,
        num_warps=4 if block < 128 else 8, interpret=interpret,
    )  # fmt: skip
