"""Edges of a knowledge graph: write given ones, or link nodes to what resembles them."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import check_choice, ids, is_live_at, per_row, vectors
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.nearest import nearest
from moe_jax.ops.similarity import exact_cosine_pairs, normalize

__all__ = ["link", "link_similar"]


def link(
    graph: KnowledgeGraph,
    source: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    kind: ArrayLike = 0,
    time: ArrayLike | None = None,
    is_valid: ArrayLike | None = None,
    on_duplicate: str = "update",
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    """Write L edges in order, each into a slot of its source node.

    An edge that the source already has (same target and kind) gets the new weight and time. A new
    edge takes the lowest empty slot; if there is none, it replaces the weakest edge (the lowest
    slot among equals) when its own weight is strictly larger, and is dropped otherwise. Edges
    from a node to itself, to or from a free slot or an id out of range, or with a weight that is
    not finite are dropped.

    Args:
      graph: the graph before.
      source: [L] integers, node ids.
      target: [L] integers, node ids.
      weight: [L], by default the cosine of the two keys.
      kind: [L] integers, or one for all.
      time: [L] integers, or one for all; by default the graph's clock.
      is_valid: [L] bool, all by default; the others are ignored.
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
    kind = per_row("kind", kind, rows, 0, jnp.int32)
    time = per_row("time", time, rows, graph.clock, jnp.int32)
    valid = per_row("is_valid", is_valid, rows, True, bool)
    return _link(graph, source, target, weight, kind, time, valid, on_duplicate=on_duplicate)


