"""First pass of a search over eight-bit codes in plain XLA, for a few queries on a CPU.

One query is as fast as its keys are read, and codes are a quarter of them. For many queries the
matrix units win, which on a CPU multiply float32 alone.
"""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.search.code import Code, encode
from moe_jax.ops.top_k import top_k

__all__ = ["MAX_QUERIES", "MIN_ROWS", "NEEDS", "is_supported", "num_to_pick", "pick"]

NEEDS = "a width that 64 divides, up to 4096"
"""What `is_supported` asks for, in words."""

MAX_QUERIES = 2
"""So many queries take less time by codes than by a matmul."""

MIN_ROWS = 2**14
"""So many rows are worth a pass of their own."""

_LANES = 32


def is_supported(num_rows: int, dim: int, k: int) -> bool:
    """Whether vectors come in whole pairs of lanes, not so many that compiling takes long."""
    del num_rows, k
    return dim % (2 * _LANES) == 0 and dim <= 4096


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
    """Pick the rows that may have the largest cosines to each query.

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
    dots = jnp.stack([_products(table.code, query) for query in coded.code])
    bound = dots.astype(jnp.float32) * coded.scale[:, None] * table.scale[None]
    if is_certain:
        # What a query's code has in common with a row's own rounding, and its own with any row.
        bound += table.error[None] * (1.0 + coded.error[:, None]) + coded.error[:, None]
    bound, rows = top_k(jnp.where(mask[None], bound, -jnp.inf), num_picked)
    rows = jnp.where(bound > -jnp.inf, rows, table.code.shape[0])
    return rows, bound[:, -1] + 1e-5  # all the roundings of a bound


def _products(code: Int[Array, "N D"], query: Int[Array, "D"]) -> Int[Array, "N"]:
    """Dot products of rows with one vector.

    XLA on CPUs takes a plain sum of products an entry at a time. Sums of whole lanes it takes a
    register at a time, and two products of codes, each up to 127, fit 16 bits.
    """
    # Inside a loop over queries, XLA would convert all rows before the loop, and store them.
    code, query = jax.lax.optimization_barrier((code, query))
    rows = code.reshape(code.shape[0], -1, 2, _LANES)
    parts = query.astype(jnp.int16).reshape(-1, 2, 1, _LANES)
    total = jnp.zeros((code.shape[0], _LANES), jnp.int32)
    for i in range(rows.shape[1]):
        pair = [rows[:, i, j].astype(jnp.int16) * parts[i, j] for j in range(2)]
        total = total + (pair[0] + pair[1]).astype(jnp.int32)
    return jax.lax.optimization_barrier(jnp.sum(total, axis=1))
