"""Read a knowledge graph: search by cosine, and follow edges."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import ids, is_live_at, per_row, vectors
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.nearest import nearest
from moe_jax.ops.similarity import normalize

__all__ = ["Hits", "Neighbours", "neighbours", "search"]


class Hits(NamedTuple):
    """What `search` found, best first.

    Attributes:
      ids: int32 [Q, k], node ids, N where there is no hit.
      scores: float32 [Q, k], cosines, 0 where there is no hit.
      is_valid: bool [Q, k].
    """

    ids: Int[Array, "Q k"]
    scores: Float[Array, "Q k"]
    is_valid: Bool[Array, "Q k"]


class Neighbours(NamedTuple):
    """The edges out of R nodes, by slot.

    Attributes:
      ids: int32 [R, M], node ids at the other ends, N where there is no edge.
      weight: float32 [R, M], 0 where there is no edge.
      kind: int32 [R, M], 0 where there is no edge.
      time: int32 [R, M], logical time of the last write, 0 where there is no edge.
      is_valid: bool [R, M].
    """

    ids: Int[Array, "R M"]
    weight: Float[Array, "R M"]
    kind: Int[Array, "R M"]
    time: Int[Array, "R M"]
    is_valid: Bool[Array, "R M"]


def search(
    graph: KnowledgeGraph,
    queries: ArrayLike,
    k: int = 10,
    threshold: ArrayLike = -1.0,
    *,
    expert_id: ArrayLike | None = None,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
    min_confidence: ArrayLike | None = None,
    reproducible: bool = True,
    implementation: str | None = None,
) -> Hits:
    """The k live nodes whose keys have the largest cosine to each query.

    Exact: the best k in order, ties to the lowest id, and, if `reproducible`, with scores that are
    the same bits however queries are batched or the graph is sharded. Queries are taken in blocks,
    so that queries x nodes never has to fit in memory. Each filter is one value for all queries or
    one per query. No gradient flows through.

    Args:
      graph: the graph.
      queries: [Q, D], of any length; a query that is zero, NaN or infinite has no hits.
      k: how many, between 1 and N.
      threshold: the least cosine of a hit; a scalar, which may be traced.
      expert_id: only nodes whose value came from this expert.
      kind: only nodes of this kind.
      as_of: only nodes created at or before this logical time.
      min_confidence: only nodes at least this confident.
      reproducible: make certain of every last near-tie. False is faster: what differs from the
        k-th score by less than the first pass's rounding may be missed or, in another shape, come
        in another order: 1e-6 on CPUs, about 1e-3 on GPUs, where the first pass reads eight-bit
        codes and what it picks is scored in full.
      implementation: of the first pass, see `moe_jax.ops.nearest`.

    Returns:
      `Hits` of shape [Q, k].

    Raises:
      ValueError: if queries or a filter has the wrong shape, or k is out of range.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> hits = search(graph, jnp.array([[2.0, 1.0]]), k=3)
      >>> hits.ids.tolist(), hits.is_valid.tolist()
      ([[0, 1, 4]], [[True, True, False]])
    """
    queries = vectors("queries", queries, graph.dim)
    if not 1 <= k <= graph.num_nodes:
        raise ValueError(f"k must be between 1 and {graph.num_nodes} (node slots), got {k}")
    rows = queries.shape[0]
    given = {
        "expert_id": (expert_id, jnp.int32),
        "kind": (kind, jnp.int32),
        "as_of": (as_of, jnp.int32),
        "min_confidence": (min_confidence, jnp.float32),
    }
    filters = {
        # One value for all queries stays one: its mask is shared, and the fast pass can take it.
        name: jnp.asarray(value, dtype) if jnp.ndim(value) == 0 else
        per_row(name, value, rows, 0, dtype)
        for name, (value, dtype) in given.items()
        if value is not None
    }  # fmt: skip
    return _search(
        graph, queries, filters, threshold, k=k, reproducible=reproducible,
        implementation=implementation,
    )  # fmt: skip


_ACCEPTS = {
    "expert_id": lambda graph, wanted: graph.expert_id == wanted,
    "kind": lambda graph, wanted: graph.kind == wanted,
    "as_of": lambda graph, wanted: graph.created <= wanted,
    "min_confidence": lambda graph, wanted: graph.confidence >= wanted,
}

# Queries are taken in blocks of so many scores, 1 GiB of them.
_SCORES_AT_ONCE = 2**28


@functools.partial(jax.jit, static_argnames=("k", "reproducible", "implementation"))
def _search(
    graph: KnowledgeGraph,
    queries: Float[Array, "Q D"],
    filters: dict[str, Array],
    threshold: ArrayLike,
    *,
    k: int,
    reproducible: bool,
    implementation: str | None,
) -> Hits:
    graph, queries = jax.lax.stop_gradient((graph, queries))
    queries = normalize(queries)
    is_candidate = graph.is_live
    for name, wanted in filters.items():
        if wanted.ndim == 0:
            is_candidate &= _ACCEPTS[name](graph, wanted)
    precision = "exact" if reproducible else "quick"
    by_query = {name: wanted for name, wanted in filters.items() if wanted.ndim == 1}

    def find(queries: Float[Array, "Q D"], by_query: dict[str, Array]) -> tuple[Array, Array]:
        mask = is_candidate
        for name, wanted in by_query.items():
            accepts = functools.partial(_ACCEPTS[name], graph)
            mask = jnp.atleast_2d(mask) & jax.vmap(accepts)(wanted)
        return nearest(
            queries, graph.key, mask, k, threshold, code=graph.codes, precision=precision,
            is_query=jnp.any(queries != 0.0, axis=-1), implementation=implementation,
        )  # fmt: skip

    ids, scores = _in_blocks(find, (queries, by_query), max(1, _SCORES_AT_ONCE // graph.num_nodes))
    is_hit = (scores > -jnp.inf) & (scores >= threshold)
    is_hit = is_hit & jnp.any(queries != 0.0, axis=-1, keepdims=True)
    return Hits(jnp.where(is_hit, ids, graph.num_nodes), jnp.where(is_hit, scores, 0.0), is_hit)


def _in_blocks(find: Callable, inputs: Any, size: int) -> tuple[Array, Array]:
    """The function of all rows, taken `size` rows at a time."""
    rows = jax.tree.leaves(inputs)[0].shape[0]
    if rows <= size:
        return find(*inputs)
    count = -(-rows // size)
    size = -(-rows // count)

    def split(x: Array) -> Array:
        pad = ((0, count * size - rows),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, pad).reshape(count, size, *x.shape[1:])

    found = jax.lax.map(lambda part: find(*part), jax.tree.map(split, inputs))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], found)


def neighbours(graph: KnowledgeGraph, node_id: ArrayLike) -> Neighbours:
    """The edges out of nodes, in slot order.

    Args:
      graph: the graph.
      node_id: [R] integers; an id out of range or of a free slot has no edges.

    Returns:
      `Neighbours` of shape [R, M].

    Raises:
      ValueError: if node_id is not a list of integers.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2, num_edge_slots=2), jnp.eye(2))
      >>> graph, _ = link(graph, jnp.array([0]), jnp.array([1]), weight=0.5)
      >>> neighbours(graph, jnp.array([0, 1])).ids.tolist()
      [[1, 4], [4, 4]]
    """
    node_id = ids("node_id", node_id)
    row = jnp.clip(node_id, 0, graph.num_nodes - 1)
    target = graph.edge_target[row]
    is_edge = is_live_at(graph, node_id)[:, None] & is_live_at(graph, target)
    return Neighbours(
        ids=jnp.where(is_edge, target, graph.num_nodes),
        weight=jnp.where(is_edge, graph.edge_weight[row], 0.0),
        kind=jnp.where(is_edge, graph.edge_kind[row], 0),
        time=jnp.where(is_edge, graph.edge_time[row], 0),
        is_valid=is_edge,
    )
