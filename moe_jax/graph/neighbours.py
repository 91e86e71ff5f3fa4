"""Read the edges of a knowledge graph."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import ids, is_live_at, per_row
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["Neighbours", "is_edge", "neighbours"]


class Neighbours(NamedTuple):
    """The edges out of R nodes, by slot; all but ids are 0 where there is no edge.

    Attributes:
      ids: int32 [R, M], node ids at the other ends, N where there is no edge.
      weight: float32 [R, M].
      kind: int32 [R, M].
      time: int32 [R, M], logical time of the last write.
      start: int32 [R, M], the first logical time at which the edge holds.
      end: int32 [R, M], the last logical time at which the edge holds.
      is_valid: bool [R, M].
    """

    ids: Int[Array, "R M"]
    weight: Float[Array, "R M"]
    kind: Int[Array, "R M"]
    time: Int[Array, "R M"]
    start: Int[Array, "R M"]
    end: Int[Array, "R M"]
    is_valid: Bool[Array, "R M"]


def neighbours(
    graph: KnowledgeGraph,
    node_id: ArrayLike,
    *,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
) -> Neighbours:
    """The edges out of nodes, in slot order.

    Args:
      graph: the graph.
      node_id: [R] integers; an id out of range or of a free slot has no edges.
      kind: only edges of this kind; [R] integers, or one for all.
      as_of: only edges that were last written at or before this logical time and that hold at it
        (start <= as_of <= end); [R] integers, or one for all.

    Returns:
      `Neighbours` of shape [R, M].

    Raises:
      ValueError: if node_id is not a list of integers, or a filter has the wrong shape.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> graph, _ = link(graph, jnp.array([0]), jnp.array([1]), weight=0.5, start=3, time=2)
      >>> neighbours(graph, jnp.array([0, 1])).ids[:, :2].tolist()
      [[1, 4], [4, 4]]
      >>> neighbours(graph, jnp.array([0, 0]), as_of=jnp.array([2, 3])).ids[:, :2].tolist()
      [[4, 4], [1, 4]]
    """
    node_id = ids("node_id", node_id)
    rows = node_id.shape[0]
    if kind is not None:
        kind = per_row("kind", kind, rows, 0, jnp.int32)
    if as_of is not None:
        as_of = per_row("as_of", as_of, rows, 0, jnp.int32)
    row = jnp.clip(node_id, 0, graph.num_nodes - 1)
    valid = is_live_at(graph, node_id)[:, None] & is_edge(graph, row, kind, as_of)

    def read(field: Array, fill: int = 0) -> Array:
        return jnp.where(valid, field[row], fill)

    return Neighbours(
        ids=read(graph.edge_target, graph.num_nodes),
        weight=read(graph.edge_weight),
        kind=read(graph.edge_kind),
        time=read(graph.edge_time),
        start=read(graph.edge_start),
        end=read(graph.edge_end),
        is_valid=valid,
    )


def is_edge(
    graph: KnowledgeGraph,
    row: Int[Array, "*R"],
    kind: Int[Array, "*F"] | None,
    as_of: Int[Array, "*F"] | None,
) -> Bool[Array, "*R M"]:
    """Which slots of nodes hold an edge to a live node that the filters let through.

    Args:
      graph: the graph.
      row: int32 [...], node ids in range.
      kind: int32 [...] or None, as for `neighbours`; axes of length 1 are broadcast.
      as_of: int32 [...] or None, likewise.

    Returns:
      bool [..., M].

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> is_edge(graph, jnp.array([0]), None, None)[:, :2].tolist()
      [[False, False]]
    """
    valid = is_live_at(graph, graph.edge_target[row])
    if kind is not None:
        valid &= graph.edge_kind[row] == kind[..., None]
    if as_of is not None:
        now = as_of[..., None]
        valid &= (graph.edge_time[row] <= now) & (graph.edge_start[row] <= now)
        valid &= now <= graph.edge_end[row]
    return valid
