"""First pass of a search on NVIDIA GPUs: two fused kernels over eight-bit codes.

The first multiplies queries by codes and keeps only an upper bound of the cosine for every chunk of
rows, so that queries x rows never exists; it is limited by reading the codes, or by the integer
matrix units. The second takes the most promising chunks of a query, scores their rows by code,
picks the most promising rows, scores those in full and sorts them. No row outside the pick has a
larger cosine than the bound returned. A small kernel before them normalises and codes the queries
at once: for few queries every launch counts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops._coded_kernels import TILE, chunk_bounds_kernel, encode_kernel, select_kernel
from moe_jax.ops._kernel_parts import (
    Found,
    fits_offsets,
    found_shapes,
    launch,
    step_of,
    takes_width,
)
from moe_jax.ops.code import Code

__all__ = [
    "LARGE_K",
    "MANY_ROWS",
    "MAX_K",
    "find",
    "is_supported",
    "num_bounds",
    "num_to_pick",
    "pick",
]

MAX_K = 48
"""The largest k that these kernels are meant for."""

LARGE_K = 25
"""From this k on, they take at most `MANY_ROWS` rows."""

MANY_ROWS = 2**22

_MANY = 1024  # queries that fill a GPU with programs of four warps
_FEW_ROWS = 2**18
# What leaves room in the registers of a program: bounds of chunks, in the quick search and in the
# certain one, and of rows, in eight warps and in four.
_QUICK_CHUNKS, _CERTAIN_CHUNKS = 8192, 16384
_ROWS, _ROWS_IN_FOUR_WARPS = 8192, 4096


def is_supported(num_rows: int, dim: int, k: int) -> bool:
    """Whether the kernels can take such sizes: at least a tile of rows, and a width in whole steps.

    The bounds of all rows in the picked chunks have to fit a program's registers.
    """
    has_room = k < LARGE_K or (k <= MAX_K and num_rows <= MANY_ROWS)
    return has_room and num_rows >= TILE and takes_width(dim) and fits_offsets(num_rows, dim)


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
        has_room = 128 * _rows_per_chunk(num_rows, _CERTAIN_CHUNKS) <= _ROWS
        # Many queries of few rows: looking again at those left open is the quicker way.
        return 128 if has_room and (num_queries < _MANY or num_rows >= _FEW_ROWS) else 64
    if k <= 11:
        return 16 if k == 1 or num_queries >= _MANY else 32
    return 32 if k < LARGE_K else 64


def pick(
    queries: Float[Array, "Q D"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    num_picked: int,
    *,
    interpret: bool = False,
) -> tuple[Int[Array, "Q F"], Float[Array, "Q"]]:
    """Pick the rows that may have the largest cosines to each query.

    Args:
      queries: float32 [Q, D], of any length.
      table: codes of N unit vectors.
      is_candidate: bool [N], the rows that may be picked.
      num_picked: F, a power of two from 16.
      interpret: run the kernels as ordinary operations, on any device, to test them.

    Returns:
      The rows, N where there are fewer, in no order; and a bound on the cosine of every candidate
      that was not picked. Both mean nothing for a query without a direction.
    """
    outputs = (
        jax.ShapeDtypeStruct((queries.shape[0], num_picked), jnp.int32),
        jax.ShapeDtypeStruct((queries.shape[0],), jnp.float32),
    )
    # In two parts a bound is higher than it need be, which does not matter where it has room.
    parts = 2 if num_picked >= 128 else 1
    how = {"num_picked": num_picked, "parts": parts, "max_chunks": _CERTAIN_CHUNKS}
    return _select(queries, (), table, is_candidate, outputs, interpret=interpret, **how)


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
    # Even if all of the best lie in one part, it has room for them.
    parts = 2 if num_picked >= 3 * k else 1
    how = {"num_picked": num_picked, "parts": parts, "max_chunks": _QUICK_CHUNKS}
    outputs = found_shapes(queries.shape[0], k)
    return _select(queries, (keys,), table, is_candidate, outputs, interpret=interpret, **how)


def _select(
    queries: Float[Array, "Q D"],
    keys: tuple[Array, ...],
    table: Code,
    is_candidate: Bool[Array, "N"],
    outputs: Any,
    *,
    num_picked: int,
    parts: int,
    max_chunks: int,
    interpret: bool,
) -> Any:
    num_queries, num_rows = queries.shape[0], table.code.shape[0]
    rows_per_chunk = _rows_per_chunk(num_rows, max_chunks)
    coded = _encode(queries, interpret=interpret)
    per_tile = TILE // min(rows_per_chunk, TILE)
    bounds = _chunk_bounds(*coded, table, is_candidate, per_tile, interpret=interpret)
    joined = max(1, rows_per_chunk // TILE)
    if joined > 1:
        pad = -bounds.shape[1] % joined
        bounds = jnp.pad(bounds, ((0, 0), (0, pad)), constant_values=-jnp.inf)
        bounds = jnp.max(bounds.reshape(bounds.shape[0], -1, joined), axis=2)
    how = {"num_picked": num_picked, "rows_per_chunk": rows_per_chunk, "parts": parts}
    is_small = num_picked <= 32 or num_picked * rows_per_chunk <= _ROWS_IN_FOUR_WARPS
    is_small = is_small and bounds.shape[1] <= _QUICK_CHUNKS
    inputs = (bounds, queries, table.code, table.scale, table.error, is_candidate, *keys)
    return launch(
        functools.partial(select_kernel, **how), (num_queries,), inputs, outputs,
        num_warps=4 if num_queries >= _MANY and is_small else 8, num_stages=2, interpret=interpret,
    )  # fmt: skip


def num_bounds(num_rows: int) -> int:
    """How many numbers each query takes on the device, at most."""
    per_tile = TILE // min(_rows_per_chunk(num_rows, _CERTAIN_CHUNKS), TILE)
    return -(-num_rows // TILE) * per_tile


def _rows_per_chunk(num_rows: int, max_chunks: int) -> int:
    """The least power of two, from 16, that keeps the number of chunks small."""
    size = 16
    while -(-num_rows // TILE) * TILE > size * max_chunks:
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
    per_tile: int,
    *,
    interpret: bool,
) -> Float[Array, "P C"]:
    """An upper bound on the cosine, but for the query's own error, over each chunk of rows."""
    num_queries, dim = code.shape
    num_rows = table.code.shape[0]
    block = _query_block(num_queries)
    tiles = -(-num_rows // TILE)
    step = step_of(dim, 256 if block < 128 else 128)
    kernel = functools.partial(chunk_bounds_kernel, block=block, step=step, per_tile=per_tile)
    bounds = jax.ShapeDtypeStruct((num_queries, tiles * per_tile), jnp.float32)
    return launch(
        kernel, (tiles, num_queries // block), (code, scale, *table, is_candidate), bounds,
        num_warps=4 if block < 128 else 8, interpret=interpret,
    )  # fmt: skip
