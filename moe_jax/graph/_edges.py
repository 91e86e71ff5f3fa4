"""Write edges into the slots of their sources, as if one came after the other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["Edges", "write_edges", "write_rows"]

# Edges of one source that one turn of `write_edges` takes.
_TURN = 8
_LOWEST = -(2**31)


class Edges(NamedTuple):
    """What is known of edges but their source: arrays of one shape, such as [L] or [R, W].

    Every leaf `x` is the graph's `edge_x`.
    """

    target: Int[Array, "*L"]
    weight: Float[Array, "*L"]
    kind: Int[Array, "*L"]
    time: Int[Array, "*L"]
    start: Int[Array, "*L"]
    end: Int[Array, "*L"]


def write_edges(
    graph: KnowledgeGraph,
    source: Int[Array, "L"],
    edges: Edges,
    is_valid: Bool[Array, "L"],
    on_duplicate: str,
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    """Write L edges in order, whatever their sources.

    Sources do not disturb each other, so a turn takes the next eight edges of every source at
    once. There are as many turns as the busiest source needs.

    Args:
      graph: the graph before.
      source: int32 [L], ids of live nodes where valid.
      edges: leaves [L].
      is_valid: bool [L].
      on_duplicate: "update" or "append".

    Returns:
      The graph after, and how many edges were written (int32 scalar).
    """
    size, nowhere = source.shape[0], graph.num_nodes
    source = jnp.where(is_valid, source, nowhere)
    order = jnp.argsort(source, stable=True)
    source, edges = source[order], jax.tree.map(lambda x: x[order], edges)
    index = jnp.arange(size, dtype=jnp.int32)
    is_first = jnp.ones(size, bool).at[1:].set(source[1:] != source[:-1])
    turn = (index - jax.lax.cummax(jnp.where(is_first, index, 0))) // _TURN
    num_turns = jnp.max(jnp.where(source < nowhere, turn + 1, 0), initial=0)
    row = jnp.where(is_first, source, nowhere)
    ahead = index[:, None] + jnp.arange(_TURN, dtype=jnp.int32)[None, :]

    def write(state: tuple[Array, Edges, Array]) -> tuple[Array, Edges, Array]:
        now, slots, count = state
        at = ahead + now * _TURN
        is_inside = at < size
        at = jnp.minimum(at, size - 1)
        is_own = is_inside & (source[at] == row[:, None]) & (row < nowhere)[:, None]
        columns = jax.tree.map(lambda x: x[at], edges)
        slots, num_written = _write_rows(slots, row, columns, is_own, on_duplicate)
        return now + 1, slots, count + num_written

    start = (jnp.int32(0), _slots_of(graph), jnp.int32(0))
    _, slots, count = jax.lax.while_loop(lambda state: state[0] < num_turns, write, start)
    return _with_slots(graph, slots), count


def write_rows(
    graph: KnowledgeGraph,
    source: Int[Array, "R"],
    edges: Edges,
    is_valid: Bool[Array, "R W"],
    on_duplicate: str,
) -> tuple[KnowledgeGraph, Int[Array, ""]]:
    """Write W edges out of each of R different nodes, in order, without a loop of turns.

    Args:
      graph: the graph before.
      source: int32 [R], ids of live nodes, no two the same; N where nothing is valid.
      edges: leaves [R, W].
      is_valid: bool [R, W].
      on_duplicate: "update" or "append".

    Returns:
      The graph after, and how many edges were written (int32 scalar).
    """
    slots, count = _write_rows(_slots_of(graph), source, edges, is_valid, on_duplicate)
    return _with_slots(graph, slots), count


def _write_rows(
    slots: Edges,
    source: Int[Array, "R"],
    edges: Edges,
    is_valid: Bool[Array, "R W"],
    on_duplicate: str,
) -> tuple[Edges, Int[Array, ""]]:
    """As `write_rows`, on the graph's edge fields [N, M] alone."""
    nowhere = slots.target.shape[0]
    rows = jax.tree.map(lambda x: x[jnp.minimum(source, nowhere - 1)], slots)

    def step(rows: Edges, column: tuple[Edges, Array]) -> tuple[Edges, Array]:
        edge, valid = column
        is_slot = _choose_slot(rows, edge, nowhere, on_duplicate) & valid[:, None]
        rows = jax.tree.map(lambda old, new: jnp.where(is_slot, new[:, None], old), rows, edge)
        return rows, jnp.sum(is_slot, dtype=jnp.int32)

    columns = jax.tree.map(jnp.transpose, (edges, is_valid))
    rows, written = jax.lax.scan(step, rows, columns, unroll=max(1, min(_TURN, is_valid.shape[1])))
    slots = jax.tree.map(lambda x, new: x.at[source].set(new, mode="drop"), slots, rows)
    return slots, jnp.sum(written, dtype=jnp.int32)


def _choose_slot(rows: Edges, edge: Edges, nowhere: int, on_duplicate: str) -> Bool[Array, "R M"]:
    """Where each row takes its edge: its duplicate's slot, an empty one, or the weakest's."""
    rank = _sortable(rows.weight)
    rank = jnp.where(rows.target == nowhere, _LOWEST + 1, rank)
    if on_duplicate == "update":
        is_same = (rows.target == edge.target[:, None]) & (rows.kind == edge.kind[:, None])
        rank = jnp.where(is_same, _LOWEST, rank)
    least = jnp.min(rank, axis=1)
    fits = (least <= _LOWEST + 1) | (_sortable(edge.weight) > least)
    index = jnp.arange(rank.shape[1], dtype=jnp.int32)[None, :]
    return (index == jnp.argmin(rank, axis=1)[:, None]) & fits[:, None]


def _sortable(x: Float[Array, "*R"]) -> Int[Array, "*R"]:
    """Integers in the order of the floats, above _LOWEST + 1; zeros of either sign are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _slots_of(graph: KnowledgeGraph) -> Edges:
    return Edges(*(getattr(graph, f"edge_{name}") for name in Edges._fields))


def _with_slots(graph: KnowledgeGraph, slots: Edges) -> KnowledgeGraph:
    return graph._replace(**{f"edge_{name}": x for name, x in slots._asdict().items()})
