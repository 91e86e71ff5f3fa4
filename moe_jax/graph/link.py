"""Edges of a knowledge graph: write given ones, or link nodes to what resembles them."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import check_choice, ids, is_live_at, per_row, scalar, vectors
from moe_jax.graph._edges import Edges, write_edges, write_rows
from moe_jax.graph.state import FOREVER, KnowledgeGraph
from moe_jax.ops.search import nearest
from moe_jax.ops.similarity import exact_cosine_pairs, normalize

__all__ = ["SEMANTIC", "TEMPORAL", "USER", "link", "link_similar"]

SEMANTIC = 0
"""The kind of an edge between nodes that resemble each other."""
TEMPORAL = 1
"""The kind of an edge from a report to the next one of its stream."""
USER = 2
"""The kind of an edge that a person or a program asserts. Any other integer above 2 is free."""


def link(
    graph: KnowledgeGraph,
    source: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    kind: ArrayLike = SEMANTIC,
    time: ArrayLike | None = None,
    start: ArrayLike = 0,
    end: ArrayLike = FOREVER,
    is_valid: ArrayLike | None = None,
    symmetric: bool = False,
    on_duplicate: str = "update",
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    """Write L edges in order, each into a slot of its source node.

    An edge that the source already has (same target and kind) gets the new weight, time, start
    and end. A new edge takes the lowest empty slot; if there is none, it replaces the weakest edge
    (the lowest slot among equals) when its own weight is strictly larger, and is dropped
    otherwise. Edges from a node to itself, to or from a free slot or an id out of range, with a
    weight that is not finite, a negative kind, or an end before the start are dropped.

    Args:
      graph: the graph before.
      source: [L] integers, node ids.
      target: [L] integers, node ids.
      weight: [L], or one for all; by default the cosine of the two keys.
      kind: [L] integers, or one for all: `SEMANTIC`, `TEMPORAL`, `USER` or another.
      time: [L] integers, or one for all, when the edge was written; by default the graph's clock.
      start: [L] integers, or one for all, the first logical time at which the edge holds.
      end: [L] integers, or one for all, the last one.
      is_valid: [L] bool, all by default; the others are ignored.
      symmetric: write each edge's reverse too, as if it came next in the list.
      on_duplicate: "update" as above, or "append" to write an edge again beside its duplicate.

    Returns:
      The graph after, and how many edges were written (int32 scalar).

    Raises:
      ValueError: if an argument has the wrong shape or on_duplicate is unknown.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> graph, num_linked = link(graph, jnp.array([0]), jnp.array([1]), weight=0.5)
      >>> int(num_linked), graph.edge_target[0, :2].tolist()
      (1, [1, 4])
    """
    check_choice("on_duplicate", on_duplicate, ("update", "append"))
    source = ids("source", source)
    target = ids("target", target)
    rows = source.shape[0]
    if target.shape != source.shape:
        raise ValueError(f"target must have shape {source.shape}, as source, got {target.shape}")
    if weight is not None:
        weight = per_row("weight", weight, rows, 0.0, jnp.float32)
    ints = functools.partial(per_row, rows=rows, dtype=jnp.int32)
    edges = Edges(
        target=target,
        weight=jnp.zeros(rows) if weight is None else weight,
        kind=ints("kind", kind, default=SEMANTIC),
        time=ints("time", time, default=graph.clock),
        start=ints("start", start, default=0),
        end=ints("end", end, default=FOREVER),
    )
    valid = per_row("is_valid", is_valid, rows, True, bool)
    return _link(
        graph,
        *(source, edges, valid),
        by_cosine=weight is None,
        symmetric=symmetric,
        on_duplicate=on_duplicate,
    )


def link_similar(
    graph: KnowledgeGraph,
    node_id: ArrayLike,
    *,
    queries: ArrayLike | None = None,
    k: int = 5,
    threshold: ArrayLike = 0.3,
    kind: ArrayLike = SEMANTIC,
    time: ArrayLike | None = None,
    is_valid: ArrayLike | None = None,
    symmetric: bool = False,
    on_duplicate: str = "update",
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    """Link nodes to the live nodes most similar to them, best first, as `link` does.

    Cosines are exact. Which nodes are the most similar is told apart as far as the search's first
    pass can, see `nearest(precision="scored")`: of near-ties at the end another one may be linked.

    Args:
      graph: the graph before.
      node_id: [R] integers, node ids, such as `InsertInfo.node_id`; ids out of range and of free
        slots are ignored. Without queries, an id that comes again would find the same nodes
        again, so only its first valid entry counts.
      queries: [R, D], what to compare with the other nodes' keys: by default each node's own key.
        Give the inserted items themselves to link by the item and not by the node it merged into.
      k: up to how many edges for each entry of node_id, at least 1.
      threshold: the least cosine that makes an edge; it becomes the edge's weight.
      kind: [R] integers, or one for all.
      time: [R] integers, or one for all; by default the graph's clock.
      is_valid: [R] bool, all by default; the others are ignored.
      symmetric: write each edge's reverse too, as if it came next in the list.
      on_duplicate: "update" or "append", see `link`.

    Returns:
      The graph after, and how many edges were written (int32 scalar).

    Raises:
      ValueError: if an argument has the wrong shape, k is below 1, or on_duplicate is unknown.

    Example:
      >>> graph, info = insert(KnowledgeGraph.create(4, 2), jnp.array([[1.0, 0.0], [1.0, 1.0]]))
      >>> graph, num_linked = link_similar(graph, info.node_id)
      >>> int(num_linked), graph.edge_target[:2, 0].tolist()
      (2, [1, 0])
    """
    check_choice("on_duplicate", on_duplicate, ("update", "append"))
    node_id = ids("node_id", node_id)
    rows = node_id.shape[0]
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    is_distinct = queries is None
    if queries is None:
        queries = graph.key[jnp.clip(node_id, 0, graph.num_nodes - 1)]
    else:
        queries = normalize(vectors("queries", queries, graph.dim))
    if queries.shape[0] != rows:
        raise ValueError(f"queries must have {rows} rows, as node_id, got {queries.shape[0]}")
    return _link_similar(
        graph,
        *(node_id, queries),
        per_row("kind", kind, rows, SEMANTIC, jnp.int32),
        per_row("time", time, rows, graph.clock, jnp.int32),
        per_row("is_valid", is_valid, rows, True, bool),
        scalar("threshold", threshold, jnp.float32),
        k=min(k, graph.num_nodes),
        is_distinct=is_distinct,
        symmetric=symmetric,
        on_duplicate=on_duplicate,
    )


@functools.partial(jax.jit, static_argnames=("k", "is_distinct", "symmetric", "on_duplicate"))
def _link_similar(
    graph: KnowledgeGraph,
    node_id: Int[Array, "R"],
    queries: Float[Array, "R D"],
    kind: Int[Array, "R"],
    time: Int[Array, "R"],
    is_valid: Bool[Array, "R"],
    threshold: ArrayLike,
    *,
    k: int,
    is_distinct: bool,
    symmetric: bool,
    on_duplicate: str,
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    graph, queries = jax.lax.stop_gradient((graph, queries))
    is_valid = is_valid & is_live_at(graph, node_id) & jnp.any(queries != 0.0, axis=-1)
    if is_distinct:
        is_valid &= _is_first(jnp.where(is_valid, node_id, graph.num_nodes))
    target, weight = _others(graph, node_id, queries, is_valid, threshold, k)

    def for_each(x: Array) -> Array:
        return jnp.broadcast_to(x[:, None], target.shape)

    start, end = jnp.zeros_like(target), jnp.full_like(target, FOREVER)
    edges = Edges(target, weight, for_each(kind), for_each(time), start, end)
    found = (weight >= threshold) & (weight > -jnp.inf) & for_each(kind >= 0)
    if is_distinct and not symmetric:
        source = jnp.where(is_valid, node_id, graph.num_nodes)
        return write_rows(graph, source, edges, found, on_duplicate)
    source, edges, found = jax.tree.map(jnp.ravel, (for_each(node_id), edges, found))
    return _link(
        graph,
        *(source, edges, found),
        by_cosine=False,
        symmetric=symmetric,
        on_duplicate=on_duplicate,
    )


def _others(
    graph: KnowledgeGraph,
    node_id: Int[Array, "R"],
    queries: Float[Array, "R D"],
    is_valid: Bool[Array, "R"],
    threshold: ArrayLike,
    k: int,
) -> tuple[Int[Array, "R k"], Float[Array, "R k"]]:
    """The k live nodes other than itself most similar to each query; N and -inf where fewer."""
    # One more than asked for, since the node itself is most often the first.
    hits = nearest(
        queries, graph.key, graph.is_live, min(k + 1, graph.num_nodes), threshold,
        code=graph.codes, is_query=is_valid, precision="scored",
    )  # fmt: skip
    target = hits.ids
    is_other = hits.is_valid & (target != node_id[:, None]) & is_valid[:, None]
    score = jnp.where(is_other, hits.scores, -jnp.inf)
    order = jnp.argsort(~is_other, axis=1, stable=True)[:, :k]
    score = jnp.take_along_axis(score, order, axis=1)
    target = jnp.take_along_axis(target, order, axis=1)
    return jnp.where(score > -jnp.inf, target, graph.num_nodes), score


@functools.partial(jax.jit, static_argnames=("by_cosine", "symmetric", "on_duplicate"))
def _link(
    graph: KnowledgeGraph,
    source: Int[Array, "L"],
    edges: Edges,
    is_valid: Bool[Array, "L"],
    *,
    by_cosine: bool,
    symmetric: bool,
    on_duplicate: str,
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    graph, edges = jax.lax.stop_gradient((graph, edges))
    if source.shape[0] == 0:
        return graph, jnp.int32(0)
    target = edges.target
    valid = is_valid & (source != target) & is_live_at(graph, source) & is_live_at(graph, target)
    valid &= (edges.kind >= 0) & (edges.start <= edges.end)
    if by_cosine:
        source, target = jnp.where(valid, source, 0), jnp.where(valid, target, 0)
        weight = exact_cosine_pairs(graph.key[source], graph.key[target])
        edges = edges._replace(weight=weight)
    valid &= jnp.isfinite(edges.weight)
    if symmetric:
        source, back = _interleaved(source, target), _interleaved(target, source)
        edges, valid = jax.tree.map(lambda x: jnp.repeat(x, 2), (edges, valid))
        edges = edges._replace(target=back)
    return write_edges(graph, source, edges, valid, on_duplicate)


def _interleaved(x: Int[Array, "L"], y: Int[Array, "L"]) -> Int[Array, "L2"]:
    return jnp.stack([x, y], axis=1).ravel()


def _is_first(x: Int[Array, "R"]) -> Bool[Array, "R"]:
    """Whether no earlier entry is the same."""
    order = jnp.argsort(x, stable=True)
    is_new = jnp.ones(x.shape, bool).at[1:].set(x[order[1:]] != x[order[:-1]])
    return jnp.zeros_like(is_new).at[order].set(is_new)
