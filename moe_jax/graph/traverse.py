"""Follow the edges of a knowledge graph: what lies within some hops."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import array, is_live_at, per_row
from moe_jax.graph.neighbours import is_edge
from moe_jax.graph.query import Hits
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["Reached", "k_hop", "starts"]


class Reached(NamedTuple):
    """The nodes around Q sets of nodes, nearest first, each once.

    Attributes:
      ids: int32 [Q, P], N where there is no more.
      distance: int32 [Q, P], hops from the nearest start, -1 where there is no more.
      is_valid: bool [Q, P].
    """

    ids: Int[Array, "Q P"]
    distance: Int[Array, "Q P"]
    is_valid: Bool[Array, "Q P"]


def k_hop(
    graph: KnowledgeGraph,
    start: ArrayLike | Hits,
    hops: int,
    *,
    fan_out: int = 4,
    max_nodes: int = 64,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
) -> Reached:
    """The nodes within some hops of given ones, following each node's strongest edges.

    Every hop takes the `fan_out` strongest edges (ties to the lower slot) of each node found in
    the hop before. What they lead to and is new is added, by the weight of the strongest such
    edge, ties in the order of the nodes they leave, until there are `max_nodes`. The cost does
    not depend on the size of the graph.

    Args:
      graph: the graph.
      start: [Q, R] integers, node ids to start from, or `Hits`; those that are not live, and
        repeats, are left out. The others come first, in the given order.
      hops: how many hops, at least 0.
      fan_out: how many edges of a node to follow, at least 1.
      max_nodes: P, how many nodes to return, starts included; at least R.
      kind: only edges of this kind; [Q] integers, or one for all.
      as_of: only edges that hold at this logical time, as for `neighbours`; likewise.

    Returns:
      `Reached` of shape [Q, P].

    Raises:
      ValueError: if start or a filter has the wrong shape, or a number is out of range.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 3), jnp.eye(3))
      >>> graph, _ = link(graph, jnp.array([0, 1]), jnp.array([1, 2]), weight=1.0)
      >>> reached = k_hop(graph, jnp.array([[0]]), 2, max_nodes=4)
      >>> reached.ids.tolist(), reached.distance.tolist()
      ([[0, 1, 2, 4]], [[0, 1, 2, -1]])
    """
    start = starts(start)
    if hops < 0:
        raise ValueError(f"hops must not be negative, got {hops}")
    if fan_out < 1:
        raise ValueError(f"fan_out must be at least 1, got {fan_out}")
    if max_nodes < max(start.shape[1], 1):
        raise ValueError(
            f"max_nodes must be at least {max(start.shape[1], 1)}, the number of starts, "
            f"got {max_nodes}"
        )
    if kind is not None:
        kind = per_row("kind", kind, start.shape[0], 0, jnp.int32)
    if as_of is not None:
        as_of = per_row("as_of", as_of, start.shape[0], 0, jnp.int32)
    fan_out = min(fan_out, graph.num_edge_slots)
    return _k_hop(graph, start, kind, as_of, hops=hops, fan_out=fan_out, max_nodes=max_nodes)


@functools.partial(jax.jit, static_argnames=("hops", "fan_out", "max_nodes"))
def _k_hop(
    graph: KnowledgeGraph,
    start: Int[Array, "Q R"],
    kind: Int[Array, "Q"] | None,
    as_of: Int[Array, "Q"] | None,
    *,
    hops: int,
    fan_out: int,
    max_nodes: int,
) -> Reached:
    nowhere = graph.num_nodes
    kind, as_of = (None if x is None else x[:, None] for x in (kind, as_of))

    def hop(now: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        ids, distance = state
        row = jnp.minimum(ids, nowhere - 1)
        is_next = is_edge(graph, row, kind, as_of) & (distance == now)[:, :, None]
        weight = jnp.where(is_next, graph.edge_weight[row], -jnp.inf)
        weight, slot = jax.lax.top_k(weight, fan_out)
        target = jnp.take_along_axis(graph.edge_target[row], slot, axis=2)
        target = jnp.where(weight > -jnp.inf, target, nowhere)
        flat = (ids.shape[0], max_nodes * fan_out)
        known = jnp.where(ids < nowhere, jnp.inf, -jnp.inf)
        found = jnp.concatenate([ids, target.reshape(flat)], axis=1)
        weight = jnp.concatenate([known, weight.reshape(flat)], axis=1)
        found = _strongest_of_each(found, weight, nowhere)[:, :max_nodes]
        # What was known sorts first and in its order, so its distances stay in place.
        is_new = (ids == nowhere) & (found < nowhere)
        return found, jnp.where(is_new, now + 1, distance)

    start = jnp.where(is_live_at(graph, start), start, nowhere)
    ids = _strongest_of_each(start, jnp.zeros(start.shape), nowhere)
    ids = jnp.pad(ids, [(0, 0), (0, max_nodes - start.shape[1])], constant_values=nowhere)
    distance = jnp.where(ids < nowhere, 0, -1).astype(jnp.int32)
    ids, distance = jax.lax.fori_loop(0, hops, hop, (ids, distance))
    return Reached(ids, distance, ids < nowhere)


def _strongest_of_each(
    ids: Int[Array, "Q L"], weight: Float[Array, "Q L"], nowhere: int
) -> Int[Array, "Q L"]:
    """Each id once, strongest first and ties in the given order; then N for the rest."""
    order = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    ids, weakness, order = jax.lax.sort((ids, -weight, order), dimension=1, num_keys=3)
    is_first = jnp.ones(ids.shape, bool).at[:, 1:].set(ids[:, 1:] != ids[:, :-1])
    ids = jnp.where(is_first, ids, nowhere)
    absent = (ids == nowhere).astype(jnp.int32)
    *_, ids = jax.lax.sort((absent, weakness, order, ids), dimension=1, num_keys=3)
    return ids


def starts(start: ArrayLike | Hits) -> Int[Array, "Q R"]:
    """The argument as an int32 [Q, R] array of ids; ValueError where it is nothing of the kind."""
    start = array("start", start.ids if isinstance(start, Hits) else start, jnp.int32)
    if start.ndim != 2:
        raise ValueError(
            f"start must be integers of shape [queries, starts], got shape {start.shape}"
        )
    return start
