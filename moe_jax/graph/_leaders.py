"""The leader rule for a whole batch: which node each item goes to, and writing it there."""

from typing import NamedTuple

import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._order import halves, joined, saturating_add
from moe_jax.graph.state import FOREVER, KnowledgeGraph, with_keys
from moe_jax.ops.first_true import first_true
from moe_jax.ops.independent import first_independent
from moe_jax.ops.search import nearest
from moe_jax.ops.similarity import exact_cosine

__all__ = [
    "Items",
    "Likeness",
    "Outcome",
    "assign",
    "clear_edges",
    "compare",
    "empty_edges",
    "is_current",
    "store",
]


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


class Likeness(NamedTuple):
    """How items compare with the nodes before the call and with each other.

    Attributes:
      old_id: int32 [R, k], the most similar old nodes, best first, N where there are fewer.
      old_score: float32 [R, k], -inf where there are fewer.
      score: float32 [R, R], cosines between items.
      leads: bool [R], the items that would become nodes if there was room for all.
    """

    old_id: Int[Array, "R k"]
    old_score: Float[Array, "R k"]
    score: Float[Array, "R R"]
    leads: Bool[Array, "R"]


class Outcome(NamedTuple):
    """Where items went.

    Attributes:
      node_id: int32 [R], the slot at the item's turn, N where the item is not stored.
      created: bool [R].
      similarity: float32 [R], the best cosine at the item's turn or 0.
    """

    node_id: Int[Array, "R"]
    created: Bool[Array, "R"]
    similarity: Float[Array, "R"]


def compare(
    graph: KnowledgeGraph, items: Items, threshold: Float[Array, ""], k: int = 1
) -> Likeness:
    """Score items against the k nearest old nodes and each other, and find the leaders.

    An item can only become a node (a leader) if no old node is near it; among those, leaders are
    the lexicographically first maximal independent set of the "near" graph, which is what taking
    items one at a time gives while there is room.
    """
    num_items = items.key.shape[0]
    old = nearest(
        items.key, graph.key, graph.is_live, k, threshold, code=graph.codes, is_query=items.is_valid
    )
    is_there = old.is_valid & items.is_valid[:, None]
    old_id = jnp.where(is_there, old.ids, graph.num_nodes)
    old_score = jnp.where(is_there, old.scores, -jnp.inf)
    score = exact_cosine(items.key, items.key)
    is_earlier = jnp.tri(num_items, k=-1, dtype=bool)
    may_lead = items.is_valid & (old_score[:, 0] < threshold)
    leads = first_independent(is_earlier & (score >= threshold), may_lead)
    return Likeness(old_id, old_score, score, leads)


def assign(
    graph: KnowledgeGraph, items: Items, like: Likeness | None, threshold: Float[Array, ""] | None
) -> Outcome:
    """Choose a node for every item as if items came one at a time and nothing was evicted.

    Once a leader finds no slot the graph is full, so later leaders find none either: leaders take
    the free slots in order, and whoever is left merges into an old node or an earlier leader that
    did get a slot, if one is near.

    Args:
      graph: the graph before.
      items: the items, in order.
      like: from `compare`; None if no item may merge.
      threshold: cosine at which two vectors are near; None if no item may merge.

    Returns:
      The outcome of each item.
    """
    num_items, nowhere = items.key.shape[0], graph.num_nodes
    leads = items.is_valid if like is None else like.leads
    free = first_true(~graph.is_live, num_items)
    turn = jnp.cumsum(leads, dtype=jnp.int32) - 1
    slot = jnp.where(leads, free[jnp.maximum(turn, 0)], nowhere)
    created = slot < nowhere
    if like is None:
        return Outcome(slot, created, jnp.zeros(num_items))

    # Slots ascend with turns, so the first of equal scores is the lowest slot.
    old_id, old_score = like.old_id[:, 0], like.old_score[:, 0]
    is_earlier = jnp.tri(num_items, k=-1, dtype=bool)
    score = jnp.where(is_earlier & created[None, :], like.score, -jnp.inf)
    leader = jnp.argmax(score, axis=1)
    new_id, new_score = slot[leader], jnp.max(score, axis=1)
    is_new = (new_score > old_score) | ((new_score == old_score) & (new_id < old_id))
    best_id = jnp.where(is_new, new_id, old_id)
    best_score = jnp.maximum(new_score, old_score)

    merged = items.is_valid & ~created & (best_score >= threshold)
    node_id = jnp.where(created, slot, jnp.where(merged, best_id, nowhere))
    is_scored = items.is_valid & (best_score > -jnp.inf)
    return Outcome(node_id, created, jnp.where(is_scored, best_score, 0.0))


