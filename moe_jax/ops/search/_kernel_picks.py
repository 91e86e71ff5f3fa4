"""Picking the largest of many bounds in the search kernels for NVIDIA GPUs."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Float, Int
from moe_jax.ops._hardware import triton as plgpu

__all__ = ["chunk_of", "largest", "largest_chunks", "largest_within", "parts_for", "row_of"]

_LOWEST = -(2**31)


def largest(
    bound: Float[Array, "C"], count: int, parts: int = 1
) -> tuple[Int[Array, "F"], Float[Array, ""]]:
    """Positions of the largest bounds, C where none is left; bound of the rest.

    Value and position share one integer, so that one reduction finds both: bounds, which lie in
    [-2, 2], are rounded up to as many bits as the position leaves.

    Args:
      bound: float32 [C].
      count: F.
      parts: the largest F / parts of every so-manieth bound are taken at once, which takes one
        reduction for so many. A power of two, as F and C are.
    """
    size = bound.shape[0]
    bits = max(size - 1, 1).bit_length()
    steps = 2.0 ** (29 - bits)
    place = jax.lax.iota(jnp.int32, size)
    packed = jnp.ceil(jnp.clip(bound, -2.0, 2.0) * steps).astype(jnp.int32)
    packed = packed * 2**bits + (2**bits - 1 - place)
    packed = jnp.where(bound > -jnp.inf, packed, _LOWEST).reshape(size // parts, parts)
    slot = jax.lax.iota(jnp.int32, count // parts)[:, None]

    def take(i, state):
        packed, taken = state
        best = jnp.max(packed, axis=0)
        own = jnp.where(best > _LOWEST, 2**bits - 1 - (best & (2**bits - 1)), size)
        taken = jnp.where(slot == i, own[None, :], taken)
        return jnp.where(packed == best[None, :], _LOWEST, packed), taken

    state = (packed, jnp.full((count // parts, parts), size, jnp.int32))
    packed, taken = jax.lax.fori_loop(0, count // parts, take, state)
    rest = jnp.max(jnp.max(packed, axis=0))
    bound = ((rest >> bits) + 1).astype(jnp.float32) / steps
    return taken.reshape(count), jnp.where(rest > _LOWEST, bound, -jnp.inf)


def parts_for(k: int, num_picked: int) -> int:
    """In how many parts to pick for the best k: even if all lie in one, it has room for them."""
    return 2 if num_picked >= 3 * k else 1


def largest_chunks(
    bound_ref, query: Array, count: int, parts: int = 1
) -> tuple[Int[Array, "F"], Float[Array, ""]]:
    """The chunks with a query's largest bounds, from C on where there are fewer; bound of the rest.

    Args:
      bound_ref: float32 [Q, C].
      query: which row of it.
      count: F.
      parts: see `largest`.
    """
    num_chunks = bound_ref.shape[1]
    chunk = jax.lax.iota(jnp.int32, pl.next_power_of_2(num_chunks))
    bound = plgpu.load(bound_ref.at[query, chunk], mask=chunk < num_chunks, other=-jnp.inf)
    return largest(bound, count, parts)


def largest_within(
    bound_ref,
    query: Array,
    chunks: Int[Array, "G"],
    per_chunk: int,
    count: int,
    parts: int = 1,
) -> tuple[Int[Array, "F"], Float[Array, ""]]:
    """Where a query's largest bounds in some chunks are, B where none is left; bound of the rest.

    Args:
      bound_ref: float32 [Q, B].
      query: which row of it.
      chunks: each of `per_chunk` bounds in a row; those that lie beyond B count for nothing.
      per_chunk: a power of two.
      count: F.
      parts: see `largest`.
    """
    num_bounds = bound_ref.shape[1]
    position = jax.lax.iota(jnp.int32, chunks.shape[0] * per_chunk)
    at = chunk_of(position, 0, chunks, per_chunk) * per_chunk + position % per_chunk
    is_there = at < num_bounds
    at = jnp.where(is_there, at, 0)
    bound = plgpu.load(bound_ref.at[query, at], mask=is_there, other=-jnp.inf)
    picked, rest = largest(bound, count, parts)
    at = row_of(picked, chunks, per_chunk)
    return jnp.where(picked < position.shape[0], at, num_bounds), rest


def chunk_of(
    position: Int[Array, "P"], first: Array | int, chunks: Int[Array, "F"], rows_per_chunk: int
) -> Int[Array, "P"]:
    """The chunk of each position, counted through some chunks end to end.

    Args:
      position: P in a row, from `first` on; P and `rows_per_chunk` are powers of two.
      first: a multiple of P.
      chunks: the chunks.
      rows_per_chunk: positions in a chunk.
    """
    if chunks.shape[0] <= 32 and position.shape[0] <= 512:
        return _entries(chunks, position // rows_per_chunk)
    # Every position against every chunk would not fit the registers.
    count = max(1, position.shape[0] // rows_per_chunk)
    mine = first // rows_per_chunk + jax.lax.iota(jnp.int32, count)
    own = _entries(chunks, mine)
    return jnp.broadcast_to(own[:, None], (count, position.shape[0] // count)).reshape(-1)


def row_of(
    position: Int[Array, "P"], chunks: Int[Array, "F"], rows_per_chunk: int
) -> Int[Array, "P"]:
    """The row at each of a few positions, counted through some chunks end to end."""
    own = _entries(chunks, position // rows_per_chunk)
    return own * rows_per_chunk + position % rows_per_chunk


def _entries(values: Int[Array, "F"], at: Int[Array, "P"]) -> Int[Array, "P"]:
    """`values[at]` of what is in registers, zero beyond the end."""
    slot = jax.lax.iota(jnp.int32, values.shape[0])
    return jnp.sum(jnp.where(at[:, None] == slot[None, :], values[None, :], 0), axis=1)
