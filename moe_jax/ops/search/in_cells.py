"""Nearest neighbours among the rows of a few cells: the search of an inverted file."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.search import _cells_gpu, _codes_gpu
from moe_jax.ops.search.code import Code
from moe_jax.ops.search.nearest import Hits
from moe_jax.ops.similarity import dot_rows, exact_cosine_at, normalize
from moe_jax.ops.top_k import top_k

__all__ = ["MAX_FUSED_K", "Lists", "can_fuse", "nearest_in_cells"]

MAX_FUSED_K = _codes_gpu.MAX_K
"""The largest k that the kernels for NVIDIA GPUs take."""

# So many rows are scored in full for each that is asked for. Keys of texts lie close together: of
# the ten nearest of a million, 0.96 are among the sixteen best by codes, 0.98 among the best 32.
_PICKED_PER_HIT = 3
# Rows up to this length are not worth two stages.
_SHORT = 1024


class Lists(NamedTuple):
    """Rows in lists, one for each cell, and rows that every search looks at.

    Attributes:
      centroids: float32 [L, D], unit vectors.
      members: int32 [L, P], rows, N in an empty place.
      overflow: int32 [V], likewise.
      counts: int32 [L], how many members each cell has; one without is not worth a probe.
    """

    centroids: Float[Array, "L D"]
    members: Int[Array, "L P"]
    overflow: Int[Array, "V"]
    counts: Int[Array, "L"]

    def num_places(self, probes: int) -> int:
        """How many places a query looks at."""
        return probes * self.members.shape[1] + self.overflow.shape[0]


def can_fuse(num_keys: int, num_cells: int, dim: int, k: int) -> bool:
    """Whether the kernels for NVIDIA GPUs can take such sizes."""
    return k <= MAX_FUSED_K and _cells_gpu.is_supported(num_keys, num_cells, dim)


def nearest_in_cells(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    code: Code,
    is_candidate: Bool[Array, "N"],
    lists: Lists,
    k: int,
    probes: int,
    *,
    accepts: Callable[[Array], Array] | None = None,
    first_pass: str = "codes",
    reproducible: bool = True,
    implementation: str = "xla",
) -> Hits:
    """The k keys with the largest cosine to each query in the cells with the nearest centroids.

    Args:
      queries: float32 [Q, D], of any length; one without a direction has no hits.
      keys: float32 [N, D], unit vectors.
      code: `encode(keys)`.
      is_candidate: bool [N], the keys that may be chosen.
      lists: the cells.
      k: how many.
      probes: how many cells each query looks into, between 1 and L.
      accepts: takes rows [Q, F] and says which may be chosen by whom; not with "pallas".
      first_pass: "codes" scores some more than k exactly, chosen by codes; "keys" scores all.
      reproducible: exact cosines, the same bits everywhere; else "pallas" takes float32 sums.
      implementation: "xla", or "pallas" where `can_fuse`, with first_pass "codes".

    Returns:
      `Hits` of shape [Q, k].

    Example:
      >>> keys = jnp.eye(2)
      >>> lists = Lists(keys, jnp.array([[0], [1]]), jnp.array([2]), jnp.ones(2, int))
      >>> candidates = jnp.ones(2, bool)
      >>> find = jax.jit(nearest_in_cells, static_argnames=("k", "probes"))
      >>> find(keys[1:], keys, encode(keys), candidates, lists, k=1, probes=1).ids.tolist()
      [[1]]
    """
    num_keys = keys.shape[0]
    if implementation == "pallas":
        num_picked = _num_to_pick(k)
        found = _cells_gpu.probe(
            queries, keys, code, is_candidate, *lists, probes, num_picked,
            num_picked if reproducible else k, interpret=jax.default_backend() != "gpu",
        )  # fmt: skip
        if not reproducible:
            return Hits(found.ids, found.scores, found.is_found)
        score = exact_cosine_at(normalize(queries), keys, jnp.minimum(found.ids, num_keys - 1))
        return _in_order(found.ids, score, found.is_found, k, num_keys)

    queries = normalize(queries)
    row = _candidates(queries, lists, probes)
    is_valid = row < num_keys
    row = jnp.minimum(row, num_keys - 1)
    is_valid &= is_candidate[row] & jnp.any(queries != 0.0, axis=1)[:, None]
    if accepts is not None:
        is_valid &= accepts(row)
    if first_pass == "codes":
        fetch = min(_PICKED_PER_HIT * k + 2, row.shape[1])
        score = _code_products(queries, code.code, row) * code.scale[row]
        score = jnp.where(is_valid, score, -jnp.inf)
        score, at = _top_k(score, fetch)
        row = jnp.take_along_axis(row, at, axis=1)
        is_valid = score > -jnp.inf
        score = exact_cosine_at(queries, keys, row)
    else:
        score = jnp.where(is_valid, exact_cosine_at(queries, keys, row), -jnp.inf)
        at = _best(score, row, min(k, row.shape[1]))
        row, score, is_valid = (jnp.take_along_axis(a, at, 1) for a in (row, score, is_valid))
    return _in_order(row, score, is_valid, k, num_keys)


def _num_to_pick(k: int) -> int:
    """How many rows the kernels score in full: a power of two up to what they hold, 64."""
    return 32 if _PICKED_PER_HIT * k <= 33 else 64


def _candidates(queries: Float[Array, "Q D"], lists: Lists, probes: int) -> Int[Array, "Q F"]:
    """The rows in the cells that each query probes and in the overflow list."""
    rows = queries.shape[0]
    cosine = jnp.where(lists.counts[None] > 0, dot_rows(queries, lists.centroids), -jnp.inf)
    _, cell = _top_k(cosine, probes)
    inside = jax.lax.collapse(lists.members[cell], 1, 3)
    overflow = jnp.broadcast_to(lists.overflow[None], (rows, lists.overflow.shape[0]))
    return jnp.concatenate([inside, overflow], axis=1)


def _code_products(
    queries: Float[Array, "Q D"], code: Int[Array, "N D"], row: Int[Array, "Q F"]
) -> Float[Array, "Q F"]:
    chosen = code[row].astype(jnp.float32)
    if jax.default_backend() == "gpu":
        # A plain reduction: the gather of the codes fuses into it, and nothing large is stored.
        return jnp.sum(chosen * queries[:, None, :], axis=-1)
    # XLA on CPUs runs such a reduction on one core, an entry at a time.
    return jnp.einsum("qfd,qd->qf", chosen, queries, precision=jax.lax.Precision.HIGHEST)


def _best(score: Float[Array, "Q F"], row: Int[Array, "Q F"], k: int) -> Int[Array, "Q k"]:
    """Positions of the k best, in no order; equal scores go to the lower ids."""
    last = _top_k(score, k)[0][:, -1:]
    # What beats the k-th score comes first, then ties with it by id; ids are below 2**30.
    rank = jnp.where(score > last, 2**30, jnp.where(score == last, 2**30 - 1 - row, -1))
    return _top_k(rank, k)[1]


def _in_order(
    row: Int[Array, "Q F"],
    score: Float[Array, "Q F"],
    is_hit: Bool[Array, "Q F"],
    k: int,
    nodes: int,
) -> Hits:
    """The best k by (score descending, id ascending), filled up with "none"."""
    negated, ids = jnp.where(is_hit, -score, jnp.inf), jnp.where(is_hit, row, nodes)
    negated, ids = jax.lax.sort((negated, ids), dimension=1, num_keys=2)
    fill = ((0, 0), (0, max(0, k - row.shape[1])))
    ids = jnp.pad(ids[:, :k], fill, constant_values=nodes)
    negated = jnp.pad(negated[:, :k], fill, constant_values=jnp.inf)
    is_valid = ids < nodes
    return Hits(ids, jnp.where(is_valid, -negated, 0.0), is_valid)


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Top-k of rows of thousands, equal values in any order.

    A row's top-k is one block's work on a GPU, some 3 ns an entry, or a sort where k is above 16.
    So only the k chunks with the largest maxima are searched, as in `moe_jax.ops.top_k`.
    """
    rows, size = x.shape
    chunk = 2 ** int(math.log2(max(1.0, (size / k) ** 0.5)))
    if size <= _SHORT or chunk == 1:
        return top_k(x, k, chunk_size=size)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    lowest = -jnp.inf if is_float else jnp.iinfo(x.dtype).min
    x = jnp.pad(x, ((0, 0), (0, -size % chunk)), constant_values=lowest)
    x = x.reshape(rows, x.shape[1] // chunk, chunk)
    best = jax.lax.top_k(jnp.max(x, axis=2), k)[1]
    found = jax.lax.collapse(jnp.take_along_axis(x, best[:, :, None], axis=1), 1, 3)
    values, at = top_k(found, k, chunk_size=found.shape[1])
    within = jnp.take_along_axis(best, at // chunk, axis=1)
    # Padding is only ever chosen with the lowest value, which nobody reads.
    return values, jnp.minimum(within * chunk + at % chunk, size - 1)
