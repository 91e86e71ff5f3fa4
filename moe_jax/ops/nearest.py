"""Nearest neighbours by exact cosine among masked rows."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.similarity import exact_cosine, exact_cosine_pairs
from moe_jax.ops.top_k import top_k

__all__ = ["nearest"]

_OVERFETCH = 8


@functools.partial(jax.jit, static_argnames="k")
def nearest(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    is_candidate: Bool[Array, "Q N"],
    k: int,
    floor: ArrayLike = -1.0,
) -> tuple[Int[Array, "Q k"], Float[Array, "Q k"]]:
    """The k keys with the largest exact cosine to each query, ties to the lower index.

    A float32 matmul picks a few more than k keys, and only those are scored exactly. Should
    the pick be too close to call (more near-ties at its end than its rounding can tell apart),
    every key is scored exactly instead, so the answer never depends on the pick.

    Args:
      queries: float32 [Q, D], unit vectors (or zeros) from `moe_jax.ops.similarity.normalize`.
      keys: float32 [N, D], likewise.
      is_candidate: bool [Q, N], which keys each query may choose.
      k: how many, between 1 and N.
      floor: scores below it need not be told apart; a scalar.

    Returns:
      (ids [Q, k] int32, with N where there are fewer than k candidates, and scores [Q, k]
      float32, with -inf there), best first.

    Example:
      >>> keys = jnp.eye(3)
      >>> ids, scores = nearest(keys[:1], keys, jnp.ones((1, 3), bool), 2)
      >>> ids.tolist(), scores.tolist()
      ([[0, 1]], [[1.0, 0.0]])
    """
    num_keys, dim = keys.shape
    rough = jax.lax.platform_dependent(queries, keys, cuda=_cosine_in_parts, default=_cosine)
    rough = jnp.where(is_candidate, rough, -jnp.inf)
    fetch = min(num_keys, k + _OVERFETCH)
    rough, picked = top_k(rough, fetch)
    ids, scores = _best_of_picked(queries, keys, picked, rough > -jnp.inf, k)
    if fetch == num_keys:
        return ids, scores

    def score_all() -> tuple[Array, Array]:
        score = jnp.where(is_candidate, exact_cosine(queries, keys), -jnp.inf)
        best, index = top_k(score, k)
        return jnp.where(best > -jnp.inf, index, num_keys), best

    # A float32 dot product of unit vectors is off by at most its length times 2**-24, and leaving
    # out the product of two second parts costs 3 * 2**-18; both ends may be off.
    slack = (3 * dim + 8) * 2.0**-23 + 2.0**-15
    last = rough[:, -1]
    is_close = (last > -jnp.inf) & (last + slack >= jnp.maximum(scores[:, -1], floor))
    return jax.lax.cond(jnp.any(is_close), score_all, lambda: (ids, scores))


def _cosine(queries: Float[Array, "Q D"], keys: Float[Array, "N D"]) -> Float[Array, "Q N"]:
    return jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)


def _cosine_in_parts(
    queries: Float[Array, "Q D"], keys: Float[Array, "N D"]
) -> Float[Array, "Q N"]:
    """As `_cosine`, by the bfloat16 matrix units: x = first + second, leaving out second.second."""

    def parts(x: Float[Array, "I D"]) -> tuple[Array, Array]:
        # A mere cast to bfloat16 and back may be optimised away.
        first = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return first.astype(jnp.bfloat16), (x - first).astype(jnp.bfloat16)

    (q0, q1), (k0, k1) = parts(queries), parts(keys)
    left, right = jnp.concatenate([q0, q0, q1], 1), jnp.concatenate([k0, k1, k0], 1)
    return jnp.matmul(left, right.T, preferred_element_type=jnp.float32)


def _best_of_picked(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    picked: Int[Array, "Q F"],
    is_candidate: Bool[Array, "Q F"],
    k: int,
) -> tuple[Int[Array, "Q k"], Float[Array, "Q k"]]:
    """Score the picked keys exactly and sort them by (score descending, index ascending)."""
    chosen = keys[picked]
    score = exact_cosine_pairs(jnp.broadcast_to(queries[:, None, :], chosen.shape), chosen)
    negated = jnp.where(is_candidate, -score, jnp.inf)
    index = jnp.where(is_candidate, picked, keys.shape[0])
    negated, index = jax.lax.sort((negated, index), dimension=-1, num_keys=2)
    return index[:, :k], -negated[:, :k]
