"""Searches by matmul of queries with keys.

Keys are taken in chunks where a matmul makes something of them first, parts in 16 bits or limbs:
several times as large as the keys, that would not fit for millions at once. On CPUs chunks are so
short that their scores stay in the cache.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.search._groups import best_by_groups
from moe_jax.ops.similarity import dot_rows, exact_cosine
from moe_jax.ops.top_k import top_k

__all__ = ["best_of_all", "keys_at_once", "pick", "roughly_best"]

_CHUNK = 2**18
_OVERFETCH = 8
_FEW = 32

# On CPUs: queries that are worth groups, groups for each that is searched, keys in a chunk, and
# keys that share a maximum.
_MANY = 64
_SPARE = 20
_SHORT_CHUNK = 2000
_EXACT_CHUNK = 2**10
_GROUP = 10

_Top = tuple[Float[Array, "Q k"], Int[Array, "Q k"]]


def keys_at_once(num_keys: int) -> int:
    """So many scores of a query exist at a time."""
    # CPUs multiply the keys as they are, and a chunk of them would be copied.
    return min(num_keys, _CHUNK) if jax.default_backend() == "gpu" else num_keys


def pick(
    queries: Float[Array, "Q D"], keys: Float[Array, "N D"], mask: Bool[Array, "#Q N"], k: int
) -> tuple[Int[Array, "Q F"], Float[Array, "Q"]]:
    """Somewhat more than k keys that are close to each query.

    Args:
      queries: unit vectors (or zeros).
      keys: likewise.
      mask: the keys that may be chosen.
      k: how many matter.

    Returns:
      ids [Q, F], N where there are fewer, and a bound [Q] on the cosine of what is left out.
    """
    num_keys, dim = keys.shape
    rough, picked = roughly_best(queries, keys, mask, min(num_keys, k + _OVERFETCH))
    # A float32 dot product of unit vectors is off by at most its length times 2**-24, and leaving
    # out the product of two second parts costs 3 * 2**-18; both ends may be off.
    slack = (3 * dim + 8) * 2.0**-23 + 2.0**-15
    return jnp.where(rough > -jnp.inf, picked, num_keys), rough[:, -1] + slack


def roughly_best(
    queries: Float[Array, "Q D"], keys: Float[Array, "N D"], mask: Bool[Array, "#Q N"], k: int
) -> _Top:
    """The best k by cosines that are rounded as float32 sums are; -inf where masked."""
    num_keys = keys.shape[0]
    is_worth_it = queries.shape[0] >= _MANY and num_keys >= max(
        8 * _SHORT_CHUNK, _SPARE * _GROUP * k
    )
    if jax.default_backend() == "cpu" and is_worth_it:

        def score(start: Int[Array, ""], size: int) -> Float[Array, "C Q"]:
            part = jax.lax.dynamic_slice_in_dim(keys, start, size)
            return jax.lax.optimization_barrier(dot_rows(part, queries))

        return best_by_groups(
            score, queries, keys, mask, k, num_groups=k, chunk=_SHORT_CHUNK, group=_GROUP
        )
    return _best(_rough, queries, keys, mask, k, keys_at_once(num_keys))


def best_of_all(
    queries: Float[Array, "Q D"], keys: Float[Array, "N D"], mask: Bool[Array, "#Q N"], k: int
) -> _Top:
    """The best k by exact cosines, every key being scored; -inf where masked."""
    size = _EXACT_CHUNK if jax.default_backend() == "cpu" else _CHUNK
    return _best(exact_cosine, queries, keys, mask, k, size)


def _best(
    score: Callable[[Array, Array], Array],
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    mask: Bool[Array, "#Q N"],
    k: int,
    size: int,
) -> _Top:
    """The k largest of `score(queries, keys)`, ties to the lower key, `size` keys at a time."""
    num_keys, size = keys.shape[0], max(k, size)
    if num_keys <= size:
        return top_k(jnp.where(mask, score(queries, keys), -jnp.inf), k)

    def of_chunk(first: Int[Array, ""]) -> _Top:
        start = jnp.minimum(first, num_keys - size)
        own = jax.lax.dynamic_slice_in_dim(mask, start, size, 1)
        # The last chunk reaches back to keys of the one before.
        own = own & (start + jnp.arange(size) >= first)[None]
        part = jax.lax.dynamic_slice_in_dim(keys, start, size)
        best, at = top_k(jnp.where(own, score(queries, part), -jnp.inf), k)
        return best, start + at

    # [chunks, Q, k] to [Q, chunks * k]: equal scores stay in the order of their keys.
    best, ids = (
        jax.lax.collapse(jnp.moveaxis(x, 0, 1), 1, 3)
        for x in jax.lax.map(of_chunk, jnp.arange(0, num_keys, size, dtype=jnp.int32))
    )
    best, at = top_k(best, k)
    return best, jnp.take_along_axis(ids, at, axis=1)


def _rough(queries: Float[Array, "Q D"], keys: Float[Array, "N D"]) -> Float[Array, "Q N"]:
    # Parting all keys costs more than the slower products of few queries.
    if jax.default_backend() == "gpu" and queries.shape[0] > _FEW:
        return jax.lax.platform_dependent(queries, keys, cuda=_cosine_in_parts, default=dot_rows)
    return dot_rows(queries, keys)


def _cosine_in_parts(
    queries: Float[Array, "Q D"], keys: Float[Array, "N D"]
) -> Float[Array, "Q N"]:
    """`dot_rows` by the bfloat16 matrix units: x = first + second, leaving out second.second."""

    def parts(x: Float[Array, "I D"]) -> tuple[Array, Array]:
        # A mere cast to bfloat16 and back may be optimised away.
        first = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return first.astype(jnp.bfloat16), (x - first).astype(jnp.bfloat16)

    (q0, q1), (k0, k1) = parts(queries), parts(keys)
    left, right = jnp.concatenate([q0, q0, q1], 1), jnp.concatenate([k0, k1, k0], 1)
    return jnp.matmul(left, right.T, preferred_element_type=jnp.float32)
