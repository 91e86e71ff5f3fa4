"""The edges of a knowledge graph by where they lead, sorted once for many walks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import is_live_at, per_row
from moe_jax.graph.neighbours import is_edge
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["IncomingEdges", "by_target", "incoming_edges", "shares"]


class IncomingEdges(NamedTuple):
    """The edges of a graph by target, L = N * M of them, as `pagerank` walks them.

    Attributes:
      source: int32 [L], where each edge comes from.
      share: float32 [L], which part of its source's rank flows through it, 0 where no edge is.
      is_first: bool [L], whether the edge before leads elsewhere.
      last: int32 [N], the last edge that leads to each node, L where none does.
      is_dangling: bool [N], live nodes that no rank flows out of.
      is_live: bool [N].
    """

    source: Int[Array, "L"]
    share: Float[Array, "L"]
    is_first: Bool[Array, "L"]
    last: Int[Array, "N"]
    is_dangling: Bool[Array, "N"]
    is_live: Bool[Array, "N"]


def incoming_edges(
    graph: KnowledgeGraph,
    *,
    weighted: bool = True,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
) -> IncomingEdges:
    """Sort a graph's edges by target: do it once where many rankings of one graph follow.

    Args:
      graph: the graph.
      weighted: whether a node's rank is shared in proportion to its edges' weights, of which
        negative ones count as 0, or equally.
      kind: only edges of this kind, an integer.
      as_of: only edges that hold at this logical time, as for `neighbours`, an integer.

    Returns:
      `IncomingEdges`; it holds for the graph as it is now.

    Raises:
      ValueError: if kind or as_of is not one value.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 3), jnp.eye(3))
      >>> graph, _ = link(graph, jnp.array([0, 0]), jnp.array([2, 1]), weight=jnp.array([3.0, 1.0]))
      >>> edges = incoming_edges(graph)
      >>> edges.share[:3].tolist(), edges.last.tolist()
      ([0.25, 0.75, 0.0], [32, 0, 1, 32])
    """
    if kind is not None:
        kind = per_row("kind", kind, 1, 0, jnp.int32)
    if as_of is not None:
        as_of = per_row("as_of", as_of, 1, 0, jnp.int32)
    return _incoming_edges(graph, kind, as_of, weighted=weighted)


@functools.partial(jax.jit, static_argnames="weighted")
def _incoming_edges(
    graph: KnowledgeGraph,
    kind: Int[Array, "1"] | None,
    as_of: Int[Array, "1"] | None,
    *,
    weighted: bool,
) -> IncomingEdges:
    graph = jax.lax.stop_gradient(graph)
    node = jnp.arange(graph.num_nodes, dtype=jnp.int32)
    target, share = shares(graph, node, kind, as_of, weighted=weighted)
    return by_target(target, share, graph.is_live)


def shares(
    graph: KnowledgeGraph,
    row: Int[Array, "*R"],
    kind: Int[Array, "*F"] | None,
    as_of: Int[Array, "*F"] | None,
    *,
    weighted: bool,
) -> tuple[Int[Array, "*R M"], Float[Array, "*R M"]]:
    """Where rank flows from nodes, and which part of it.

    Args:
      graph: the graph.
      row: int32 [...], node ids; one out of range has no edges.
      kind: int32 [...] or None, as for `is_edge`.
      as_of: int32 [...] or None, likewise.
      weighted: see `incoming_edges`.

    Returns:
      (targets [..., M] int32, N where nothing flows, and shares [..., M] float32, 0 there).

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 3), jnp.eye(3))
      >>> graph, _ = link(graph, jnp.array([0]), jnp.array([2]), weight=3.0)
      >>> target, share = shares(graph, jnp.array([0, 4]), None, None, weighted=True)
      >>> target[:, :2].tolist(), share[:, :2].tolist()
      ([[2, 4], [4, 4]], [[1.0, 0.0], [0.0, 0.0]])
    """
    is_live = is_live_at(graph, row)[..., None]
    row = jnp.clip(row, 0, graph.num_nodes - 1)
    is_open = is_edge(graph, row, kind, as_of) & is_live
    weight = graph.edge_weight[row]
    weight = weight if weighted else jnp.ones_like(weight)
    weight = jnp.where(is_open & (weight > 0.0) & jnp.isfinite(weight), weight, 0.0)
    largest = jnp.max(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(largest > 0.0, largest, 1.0)  # so that no sum overflows
    total = jnp.sum(weight, axis=-1, keepdims=True)
    share = weight / jnp.where(total > 0.0, total, 1.0)
    return jnp.where(share > 0.0, graph.edge_target[row], graph.num_nodes), share


def by_target(
    target: Int[Array, "N M"], share: Float[Array, "N M"], is_live: Bool[Array, "N"]
) -> IncomingEdges:
    """Sort edges by target, those of one target by source and slot.

    Args:
      target: int32 [N, M]; N for an edge that leads nowhere.
      share: float32 [N, M], as from `shares`.
      is_live: bool [N].

    Returns:
      `IncomingEdges`.

    Example:
      >>> edges = by_target(jnp.array([[1], [2]]), jnp.array([[1.0], [0.0]]), jnp.ones(2, bool))
      >>> edges.source.tolist(), edges.last.tolist(), edges.is_dangling.tolist()
      ([0, 1], [2, 0], [False, True])
    """
    nowhere, num_edges = target.shape[0], target.size
    is_dangling = is_live & ~jnp.any(share > 0.0, axis=1)
    index = jnp.arange(num_edges, dtype=jnp.int32)
    if (nowhere + 1) * num_edges < 2**31:
        # Compilers for CPUs sort one array several times as fast as an array with its places.
        order = jnp.sort(target.ravel() * num_edges + index) % num_edges
    else:
        order = jnp.argsort(target.ravel(), stable=True).astype(jnp.int32)
    target = target.ravel()[order]
    is_first = jnp.ones(num_edges, bool).at[1:].set(target[1:] != target[:-1])
    is_last = jnp.ones(num_edges, bool).at[:-1].set(is_first[1:])
    at = jnp.where(is_last, target, nowhere)
    return IncomingEdges(
        source=order // share.shape[1],
        share=share.ravel()[order],
        is_first=is_first,
        last=jnp.full(nowhere, num_edges, jnp.int32).at[at].set(index, mode="drop"),
        is_dangling=is_dangling,
        is_live=is_live,
    )
