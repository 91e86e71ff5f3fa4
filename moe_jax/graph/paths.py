"""Cheapest paths along the edges of a knowledge graph."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import check_choice, is_live_at, per_row
from moe_jax.graph.neighbours import is_edge
from moe_jax.graph.query import Hits
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.graph.traverse import starts

__all__ = ["Path", "Paths", "path_to", "shortest_paths"]


class Paths(NamedTuple):
    """The cheapest ways from Q sets of nodes to every node.

    Attributes:
      distance: float32 [Q, N], cost of the cheapest way; infinite where there is none.
      previous: int32 [Q, N], the node before on that way, N at a start and where there is none.
    """

    distance: Float[Array, "Q N"]
    previous: Int[Array, "Q N"]


class Path(NamedTuple):
    """One way for each of Q queries, from a start to the target.

    Attributes:
      ids: int32 [Q, P], N behind the target, and everywhere if there is no way of P nodes.
      is_valid: bool [Q, P].
    """

    ids: Int[Array, "Q P"]
    is_valid: Bool[Array, "Q P"]


def shortest_paths(
    graph: KnowledgeGraph,
    start: ArrayLike | Hits,
    *,
    cost: str = "weight",
    max_hops: int = 8,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
) -> Paths:
    """The cheapest ways of at most `max_hops` edges from given nodes to all others.

    By rounds of relaxation (Bellman 1958), all edges at once, until nothing changes.

    Args:
      graph: the graph.
      start: [Q, R] integers, node ids to start from, or `Hits`; those that are not live are left
        out.
      cost: of an edge: "weight", 1 minus its weight but at least 0; or "hops", always 1.
      max_hops: the cap on rounds, at least 0.
      kind: only edges of this kind, an integer.
      as_of: only edges that hold at this logical time, as for `neighbours`, an integer.

    Returns:
      `Paths` of shape [Q, N]. Among equally cheap ways that are found in the same round, the one
      through the lowest id.

    Raises:
      ValueError: if start or a filter has the wrong shape, cost is unknown, or max_hops negative.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 3), jnp.eye(3))
      >>> graph, _ = link(graph, jnp.array([0, 1]), jnp.array([1, 2]), weight=0.5)
      >>> paths = shortest_paths(graph, jnp.array([[0]]))
      >>> paths.distance.tolist(), paths.previous.tolist()
      ([[0.0, 0.5, 1.0, inf]], [[4, 0, 1, 4]])
    """
    check_choice("cost", cost, ("weight", "hops"))
    start = starts(start)
    if max_hops < 0:
        raise ValueError(f"max_hops must not be negative, got {max_hops}")
    if kind is not None:
        kind = per_row("kind", kind, 1, 0, jnp.int32)
    if as_of is not None:
        as_of = per_row("as_of", as_of, 1, 0, jnp.int32)
    return _shortest_paths(graph, start, kind, as_of, cost=cost, max_hops=max_hops)


@functools.partial(jax.jit, static_argnames=("cost", "max_hops"))
def _shortest_paths(
    graph: KnowledgeGraph,
    start: Int[Array, "Q R"],
    kind: Int[Array, "1"] | None,
    as_of: Int[Array, "1"] | None,
    *,
    cost: str,
    max_hops: int,
) -> Paths:
    nowhere, (num_queries, _) = graph.num_nodes, start.shape
    node = jnp.arange(nowhere, dtype=jnp.int32)
    is_open = is_edge(graph, node, kind, as_of) & graph.is_live[:, None]
    toll = jnp.ones_like(graph.edge_weight)
    if cost == "weight":
        toll = jnp.maximum(1.0 - graph.edge_weight, 0.0)
    toll = jnp.where(is_open, toll, jnp.inf)
    target = jnp.where(is_open, graph.edge_target, nowhere).ravel()
    source = jnp.repeat(node, graph.num_edge_slots)[None, :]

    def least(values: Array, fill: ArrayLike) -> Array:
        # A minimum is the same in whatever order a scatter takes it.
        empty = jnp.full((num_queries, nowhere), fill, values.dtype)
        return empty.at[:, target].min(values, mode="drop")

    def relax(state: tuple[Array, Array, Paths]) -> tuple[Array, Array, Paths]:
        now, _, paths = state
        reach = jax.lax.collapse(paths.distance[:, :, None] + toll[None], 1, 3)
        best = least(reach, jnp.inf)
        is_best = reach == best[:, jnp.minimum(target, nowhere - 1)]
        previous = least(jnp.where(is_best, source, nowhere), nowhere)
        is_less = best < paths.distance
        distance = jnp.where(is_less, best, paths.distance)
        previous = jnp.where(is_less, previous, paths.previous)
        return now + 1, jnp.any(is_less), Paths(distance, previous)

    query = jnp.arange(num_queries)[:, None]
    at = jnp.where(is_live_at(graph, start), start, nowhere)
    distance = jnp.full((num_queries, nowhere), jnp.inf).at[query, at].set(0.0, mode="drop")
    previous = jnp.full(distance.shape, nowhere, jnp.int32)
    state = jnp.int32(0), jnp.bool_(True), Paths(distance, previous)
    *_, paths = jax.lax.while_loop(lambda s: (s[0] < max_hops) & s[1], relax, state)
    return paths


def path_to(paths: Paths, target: ArrayLike, *, max_nodes: int) -> Path:
    """The way to one node for each query, read off the result of `shortest_paths`.

    It costs at most what `paths.distance` says: less where the cap on hops stopped the search
    after a node on the way had become cheaper.

    Args:
      paths: from `shortest_paths`.
      target: [Q] integers, node ids, or one for all.
      max_nodes: P, the longest way to return, in nodes.

    Returns:
      `Path` of shape [Q, P].

    Raises:
      ValueError: if target has the wrong shape or max_nodes is below 1.

    Example:
      >>> paths = Paths(jnp.array([[0.0, 0.5, 1.0]]), jnp.array([[3, 0, 1]]))
      >>> path_to(paths, 2, max_nodes=4).ids.tolist()
      [[0, 1, 2, 3]]
    """
    num_queries, nowhere = paths.previous.shape
    if max_nodes < 1:
        raise ValueError(f"max_nodes must be at least 1, got {max_nodes}")
    target = per_row("target", target, num_queries, 0, jnp.int32)

    def step(node: Array, _: None) -> tuple[Array, Array]:
        at = jnp.clip(node, 0, nowhere - 1)
        before = jnp.take_along_axis(paths.previous, at[:, None], axis=1)[:, 0]
        return jnp.where(node < nowhere, before, nowhere), node

    cost = jnp.take_along_axis(paths.distance, jnp.clip(target, 0, nowhere - 1)[:, None], 1)[:, 0]
    is_reached = (target >= 0) & (target < nowhere) & jnp.isfinite(cost)
    target = jnp.where(is_reached, target, nowhere)
    beyond, back = jax.lax.scan(step, target, None, length=max_nodes)
    back = jnp.where(beyond[None, :] == nowhere, back, nowhere).T
    length = jnp.sum(back < nowhere, axis=1, dtype=jnp.int32)
    at = length[:, None] - 1 - jnp.arange(max_nodes, dtype=jnp.int32)[None, :]
    ids = jnp.take_along_axis(back, jnp.maximum(at, 0), axis=1)
    ids = jnp.where(at >= 0, ids, nowhere)
    return Path(ids, ids < nowhere)