def link_similar(
    graph: KnowledgeGraph,
    node_id: ArrayLike,
    *,
    queries: ArrayLike | None = None,
    k: int = 5,
    threshold: ArrayLike = 0.3,
    kind: ArrayLike = 0,
    time: ArrayLike | None = None,
    is_valid: ArrayLike | None = None,
    on_duplicate: str = "update",
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    """Link nodes to the live nodes most similar to them, best first, as `link` does.

    Args:
      graph: the graph before.
      node_id: [R] integers, node ids, such as `InsertInfo.node_id`; ids out of range and of free
        slots are ignored.
      queries: [R, D], what to compare with the other nodes' keys: by default each node's own key.
        Give the inserted items themselves to link by the item and not by the node it merged into.
      k: up to how many edges for each entry of node_id, at least 1.
      threshold: the least cosine that makes an edge; it becomes the edge's weight.
      kind: [R] integers, or one for all.
      time: [R] integers, or one for all; by default the graph's clock.
      is_valid: [R] bool, all by default; the others are ignored.
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
    node_id = ids("node_id", node_id)
    rows = node_id.shape[0]
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries is None:
        queries = graph.key[jnp.clip(node_id, 0, graph.num_nodes - 1)]
    else:
        queries = normalize(vectors("queries", queries, graph.dim))
    if queries.shape[0] != rows:
        raise ValueError(f"queries must have {rows} rows, as node_id, got {queries.shape[0]}")
    valid = per_row("is_valid", is_valid, rows, True, bool)
    kind = per_row("kind", kind, rows, 0, jnp.int32)
    time = per_row("time", time, rows, graph.clock, jnp.int32)
    k = min(k, graph.num_nodes)
    target, score = _similar(graph, node_id, queries, valid, threshold, k=k)
    return link(
        graph,
        jnp.repeat(node_id, k),
        target.ravel(),
        weight=score.ravel(),
        kind=jnp.repeat(kind, k),
        time=jnp.repeat(time, k),
        is_valid=(score >= threshold).ravel(),
        on_duplicate=on_duplicate,
    )


@functools.partial(jax.jit, static_argnames=("k",))
def _similar(
    graph: KnowledgeGraph,
    node_id: Int[Array, "R"],
    queries: Float[Array, "R D"],
    is_valid: Bool[Array, "R"],
    threshold: ArrayLike,
    *,
    k: int,
) -> tuple[Int[Array, "R k"], Float[Array, "R k"]]:
    """The k live nodes other than itself most similar to each query; N and -inf where fewer."""
    graph, queries = jax.lax.stop_gradient((graph, queries))
    is_valid = is_valid & jnp.any(queries != 0.0, axis=-1)
    # One more than asked for, since the node itself is most often the first.
    target, score = nearest(
        queries, graph.key, graph.is_live, min(k + 1, graph.num_nodes), threshold,
        code=graph.codes, is_query=is_valid, precision="scored",
    )  # fmt: skip
    is_other = (target != node_id[:, None]) & is_valid[:, None]
    score = jnp.where(is_other, score, -jnp.inf)
    order = jnp.argsort(~is_other, axis=1, stable=True)[:, :k]
    score = jnp.take_along_axis(score, order, axis=1)
    target = jnp.take_along_axis(target, order, axis=1)
    return jnp.where(score > -jnp.inf, target, graph.num_nodes), score


@functools.partial(jax.jit, static_argnames=("on_duplicate",))
def _link(
    graph: KnowledgeGraph,
    source: Int[Array, "L"],
    target: Int[Array, "L"],
    weight: Float[Array, "L"] | None,
    kind: Int[Array, "L"],
    time: Int[Array, "L"],
    is_valid: Bool[Array, "L"],
    *,
    on_duplicate: str,
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    graph, weight = jax.lax.stop_gradient((graph, weight))
    valid = is_valid & (source != target) & is_live_at(graph, source) & is_live_at(graph, target)
    source = jnp.where(valid, source, 0)
    target = jnp.where(valid, target, 0)
    if weight is None:
        weight = exact_cosine_pairs(graph.key[source], graph.key[target])
    valid &= jnp.isfinite(weight)
    turn = _turn_at_source(jnp.where(valid, source, graph.num_nodes))
    num_turns = jnp.max(jnp.where(valid, turn + 1, 0), initial=0)

    def write(state: tuple[Array, KnowledgeGraph, Array]) -> tuple[Array, KnowledgeGraph, Array]:
        now, graph, count = state
        slot, fits = _choose_slot(graph, source, target, weight, kind, on_duplicate)
        fits &= valid & (turn == now)
        at = jnp.where(fits, source, graph.num_nodes), slot
        graph = graph._replace(
            edge_target=graph.edge_target.at[at].set(target, mode="drop"),
            edge_weight=graph.edge_weight.at[at].set(weight, mode="drop"),
            edge_kind=graph.edge_kind.at[at].set(kind, mode="drop"),
            edge_time=graph.edge_time.at[at].set(time, mode="drop"),
        )
        return now + 1, graph, count + jnp.sum(fits, dtype=jnp.int32)

    start = (jnp.int32(0), graph, jnp.int32(0))
    _, graph, count = jax.lax.while_loop(lambda state: state[0] < num_turns, write, start)
    return graph, count


def _choose_slot(
    graph: KnowledgeGraph,
    source: Int[Array, "L"],
    target: Int[Array, "L"],
    weight: Float[Array, "L"],
    kind: Int[Array, "L"],
    on_duplicate: str,
) -> tuple[Int[Array, "L"], Bool[Array, "L"]]:
    """The slot for each edge, and whether the edge may have it."""
    old_target, old_weight = graph.edge_target[source], graph.edge_weight[source]
    is_empty = old_target == graph.num_nodes
    is_same = (old_target == target[:, None]) & (graph.edge_kind[source] == kind[:, None])
    if on_duplicate == "append":
        is_same = jnp.zeros_like(is_same)
    has_same, has_empty = jnp.any(is_same, axis=1), jnp.any(is_empty, axis=1)
    weakest = jnp.argmin(old_weight, axis=1)  # only read where no slot is empty
    slot = jnp.where(has_empty, jnp.argmax(is_empty, axis=1), weakest)
    slot = jnp.where(has_same, jnp.argmax(is_same, axis=1), slot)
    return slot, has_same | has_empty | (weight > jnp.min(old_weight, axis=1))


def _turn_at_source(source: Int[Array, "L"]) -> Int[Array, "L"]:
    """For each edge, how many earlier ones have the same source."""
    order = jnp.argsort(source, stable=True)
    ordered = source[order]
    turn = jnp.arange(source.shape[0]) - jnp.searchsorted(ordered, ordered, side="left")
    return jnp.zeros_like(source).at[order].set(turn.astype(source.dtype))
