"""The leader rule for a whole batch: which node each item goes to, and writing it there."""

from typing import NamedTuple

import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph.state import KnowledgeGraph, with_keys
from moe_jax.ops.independent import first_independent
from moe_jax.ops.nearest import nearest
from moe_jax.ops.similarity import exact_cosine

__all__ = ["Items", "assign", "store"]


class Items(NamedTuple):
    """R items to insert, checked and complete; `is_valid` leaves out malformed ones."""

    key: Float[Array, "R D"]
    value: Float[Array, "R D"]
    confidence: Float[Array, "R"]
    expert_id: Int[Array, "R"]
    kind: Int[Array, "R"]
    source: Int[Array, "R 2"]
    symbol: Int[Array, "R"]
    weight: Int[Array, "R"]
    time: Int[Array, "R"]
    is_valid: Bool[Array, "R"]


def assign(
    graph: KnowledgeGraph, items: Items, threshold: Float[Array, ""]
) -> tuple[Int[Array, "R"], Bool[Array, "R"], Float[Array, "R"]]:
    """Choose a node for every item as if items came one at a time.

    An item can only become a node (a leader) if no old node is near it; among those, leaders are
    the lexicographically first maximal independent set of the "near" graph, which is what taking
    items one at a time gives while there is room. Once a leader finds no slot the graph is full,
    so later leaders find none either: leaders take the free slots in order, and whoever is left
    merges into an old node or an earlier leader that did get a slot, if one is near.

    Args:
      graph: the graph before.
      items: the items, in order.
      threshold: cosine at which two vectors are near.

    Returns:
      (node_id [R] int32, N where the item is not stored; created [R] bool; similarity [R]
      float32, the best cosine at the item's turn or 0).
    """
    num_items, nowhere = items.key.shape[0], graph.num_nodes
    if num_items == 0:
        return jnp.zeros(0, jnp.int32), jnp.zeros(0, bool), jnp.zeros(0, jnp.float32)
    old_id, old_score = nearest(
        items.key, graph.key, graph.is_live, 1, threshold, code=graph.codes, is_query=items.is_valid
    )
    old_id, old_score = old_id[:, 0], old_score[:, 0]

    score = exact_cosine(items.key, items.key)
    is_earlier = jnp.tri(num_items, k=-1, dtype=bool)
    may_lead = items.is_valid & (old_score < threshold)
    is_leader = first_independent(is_earlier & (score >= threshold), may_lead)

    free = jnp.nonzero(~graph.is_live, size=num_items, fill_value=nowhere)[0].astype(jnp.int32)
    turn = jnp.cumsum(is_leader, dtype=jnp.int32) - 1
    slot = jnp.where(is_leader, free[jnp.maximum(turn, 0)], nowhere)
    created = slot < nowhere

    # Slots ascend with turns, so the first of equal scores is the lowest slot.
    score = jnp.where(is_earlier & created[None, :], score, -jnp.inf)
    leader = jnp.argmax(score, axis=1)
    new_id, new_score = slot[leader], jnp.max(score, axis=1)
    is_new = (new_score > old_score) | ((new_score == old_score) & (new_id < old_id))
    best_id = jnp.where(is_new, new_id, old_id)
    best_score = jnp.maximum(new_score, old_score)

    merged = items.is_valid & ~created & (best_score >= threshold)
    node_id = jnp.where(created, slot, jnp.where(merged, best_id, nowhere))
    is_scored = items.is_valid & (best_score > -jnp.inf)
    return node_id, created, jnp.where(is_scored, best_score, 0.0)


def store(
    graph: KnowledgeGraph, items: Items, node_id: Int[Array, "R"], created: Bool[Array, "R"]
) -> KnowledgeGraph:
    """Write items to their nodes; nothing is added in floating point, so no order matters.

    Args:
      graph: the graph before.
      items: the items, in order.
      node_id: [R] int32, from `assign`.
      created: [R] bool, from `assign`.

    Returns:
      The graph with nodes created and merged; clock and counters as they were.
    """
    nowhere = graph.num_nodes
    stored = node_id < nowhere
    order = jnp.arange(node_id.shape[0])
    is_same = stored[:, None] & (node_id[:, None] == node_id[None, :])
    is_earlier = order[None, :] < order[:, None]
    rival, own = items.confidence[None, :], items.confidence[:, None]
    is_outspoken = is_same & ((rival > own) | ((rival == own) & is_earlier))
    node = jnp.minimum(node_id, nowhere - 1)
    standing = jnp.where(graph.is_live[node], graph.confidence[node], -jnp.inf)
    speaks = stored & ~jnp.any(is_outspoken, axis=1) & (items.confidence > standing)
    is_last = stored & ~jnp.any(is_same & is_earlier.T, axis=1)

    at_new = jnp.where(created, node_id, nowhere)
    at_speaker = jnp.where(speaks, node_id, nowhere)
    at_last = jnp.where(is_last, node_id, nowhere)
    hits = graph.hits.at[at_new].set(0, mode="drop")

    def speak(field: Array, value: Array) -> Array:
        return field.at[at_speaker].set(value, mode="drop")

    graph = with_keys(graph, at_new, items.key)
    return graph._replace(
        is_live=graph.is_live.at[at_new].set(True, mode="drop"),
        created=graph.created.at[at_new].set(items.time, mode="drop"),
        updated=graph.updated.at[at_last].set(items.time, mode="drop"),
        hits=hits.at[node_id].add(items.weight, mode="drop"),
        reads=graph.reads.at[at_new].set(0, mode="drop"),
        value=speak(graph.value, items.value),
        confidence=speak(graph.confidence, items.confidence),
        expert_id=speak(graph.expert_id, items.expert_id),
        kind=speak(graph.kind, items.kind),
        source=speak(graph.source, items.source),
        symbol=speak(graph.symbol, items.symbol),
    )
