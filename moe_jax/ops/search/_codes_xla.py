"""First pass of a search over eight-bit codes in plain XLA, for CPUs.

The libraries that XLA calls on CPUs multiply eight-bit integers several times as fast as float32
numbers, and codes are a quarter of the keys to read.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.search._groups import best_by_groups
from moe_jax.ops.search.code import Code, encode
from moe_jax.ops.top_k import top_k

__all__ = ["MAX_QUERIES", "MIN_ROWS", "best_of_groups", "is_fast", "num_to_pick", "pick"]

MAX_QUERIES = 4
"""So many queries have enough rows scored in full to be certain, in less time than a matmul."""

MIN_ROWS = 2**15
"""So many rows are worth a pass of their own."""

_FEWEST = 4  # queries for which XLA calls a library
_CHUNK, _GROUP, _NUM_GROUPS = 4096, 4, 64
_FEW_QUERIES = 32  # a chunk's copy takes longer than to store the products of so few


@functools.cache
def is_fast() -> bool:
    """Whether a library multiplies codes: XLA's own loop takes a nanosecond for each product."""
    row = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int8)
    text = jax.jit(_products).lower(row((256, 64)), row((8, 64))).compile().as_text()
    return "kind=kCustom" in text or "custom-call" in text


def num_to_pick(k: int, num_rows: int, *, is_certain: bool) -> int:
    """How many rows to score in full for the best k.

    Args:
        k: how many are wanted.
        num_rows: among so many.
        is_certain: take so many that their bounds mostly tell that no other row is one of the
            best. Of 100,000 keys of texts 512 do so for 97 queries in a hundred, 128 for 78; of
            the ten nearest, 512 hold all and 128 hold 0.998.
    """
    return min(num_rows, max(512, 8 * k) if is_certain else max(128, 4 * k))


def pick(
    queries: Float[Array, "Q D"],
    table: Code,
    mask: Bool[Array, "N"],
    num_picked: int,
    *,
    is_certain: bool,
) -> tuple[Int[Array, "Q F"], Float[Array, "Q"]]:
    """Pick the rows that may have the largest cosines to each of a few queries.

    Args:
      queries: float32 [Q, D], unit vectors (or zeros).
      table: codes of N unit vectors.
      mask: bool [N], the rows that may be picked.
      num_picked: F.
      is_certain: pick by bounds on the cosines, not by estimates of them, which find more of the
        best where rows are coded more or less coarsely.

    Returns:
      The rows, N where there are fewer; and, if certain, a bound on the cosine of every candidate
      that was not picked.
    """
    coded = encode(queries)
    dots = _products(table.code, coded.code).T
    bound = dots.astype(jnp.float32) * coded.scale[:, None] * table.scale[None]
    if is_certain:
        # What a query's code has in common with a row's own rounding, and its own with any row.
        bound += table.error[None] * (1.0 + coded.error[:, None]) + coded.error[:, None]
    bound, rows = top_k(jnp.where(mask[None], bound, -jnp.inf), num_picked)
    rows = jnp.where(bound > -jnp.inf, rows, table.code.shape[0])
    return rows, bound[:, -1] + 1e-5  # all the roundings of a bound


def best_of_groups(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    table: Code,
    mask: Bool[Array, "N"],
    k: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The best k, by float32 sums, of the groups of rows that are best by their codes.

    Of the ten nearest of 100,000 keys of texts, the 64 best groups of four hold 0.998.

    Args:
      queries: float32 [Q, D], unit vectors (or zeros).
      keys: float32 [N, D], unit vectors (or zeros).
      table: their codes.
      mask: bool [N], the rows that may be chosen.
      k: how many.

    Returns:
      Scores, -inf where masked, and rows.
    """
    coded = encode(queries).code
    chunk = keys.shape[0] if queries.shape[0] <= _FEW_QUERIES else _CHUNK

    def score(start: Int[Array, ""], size: int) -> Float[Array, "C Q"]:
        part, scale = (
            jax.lax.dynamic_slice_in_dim(x, start, size) for x in (table.code, table.scale)
        )
        # By which a query's own scale changes nothing.
        return _products(part, coded).astype(jnp.float32) * scale[:, None]

    return best_by_groups(
        score, queries, keys, mask[None], k,
        num_groups=max(_NUM_GROUPS, 2 * k), chunk=chunk, group=_GROUP,
    )  # fmt: skip


def _products(code: Int[Array, "N D"], queries: Int[Array, "Q D"]) -> Int[Array, "N Q"]:
    """Dot products of rows and queries, which is the faster way round."""
    num_queries = queries.shape[0]
    queries = jnp.pad(queries, ((0, max(0, _FEWEST - num_queries)), (0, 0)))
    dots = jax.lax.dot_general(
        code, queries, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    # The barrier keeps what follows from being computed entry by entry with the products.
    return jax.lax.optimization_barrier(dots)[:, :num_queries]
