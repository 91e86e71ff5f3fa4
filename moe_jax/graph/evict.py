"""Take nodes out of a knowledge graph, close the gaps, and note what is read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Int
from moe_jax.graph._arguments import array, scalar
from moe_jax.graph._leaders import clear_edges, empty_edges
from moe_jax.graph._order import saturating_add
from moe_jax.graph.query import Hits
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["compact", "delete", "expire", "record_reads"]

_EDGE_FIELDS = tuple(name for name in KnowledgeGraph._fields if name.startswith("edge_"))
_NODE_FIELDS = tuple(
    name
    for name in KnowledgeGraph._fields
    if name not in _EDGE_FIELDS and name != "clock" and not name.startswith("num_")
)


def delete(
    graph: KnowledgeGraph,
    *,
    node_id: ArrayLike | None = None,
    expert_id: ArrayLike | None = None,
    kind: ArrayLike | None = None,
    created_before: ArrayLike | None = None,
    updated_before: ArrayLike | None = None,
    below_confidence: ArrayLike | None = None,
    is_node: ArrayLike | None = None,
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    """Delete the live nodes that match all the filters given.

    A slot that loses its node is as `KnowledgeGraph.create` made it, and every edge into it is
    emptied. Counters and clock stay as they are.

    Args:
      graph: the graph before.
      node_id: one id or [R] ids; those out of range match nothing.
      expert_id: one value or several, any of which matches, as for kind.
      kind: one value or several.
      created_before: a logical time; nodes created at it stay.
      updated_before: a logical time; nodes updated at it stay.
      below_confidence: nodes of this confidence stay.
      is_node: [N] bool, True for nodes that may go.

    Returns:
      The graph after, and how many nodes were deleted (int32 scalar).

    Raises:
      ValueError: if no filter is given, or one has the wrong shape.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2), kind=jnp.array([0, 5]))
      >>> graph, num_deleted = delete(graph, kind=5)
      >>> int(num_deleted), graph.is_live.tolist()
      (1, [True, False, False, False])
    """
    lists = {"node_id": node_id, "expert_id": expert_id, "kind": kind}
    bounds = {
        "created_before": created_before,
        "updated_before": updated_before,
        "below_confidence": below_confidence,
    }
    filters = lists | bounds | {"is_node": is_node}
    floats = {"below_confidence": jnp.float32}
    given = {
        name: array(name, x, floats.get(name, jnp.int32))
        for name, x in (lists | bounds).items()
        if x is not None
    }
    if is_node is not None:
        given["is_node"] = jnp.asarray(is_node)
    if not given:
        raise ValueError(f"one of {', '.join(filters)} must be given")
    for name, x in given.items():
        _check_filter(graph, name, x, is_list=name in lists)
    return _delete(graph, given)


def expire(
    graph: KnowledgeGraph, ttl: ArrayLike, *, now: ArrayLike | None = None
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    """Delete the nodes not updated for more than a number of ticks, and the edges that have ended.

    Args:
      graph: the graph before.
      ttl: integer, at least 0: a node updated at `now - ttl` stays.
      now: integer, by default the graph's clock; edges whose edge_end is before it are emptied.

    Returns:
      The graph after, and how many nodes were deleted (int32 scalar).

    Raises:
      ValueError: if ttl is negative, or it or now is not one integer.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2), time=jnp.array([1, 9]))
      >>> graph, num_expired = expire(graph, 5)
      >>> int(num_expired), graph.is_live.tolist()
      (1, [False, True, False, False])
    """
    now = graph.clock if now is None else scalar("now", now, jnp.int32)
    ticks = scalar("ttl", ttl, jnp.int32)
    if not isinstance(ticks, jax.core.Tracer) and ticks < 0:
        raise ValueError(f"ttl must be at least 0, got {ttl}")
    return _expire(graph, jnp.maximum(ticks, 0), now)


@jax.jit
def compact(graph: KnowledgeGraph) -> tuple[KnowledgeGraph, Int[Array, "N"]]:
    """Move the live nodes to the lowest slots, in order, and rename the ends of edges.

    Args:
      graph: the graph before.

    Returns:
      The graph after, and the new id of each old one, N for slots that were free (int32 [N]).

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> graph, _ = delete(graph, node_id=0)
      >>> graph, new_id = compact(graph)
      >>> graph.is_live.tolist(), new_id.tolist()
      ([True, False, False, False], [4, 0, 4, 4])
    """
    nowhere = graph.num_nodes
    # Free slots may hold anything in their values; what moves is as `create` made it.
    graph = _without(graph, ~graph.is_live)
    place = jnp.cumsum(graph.is_live, dtype=jnp.int32) - 1
    new_id = jnp.where(graph.is_live, place, nowhere)
    old_id = jnp.argsort(~graph.is_live, stable=True)
    renamed = jnp.append(new_id, jnp.int32(nowhere))[graph.edge_target]
    graph = graph._replace(edge_target=renamed)
    moved = {name: getattr(graph, name)[old_id] for name in (*_NODE_FIELDS, *_EDGE_FIELDS)}
    return graph._replace(**moved), new_id


def record_reads(
    graph: KnowledgeGraph, read: Hits | ArrayLike, is_valid: ArrayLike | None = None
) -> KnowledgeGraph:
    """Count reads of nodes, which the policy "least_used" goes by.

    Args:
      graph: the graph before.
      read: hits of `search`, or integer ids of any shape; a node read twice counts twice, ids
        out of range and of free slots count nowhere.
      is_valid: bool, of the shape of the ids, all by default; combined with the hits' own.

    Returns:
      The graph after; a count stops at the largest int32.

    Raises:
      ValueError: if the ids are not integers or is_valid has another shape.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> record_reads(graph, jnp.array([1, 1, 4])).reads.tolist()
      [0, 2, 0, 0]
    """
    ids = array("read", read.ids if isinstance(read, Hits) else read, jnp.int32)
    valid = jnp.ones(ids.shape, bool) if is_valid is None else jnp.asarray(is_valid, bool)
    if valid.shape != ids.shape:
        raise ValueError(f"is_valid must have shape {ids.shape}, as the ids, got {valid.shape}")
    if isinstance(read, Hits):
        valid = valid & read.is_valid
    return _record_reads(graph, ids.ravel(), valid.ravel())


def _check_filter(graph: KnowledgeGraph, name: str, value: Array, *, is_list: bool) -> None:
    """ValueError unless the filter has a shape and dtype that it may have."""
    if name == "is_node":
        if value.shape != (graph.num_nodes,) or value.dtype != bool:
            raise ValueError(
                f"is_node must be bool of shape {(graph.num_nodes,)}, "
                f"got {value.dtype} of shape {value.shape}"
            )
    elif value.ndim > is_list:
        what = "one value or a list of values" if is_list else "one value"
        raise ValueError(f"{name} must be {what}, got shape {value.shape}")


@jax.jit
def _delete(graph: KnowledgeGraph, given: dict[str, Any]) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    is_gone = graph.is_live
    for name, x in given.items():
        if name == "is_node":
            is_gone &= x
        elif name == "node_id":
            x = jnp.atleast_1d(x)
            at = jnp.where(x >= 0, x, graph.num_nodes)
            is_gone &= jnp.zeros_like(is_gone).at[at].set(True, mode="drop")
        elif name in ("expert_id", "kind"):
            field = getattr(graph, name)
            is_gone &= jnp.any(field[:, None] == jnp.atleast_1d(x)[None, :], axis=1)
        elif name == "below_confidence":
            is_gone &= graph.confidence < x
        else:
            is_gone &= getattr(graph, name.removesuffix("_before")) < x
    return _without(graph, is_gone), jnp.sum(is_gone, dtype=jnp.int32)


@jax.jit
def _expire(
    graph: KnowledgeGraph, ttl: Int[Array, ""], now: Int[Array, ""]
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    is_gone = graph.is_live & (saturating_add(graph.updated, ttl) < now)
    graph = _without(graph, is_gone)
    has_ended = (graph.edge_target < graph.num_nodes) & (graph.edge_end < now)
    return empty_edges(graph, has_ended), jnp.sum(is_gone, dtype=jnp.int32)


@jax.jit
def _record_reads(
    graph: KnowledgeGraph, ids: Int[Array, "I"], is_valid: Bool[Array, "I"]
) -> KnowledgeGraph:
    at = jnp.where(is_valid & (ids >= 0), ids, graph.num_nodes)
    more = jnp.zeros_like(graph.reads).at[at].add(1, mode="drop")
    return graph._replace(reads=saturating_add(graph.reads, jnp.where(graph.is_live, more, 0)))


def _without(graph: KnowledgeGraph, is_gone: Bool[Array, "N"]) -> KnowledgeGraph:
    """The graph with the given slots as if never used, and no edge into them."""
    fresh = KnowledgeGraph.create(1, graph.dim)
    graph = clear_edges(graph, is_gone)

    def cleared(name: str) -> Array:
        field, empty = getattr(graph, name), getattr(fresh, name)
        is_row = is_gone.reshape(-1, *[1] * (field.ndim - 1))
        return jnp.where(is_row, jnp.broadcast_to(empty, field.shape), field)

    return graph._replace(**{name: cleared(name) for name in _NODE_FIELDS})
