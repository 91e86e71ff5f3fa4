"""Parts of the search kernels for NVIDIA GPUs: directions of queries, full scores."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops._hardware import triton as plgpu

__all__ = [
    "Direction",
    "Found",
    "code_of",
    "direction",
    "fits_offsets",
    "found_shapes",
    "load_queries",
    "score_and_store",
    "step_of",
    "takes_width",
    "unit_of",
]

_LARGEST_CODE = 126.6  # rounds to at most 127 whatever the last bits are
_AT_ONCE = 16384  # coordinates of keys that one program reads in one step


class Direction(NamedTuple):
    """What takes vectors x to unit vectors, x * shift * to_unit, and codes, x * shift * to_code.

    Attributes:
      shift: [Q], a power of two that keeps squares within float32; 0 for no direction.
      to_unit: [Q].
      to_code: [Q].
      scale: [Q], which takes codes to about the unit vectors; 0 for no direction.
    """

    shift: Float[Array, "Q"]
    to_unit: Float[Array, "Q"]
    to_code: Float[Array, "Q"]
    scale: Float[Array, "Q"]


class Found(NamedTuple):
    """The rows found for each query, by descending score, then ascending id.

    Attributes:
      ids: int32 [Q, k], N where there are fewer.
      scores: float32 [Q, k], cosines as a float32 sum gives them; 0 where there are fewer.
      is_found: bool [Q, k].
      unseen: float32 [Q], a bound on the cosine of every candidate that was not picked.
    """

    ids: Int[Array, "Q k"]
    scores: Float[Array, "Q k"]
    is_found: Bool[Array, "Q k"]
    unseen: Float[Array, "Q"]


def found_shapes(num_queries: int, k: int) -> Found:
    """Shapes and dtypes of `Found`."""
    shape = (num_queries, k)
    dtypes = (jnp.int32, jnp.float32, jnp.bool_)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]
    return Found(*arrays, jax.ShapeDtypeStruct((num_queries,), jnp.float32))


def fits_offsets(num_rows: int, dim: int) -> bool:
    """Whether kernels can point into a table of bytes.

    Pallas counts in 32 bits up to 2**32 bytes, and Triton takes that count as signed.
    """
    return not 2**31 < num_rows * dim <= 2**32


def takes_width(dim: int) -> bool:
    """Whether the kernels can take vectors so wide: whole steps, and a vector in registers."""
    return dim % 64 == 0 and dim <= 4096


def step_of(dim: int, at_most: int) -> int:
    """The largest power of two up to `at_most` that divides a multiple of 64."""
    step = 64
    while step * 2 <= at_most and dim % (step * 2) == 0:
        step *= 2
    return step


def load_queries(query_ref, first: Array, count: int) -> Array:
    """Queries from `first` on, [count, D up to the next power of two], zeros beyond the ends."""
    num_queries, dim = query_ref.shape
    at = first + jax.lax.iota(jnp.int32, count)
    column = jax.lax.iota(jnp.int32, pl.next_power_of_2(dim))
    return plgpu.load(
        query_ref.at[jnp.minimum(at, num_queries - 1)[:, None], column[None, :]],
        mask=(at < num_queries)[:, None] & (column < dim)[None, :],
        other=0.0,
    )


def direction(x: Float[Array, "Q D"]) -> Direction:
    """The directions of vectors; zero, subnormal and unfinished ones have none."""
    top = jnp.max(jnp.abs(x), axis=1)
    num_bad = jnp.sum(jnp.where(jnp.abs(x) < jnp.inf, 0, 1), axis=1)  # counts NaN, too
    is_sound = (num_bad == 0) & (top >= 2.0**-126)
    shift = jnp.where(top < 2.0**-40, 2.0**100, jnp.where(top > 2.0**40, 2.0**-100, 1.0))
    shift = jnp.where(is_sound, shift, 0.0)
    x = jnp.where(is_sound[:, None], x * shift[:, None], 0.0)
    length = jnp.where(is_sound, jnp.sqrt(jnp.sum(x * x, axis=1)), 1.0)
    top = jnp.where(is_sound, top * shift, 1.0)
    to_unit = jnp.where(is_sound, 1.0 / length, 0.0)
    to_code = jnp.where(is_sound, _LARGEST_CODE / top, 0.0)
    return Direction(shift, to_unit, to_code, top * to_unit * (1.0 / _LARGEST_CODE))


def unit_of(x: Float[Array, "Q D"], towards: Direction) -> Float[Array, "Q D"]:
    """Unit vectors, zero without a direction."""
    return _shifted(x, towards) * towards.to_unit[:, None]


def code_of(x: Float[Array, "Q D"], towards: Direction) -> Float[Array, "Q D"]:
    """Vectors in whole steps from -127 to 127."""
    return jnp.floor(_shifted(x, towards) * towards.to_code[:, None] + 0.5)


def _shifted(x: Float[Array, "Q D"], towards: Direction) -> Float[Array, "Q D"]:
    shift = towards.shift[:, None]
    return jnp.where(shift > 0, x * shift, 0.0)


def score_and_store(
    ids: Int[Array, "F"], query: Array, query_ref, key_ref, towards: Direction, out: Found
) -> None:
    """Score the picked rows in full, and store the best of them in order."""
    num_picked, k = ids.shape[0], out.ids.shape[1]
    num_rows, dim = key_ref.shape
    step = step_of(dim, max(64, _AT_ONCE // num_picked))

    def add(i, total):
        at = i * step + jax.lax.iota(jnp.int32, step)
        key = plgpu.load(key_ref.at[jnp.minimum(ids, num_rows - 1)[:, None], at[None, :]])
        x = unit_of(query_ref[query, pl.ds(i * step, step)][None, :], towards)
        return total + jnp.sum(key * x, axis=1)

    score = jax.lax.fori_loop(0, dim // step, add, jnp.zeros(num_picked, jnp.float32))
    is_sound = jnp.max(towards.shift) > 0
    is_found = (ids < num_rows) & is_sound
    ids = jnp.where(is_found, ids, num_rows)
    score = jnp.where(is_found, score, -jnp.inf)
    # Each goes where as many as are before it leave it; those that are not there come last.
    order = jnp.where(is_found, ids, num_rows + jax.lax.iota(jnp.int32, num_picked))
    is_before = (score[None, :] > score[:, None]) | (
        (score[None, :] == score[:, None]) & (order[None, :] < order[:, None])
    )
    rank = jnp.sum(is_before.astype(jnp.int32), axis=1)
    values = (ids, jnp.where(is_found, score, 0.0), is_found)
    for ref, value in zip(out[:3], values, strict=True):
        plgpu.store(ref.at[query, rank], value, mask=rank < k)
