"""Temporal edges: from each report of a stream to the next one."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Int
from moe_jax.graph._arguments import check_choice, ids, is_live_at, per_row
from moe_jax.graph.link import TEMPORAL, link
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["StreamTail", "link_stream"]


class StreamTail(NamedTuple):
    """Where W streams ended, so that the next call can go on: hand it to `link_stream`.

    Attributes:
      node_id: int32 [W], the node of the last report of stream w, N where there is none yet.
      created: int32 [W], when that node was created, by which a slot that has since been given
        to another node is told apart.
    """

    node_id: Int[Array, "W"]
    created: Int[Array, "W"]

    @classmethod
    def create(cls, graph: KnowledgeGraph, num_streams: int) -> "StreamTail":
        """The state before the first report of streams 0 to W - 1.

        Args:
          graph: the graph that the streams go to.
          num_streams: W.

        Returns:
          A tail without reports.

        Raises:
          ValueError: if num_streams is negative.

        Example:
          >>> StreamTail.create(KnowledgeGraph.create(4, 2), 2).node_id.tolist()
          [4, 4]
        """
        if num_streams < 0:
            raise ValueError(f"num_streams must not be negative, got {num_streams}")
        nowhere = jnp.full(num_streams, graph.num_nodes, jnp.int32)
        return cls(nowhere, jnp.zeros(num_streams, jnp.int32))


def link_stream(
    graph: KnowledgeGraph,
    node_id: ArrayLike,
    stream: ArrayLike,
    *,
    position: ArrayLike | None = None,
    tail: StreamTail | None = None,
    weight: ArrayLike = 1.0,
    kind: ArrayLike = TEMPORAL,
    is_valid: ArrayLike | None = None,
    symmetric: bool = False,
    on_duplicate: str = "update",
) -> tuple[KnowledgeGraph, Int[Array, ""], StreamTail]:
    """Link each report's node to the node of the next report of the same stream.

    Reports whose node is not live are passed over. Two reports in a row at one node leave no
    edge. Edges are written as `link` does, stream by stream in ascending order. Where a node's
    slots are full the strongest edges stay, and among equals the older ones.

    Args:
      graph: the graph before.
      node_id: [R] integers, the reports' nodes, such as `InsertInfo.node_id`.
      stream: [R] integers, what tells streams apart, such as a document id; or one for all.
      position: [R] integers, the order of reports in their streams, such as an offset; equal
        ones stay in the given order. By default all are in the given order.
      tail: where streams ended in the call before, see `StreamTail.create`: only streams 0 to
        W - 1 go on from call to call. By default none do.
      weight: [R], of the edge that leads to each report, or one for all.
      kind: [R] integers, of the edge that leads to each report, or one for all.
      is_valid: [R] bool, all by default; the others are passed over.
      symmetric: write each edge's reverse too, as if it came next.
      on_duplicate: "update" or "append", see `link`.

    Returns:
      The graph after, how many edges were written (int32 scalar), and where the streams end now.
      A tail is worth nothing after nodes were renumbered.

    Raises:
      ValueError: if an argument has the wrong shape or on_duplicate is unknown.

    Example:
      >>> graph, info = insert(KnowledgeGraph.create(4, 3), jnp.eye(3))
      >>> graph, num_linked, tail = link_stream(
      ...     graph, info.node_id[:2], 0, tail=StreamTail.create(graph, 1))
      >>> graph, more, tail = link_stream(graph, info.node_id[2:], 0, tail=tail)
      >>> int(num_linked), int(more), graph.edge_target[:3, 0].tolist()
      (1, 1, [1, 2, 4])
    """
    check_choice("on_duplicate", on_duplicate, ("update", "append"))
    node_id = ids("node_id", node_id)
    rows = node_id.shape[0]
    tail = StreamTail.create(graph, 0) if tail is None else tail
    if tail.node_id.ndim != 1 or tail.created.shape != tail.node_id.shape:
        raise ValueError(
            f"tail must hold two lists of one length, got shapes {tail.node_id.shape} and "
            f"{tail.created.shape}"
        )
    ints = functools.partial(per_row, rows=rows, dtype=jnp.int32)
    plan = _steps(
        graph,
        node_id,
        ints("stream", stream, default=0),
        ints("position", position, default=0),
        tail,
        per_row("is_valid", is_valid, rows, True, bool),
    )
    graph, count = link(
        graph,
        plan.source,
        plan.target,
        weight=per_row("weight", weight, rows, 1.0, jnp.float32)[plan.order],
        kind=ints("kind", kind, default=TEMPORAL)[plan.order],
        is_valid=plan.is_step,
        symmetric=symmetric,
        on_duplicate=on_duplicate,
    )
    return graph, count, plan.tail


class _Steps(NamedTuple):
    """Reports by stream and position; each may be a step from the report before."""

    order: Int[Array, "R"]
    source: Int[Array, "R"]
    target: Int[Array, "R"]
    is_step: Bool[Array, "R"]
    tail: StreamTail


@jax.jit
def _steps(
    graph: KnowledgeGraph,
    node_id: Int[Array, "R"],
    stream: Int[Array, "R"],
    position: Int[Array, "R"],
    tail: StreamTail,
    is_valid: Bool[Array, "R"],
) -> _Steps:
    rows, num_streams = node_id.shape[0], tail.node_id.shape[0]
    is_valid = is_valid & is_live_at(graph, node_id)
    index = jnp.arange(rows, dtype=jnp.int32)
    absent, stream, _, order = jax.lax.sort(
        ((~is_valid).astype(jnp.int32), stream, position, index), num_keys=4
    )
    node, is_valid = node_id[order], absent == 0
    before = jnp.maximum(index - 1, 0)
    is_next = is_valid & (index > 0) & (stream == stream[before])
    is_last = is_valid & ~jnp.concatenate([is_next[1:], jnp.zeros(1, bool)])[:rows]
    source, is_step = node[before], is_next
    if num_streams > 0:
        is_carried = is_valid & (stream >= 0) & (stream < num_streams)
        own = jnp.clip(stream, 0, num_streams - 1)
        last, last_created = tail.node_id[own], tail.created[own]
        created = graph.created[jnp.clip(last, 0, graph.num_nodes - 1)]
        is_there = is_live_at(graph, last) & (created == last_created)
        source = jnp.where(is_next, source, last)
        is_step = is_next | (is_carried & is_there)
        at = jnp.where(is_carried & is_last, stream, num_streams)
        made = graph.created[jnp.clip(node, 0, graph.num_nodes - 1)]
        tail = StreamTail(
            tail.node_id.at[at].set(node, mode="drop"),
            tail.created.at[at].set(made, mode="drop"),
        )
    return _Steps(order, source, node, is_step, tail)
