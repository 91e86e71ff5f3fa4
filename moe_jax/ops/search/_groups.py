"""The best rows by way of the best groups of rows, for many queries on a CPU."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.top_k import top_k

__all__ = ["best_by_groups"]

_AT_ONCE = 2**19  # coordinates of keys that are scored at a time
_PER_MAXIMUM = 8  # maxima of groups that are looked at as one, first


def best_by_groups(
    score: Callable[[Int[Array, ""], int], Float[Array, "C Q"]],
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    mask: Bool[Array, "#Q N"],
    k: int,
    *,
    num_groups: int,
    chunk: int,
    group: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The k best of the rows in the groups with the largest maxima, scored in float32.

    Scores are not kept, which would cost more than to compute those of a few groups again. Where
    `score` is what rows are scored by in the end, too, k groups hold the k best.

    Args:
      score: takes the first row of a chunk and its length, and gives what orders the rows.
      queries: float32 [Q, D], unit vectors (or zeros).
      keys: float32 [N, D], likewise.
      mask: the rows that may be chosen.
      k: how many.
      num_groups: how many groups of each query are searched.
      chunk: rows at a time, N or a multiple of `group`.
      group: rows that share a maximum.

    Returns:
      Scores, -inf where masked, and rows; ties to the lower row.
    """
    num_keys, num_queries = keys.shape[0], queries.shape[0]
    chunk = min(chunk, num_keys)
    per_chunk = -(-chunk // group)

    def maxima(first: Int[Array, ""]) -> Float[Array, "G Q"]:
        # The last chunk reaches back to rows of the one before.
        start = jnp.minimum(first, num_keys - chunk)
        own = jax.lax.dynamic_slice_in_dim(mask, start, chunk, 1)
        own = own & (start + jnp.arange(chunk) >= first)[None]
        scores = jnp.where(own.T, score(start, chunk), -jnp.inf)
        fill = ((0, per_chunk * group - chunk), (0, 0))
        scores = jnp.pad(scores, fill, constant_values=-jnp.inf)
        return jnp.max(scores.reshape(per_chunk, group, num_queries), axis=1)

    chunks = jnp.arange(0, num_keys, chunk, dtype=jnp.int32)
    best = jax.lax.map(maxima, chunks).reshape(-1, num_queries).T
    best = top_k(best, min(num_groups, best.shape[1]), chunk_size=_PER_MAXIMUM)[1]
    best = jnp.sort(best, axis=1)  # equal scores stay in the order of their rows
    first = best // per_chunk * chunk
    row = jnp.minimum(first, num_keys - chunk) + best % per_chunk * group
    row = row[:, :, None] + jnp.arange(group, dtype=jnp.int32)[None, None]
    own = (row >= first[:, :, None]) & (row < num_keys)
    own = own.reshape(num_queries, -1)
    row = jnp.minimum(row.reshape(own.shape), num_keys - 1)
    own = own & (mask[0][row] if mask.shape[0] == 1 else jnp.take_along_axis(mask, row, axis=1))

    def cosine(queries: Array, row: Array) -> Array:
        dots = jnp.einsum("qnd,qd->qn", keys[row], queries, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.optimization_barrier(dots)

    size = max(1, _AT_ONCE // (row.shape[1] * keys.shape[1]))
    scores, at = top_k(jnp.where(own, in_blocks(cosine, (queries, row), size), -jnp.inf), k)
    return scores, jnp.take_along_axis(row, at, axis=1)