def is_current(
    node_id: Int[Array, "R"], created: Bool[Array, "R"], num_nodes: int
) -> Bool[Array, "R"]:
    """Whether each item is stored in a node that no later item of the call took the slot of."""
    turn = jnp.arange(node_id.shape[0], dtype=jnp.int32)
    at_new = jnp.where(created, node_id, num_nodes)
    taken = jnp.full(num_nodes, -1, jnp.int32).at[at_new].max(turn, mode="drop")
    return (node_id < num_nodes) & (taken[jnp.minimum(node_id, num_nodes - 1)] <= turn)


def store(
    graph: KnowledgeGraph,
    items: Items,
    node_id: Int[Array, "R"],
    created: Bool[Array, "R"],
    *,
    may_merge: bool,
    may_evict: bool,
) -> KnowledgeGraph:
    """Write items to their nodes; nothing is added in floating point, so no order matters.

    Args:
      graph: the graph before.
      items: the items, in order.
      node_id: [R] int32, where items go, N for those whose node does not stay.
      created: [R] bool, from `assign` or an eviction.
      may_merge: whether two items may have the same node.
      may_evict: whether nodes may be created where nodes were.

    Returns:
      The graph with nodes created and merged; clock and counters as they were.
    """
    nowhere = graph.num_nodes
    at_new = jnp.where(created, node_id, nowhere)
    if may_evict:
        is_new = jnp.zeros_like(graph.is_live).at[at_new].set(True, mode="drop")
        graph = clear_edges(graph, graph.is_live & is_new)
        graph = graph._replace(is_live=graph.is_live & ~is_new)
    at_speaker = at_last = at_new
    if may_merge:
        speaks, is_last = _speakers(graph, items, node_id)
        at_speaker = jnp.where(speaks, node_id, nowhere)
        at_last = jnp.where(is_last, node_id, nowhere)
    before = graph.hits.at[at_new].set(0, mode="drop")
    none = jnp.zeros(nowhere, jnp.uint32)
    more = joined(*(none.at[node_id].add(half, mode="drop") for half in halves(items.weight)))

    def speak(field: Array, value: Array) -> Array:
        return field.at[at_speaker].set(value, mode="drop")

    graph = with_keys(graph, at_new, items.key)
    return graph._replace(
        is_live=graph.is_live.at[at_new].set(True, mode="drop"),
        created=graph.created.at[at_new].set(items.time, mode="drop"),
        updated=graph.updated.at[at_last].set(items.time, mode="drop"),
        hits=saturating_add(before, more),
        reads=graph.reads.at[at_new].set(0, mode="drop"),
        value=speak(graph.value, items.value),
        confidence=speak(graph.confidence, items.confidence),
        expert_id=speak(graph.expert_id, items.expert_id),
        kind=speak(graph.kind, items.kind),
        source=speak(graph.source, items.source),
        symbol=speak(graph.symbol, items.symbol),
    )


def _speakers(
    graph: KnowledgeGraph, items: Items, node_id: Int[Array, "R"]
) -> tuple[Bool[Array, "R"], Bool[Array, "R"]]:
    """The items that their nodes take value and labels from, and the last item of each node."""
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
    return speaks, stored & ~jnp.any(is_same & is_earlier.T, axis=1)


def clear_edges(graph: KnowledgeGraph, is_gone: Bool[Array, "N"]) -> KnowledgeGraph:
    """Empty every edge slot of the given nodes, and every other one that leads to them."""
    leads_nowhere = jnp.concatenate([is_gone, jnp.zeros(1, bool)])[graph.edge_target]
    return empty_edges(graph, is_gone[:, None] | leads_nowhere)


def empty_edges(graph: KnowledgeGraph, is_gone: Bool[Array, "N M"]) -> KnowledgeGraph:
    """Empty the given edge slots."""

    def emptied(field: Array, empty: int) -> Array:
        return jnp.where(is_gone, jnp.asarray(empty, field.dtype), field)

    return graph._replace(
        edge_target=emptied(graph.edge_target, graph.num_nodes),
        edge_weight=emptied(graph.edge_weight, 0),
        edge_kind=emptied(graph.edge_kind, 0),
        edge_time=emptied(graph.edge_time, 0),
        edge_start=emptied(graph.edge_start, 0),
        edge_end=emptied(graph.edge_end, FOREVER),
    )
