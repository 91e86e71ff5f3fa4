"""Eviction one item after the other: always right, R steps long."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._leaders import Items, Likeness, Outcome
from moe_jax.graph._order import first_to_go, policy_keys, saturating_add
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.search import best_of_all

__all__ = ["evict_one_by_one"]

_OLD = -1


class _Memory(NamedTuple):
    """What decides about later items; [N] by slot, [R] by item.

    `occupant` is the item that became the node in a slot, -1 where the slot is free or its node
    is older than the call.
    """

    occupant: Int[Array, "N"]
    is_live: Bool[Array, "N"]
    confidence: Float[Array, "N"]
    hits: Int[Array, "N"]
    reads: Int[Array, "N"]
    created: Int[Array, "N"]
    updated: Int[Array, "N"]
    slot: Int[Array, "R"]
    is_node: Bool[Array, "R"]


def evict_one_by_one(
    graph: KnowledgeGraph,
    items: Items,
    like: Likeness | None,
    threshold: Float[Array, ""] | None,
    policy: Int[Array, ""],
) -> Outcome:
    """Choose a node for every item, evicting by the policy where there is no free slot.

    Similarities were computed before, so that a step costs no more than a few passes over [N]
    and [R].

    Args:
      graph: the graph before.
      items: the items, in order.
      like: from `compare`; None if no item may merge.
      threshold: cosine at which two vectors are near; None if no item may merge.
      policy: its place in `POLICIES`.

    Returns:
      The outcome of each item.
    """
    num_items, nowhere = items.key.shape[0], graph.num_nodes
    start = _Memory(
        occupant=jnp.full(nowhere, _OLD, jnp.int32),
        is_live=graph.is_live,
        confidence=graph.confidence,
        hits=graph.hits,
        reads=graph.reads,
        created=graph.created,
        updated=graph.updated,
        slot=jnp.full(num_items, nowhere, jnp.int32),
        is_node=jnp.zeros(num_items, bool),
    )

    def step(memory: _Memory, i: Array) -> tuple[_Memory, tuple[Array, Array, Array]]:
        found, score = jnp.int32(nowhere), jnp.float32(-jnp.inf)
        merges = jnp.zeros((), bool)
        if like is not None:
            found, score = _best(graph, items, like, memory, i)
            merges = score >= threshold
        slot = jnp.where(merges, found, _slot_for_new(memory, policy))
        slot = jnp.where(items.is_valid[i], slot, nowhere)
        memory = _stored(memory, items, i, slot, ~merges)
        return memory, (slot, items.is_valid[i] & ~merges, score)

    order = jnp.arange(num_items, dtype=jnp.int32)
    _, (slot, created, score) = jax.lax.scan(step, start, order)
    is_scored = items.is_valid & (score > -jnp.inf)
    return Outcome(slot, created, jnp.where(is_scored, score, 0.0))


def _best(
    graph: KnowledgeGraph,
    items: Items,
    like: Likeness,
    memory: _Memory,
    i: Int[Array, ""],
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The slot of the node most similar to item i, and its cosine; -inf where there is none."""
    nowhere = graph.num_nodes
    ids, scores = like.old_id[i], like.old_score[i]
    is_old = memory.is_live & (memory.occupant == _OLD)
    is_there = (ids < nowhere) & is_old[jnp.minimum(ids, nowhere - 1)]
    at = jnp.argmax(is_there)
    has_old = is_there[at]
    old_id = jnp.where(has_old, ids[at], nowhere)
    old_score = jnp.where(has_old, scores[at], -jnp.inf)
    if ids.shape[0] < nowhere:

        def look_again() -> tuple[Array, Array]:
            best, found = best_of_all(items.key[i][None], graph.key, is_old[None], 1)
            return jnp.where(jnp.any(is_old), found[0, 0], nowhere), best[0, 0]

        is_used_up = items.is_valid[i] & ~has_old & (ids[-1] < nowhere)
        old_id, old_score = jax.lax.cond(is_used_up, look_again, lambda: (old_id, old_score))

    slot = jnp.minimum(memory.slot, nowhere - 1)
    is_there = memory.is_node & (memory.occupant[slot] == jnp.arange(slot.shape[0]))
    score = jnp.where(is_there, like.score[i], -jnp.inf)
    new_score = jnp.max(score)
    new_id = jnp.min(jnp.where(is_there & (score == new_score), memory.slot, nowhere))
    is_new = (new_score > old_score) | ((new_score == old_score) & (new_id < old_id))
    return jnp.where(is_new, new_id, old_id), jnp.maximum(new_score, old_score)


def _slot_for_new(memory: _Memory, policy: Int[Array, ""]) -> Int[Array, ""]:
    """The lowest free slot, or that of the next victim."""
    first, second = policy_keys(
        policy,
        confidence=memory.confidence,
        hits=memory.hits,
        reads=memory.reads,
        created=memory.created,
        updated=memory.updated,
    )
    victim = first_to_go(first, second, memory.is_live)
    free = jnp.argmin(memory.is_live).astype(jnp.int32)
    return jnp.where(memory.is_live[free], victim, free)


def _stored(
    memory: _Memory, items: Items, i: Int[Array, ""], slot: Int[Array, ""], is_new: Bool[Array, ""]
) -> _Memory:
    """The memory with item i in a slot, as its node or merged into it."""
    at = jnp.minimum(slot, memory.is_live.shape[0] - 1)

    def put(field: Array, new: Array, merged: Array) -> Array:
        return field.at[slot].set(jnp.where(is_new, new, merged), mode="drop")

    confidence, weight, time = items.confidence[i], items.weight[i], items.time[i]
    rises = confidence > memory.confidence[at]
    return _Memory(
        occupant=put(memory.occupant, i, memory.occupant[at]),
        is_live=memory.is_live.at[slot].set(True, mode="drop"),
        confidence=put(
            memory.confidence, confidence, jnp.where(rises, confidence, memory.confidence[at])
        ),
        hits=put(memory.hits, weight, saturating_add(memory.hits[at], weight)),
        reads=put(memory.reads, jnp.int32(0), memory.reads[at]),
        created=put(memory.created, time, memory.created[at]),
        updated=put(memory.updated, time, time),
        slot=memory.slot.at[i].set(slot),
        is_node=memory.is_node.at[i].set(is_new & items.is_valid[i]),
    )
