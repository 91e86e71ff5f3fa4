"""Insert into a knowledge graph: every item merges into a node, becomes one, or is rejected."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import check_choice, per_row, vectors
from moe_jax.graph._leaders import Items, assign, compare, is_current, store
from moe_jax.graph._one_by_one import evict_one_by_one
from moe_jax.graph._order import POLICIES, saturating_add
from moe_jax.graph._rounds import evict_in_rounds
from moe_jax.graph.state import KnowledgeGraph, with_keys
from moe_jax.ops.similarity import normalize

__all__ = ["InsertInfo", "insert"]

# How many of the most similar old nodes are fetched when some may be evicted before their turn.
_FETCH = 4


class InsertInfo(NamedTuple):
    """What became of each item of one `insert`.

    Attributes:
      node_id: int32 [R], the node that stands for the item, N when it was rejected or invalid. If
        that node was evicted by a later item of the call, still the slot it had.
      merged: bool [R], the item joined a node.
      created: bool [R], the item became a node.
      rejected: bool [R], the item was valid and could not be stored: its key has no direction
        (zero, NaN, infinite), its value or confidence is not finite, its weight is negative, or the
        graph is full.
      similarity: float32 [R], the best cosine over the nodes that were live when the item's turn
        came, 0 when there were none or when nothing was compared. Below the threshold, where it
        decides nothing, near-ties are not told apart: it may be that of another near node.
      is_current: bool [R], the node that the item joined or became is there after the call.
    """

    node_id: Int[Array, "R"]
    merged: Bool[Array, "R"]
    created: Bool[Array, "R"]
    rejected: Bool[Array, "R"]
    similarity: Float[Array, "R"]
    is_current: Bool[Array, "R"]


def insert(
    graph: KnowledgeGraph,
    keys: ArrayLike,
    *,
    values: ArrayLike | None = None,
    confidence: ArrayLike | None = None,
    expert_id: ArrayLike | None = None,
    kind: ArrayLike | None = None,
    source: ArrayLike | None = None,
    symbol: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    is_valid: ArrayLike | None = None,
    time: ArrayLike | None = None,
    merge_threshold: ArrayLike | None = 0.95,
    merge_rule: str = "leader",
    ema_decay: ArrayLike = 0.3,
    policy: str = "reject",
) -> tuple[KnowledgeGraph, InsertInfo]:
    """Insert R items in order, each as if it were inserted alone.

    An item merges into the live node with the best cosine, ties to the lowest id, when that
    cosine reaches the threshold. Otherwise it becomes a node in the lowest free slot, or in that
    of a node which it evicts, or is rejected: see `policy`. Nodes created earlier in the same call
    count, and may be evicted. On a merge the node's hits grow by the item's weight, and if the
    item is strictly more confident than the node, its value, confidence, source, symbol,
    expert_id and kind replace the node's. An eviction empties all edges out of and into the slot.

    Under the "leader" rule keys never move, and the result does not depend, to the bit, on how a
    stream of items is split into calls. The work is done for all items at once. Under the "ema"
    rule, kept for comparison with systems that average, a merge moves the key to the normalised
    `ema_decay * key + (1 - ema_decay) * item`, item by item.

    Any argument with one entry per item may also be one value for all of them. No gradient flows
    into the graph.

    Args:
      graph: the graph before.
      keys: [R, D], of any length other than zero.
      values: [R, D], by default the normalised keys.
      confidence: [R], 0 by default.
      expert_id: [R] integers, -1 by default.
      kind: [R] integers, 0 by default.
      source: [R, 2] integers (document id, offset), -1 by default.
      symbol: [R] integers, what followed the value, -1 by default.
      weight: [R] integers, how many items each stands for, 1 by default, at least 0.
      is_valid: [R] bool, all by default; the others are ignored.
      time: [R] integers, by default one tick of the clock for each item that is valid and well
        formed.
      merge_threshold: cosine in (-1, 1] at which items merge. 1 merges what is equal up to
        rounding (1e-5); above 1 nothing merges. None: nothing merges and nothing is compared.
      merge_rule: "leader" or "ema".
      ema_decay: the share that the old key keeps under the "ema" rule.
      policy: what to do with an item that needs a slot when the graph is full: "reject" it, or
        evict the live node with the smallest (created, slot) for "oldest", (hits + reads,
        updated, slot) for "least_used", (confidence, updated, slot) for "lowest_confidence". A
        new node always gets in, whatever its own rank. Uses are never forgotten: where every node
        has been used twice, new ones take each other's place; `expire` makes room.

    Returns:
      The graph after, and an `InsertInfo`.

    Raises:
      ValueError: if an argument has the wrong shape, or is not one of the values above.

    Example:
      >>> graph = KnowledgeGraph.create(8, 2)
      >>> graph, info = insert(graph, jnp.array([[1.0, 0.0], [0.0, 3.0], [2.0, 0.1]]))
      >>> info.node_id.tolist(), info.merged.tolist()
      ([0, 1, 0], [False, False, True])
    """
    check_choice("merge_rule", merge_rule, ("leader", "ema"))
    check_choice("policy", policy, ("reject", *POLICIES))
    if isinstance(merge_threshold, (int, float, np.floating)) and not merge_threshold > -1.0:
        raise ValueError(f"merge_threshold must be above -1, got {merge_threshold}")
    if isinstance(ema_decay, (int, float, np.floating)) and not 0.0 <= ema_decay <= 1.0:
        raise ValueError(f"ema_decay must be between 0 and 1, got {ema_decay}")
    keys = vectors("keys", keys, graph.dim)
    rows = keys.shape[0]
    unit = normalize(keys)
    values = unit if values is None else vectors("values", values, graph.dim)
    if values.shape != keys.shape:
        raise ValueError(f"values must have shape {keys.shape}, as keys has, got {values.shape}")
    ints = functools.partial(per_row, rows=rows, dtype=jnp.int32)
    items = Items(
        key=unit,
        value=values,
        confidence=per_row("confidence", confidence, rows, 0.0, jnp.float32),
        expert_id=ints("expert_id", expert_id, default=-1),
        kind=ints("kind", kind, default=0),
        source=ints("source", source, default=-1, tail=(2,)),
        symbol=ints("symbol", symbol, default=-1),
        weight=ints("weight", weight, default=1),
        time=ints("time", time, default=0),
        is_valid=per_row("is_valid", is_valid, rows, True, bool),
    )
    return _insert(
        graph,
        items,
        merge_threshold,
        ema_decay,
        is_timed=time is not None,
        merge_rule=merge_rule,
        policy=None if policy == "reject" else POLICIES.index(policy),
    )


@functools.partial(jax.jit, static_argnames=("is_timed", "merge_rule"))
def _insert(
    graph: KnowledgeGraph,
    items: Items,
    threshold: ArrayLike | None,
    ema_decay: ArrayLike,
    *,
    is_timed: bool,
    merge_rule: str,
    policy: ArrayLike | None,
) -> tuple[KnowledgeGraph, InsertInfo]:
    graph, items = jax.lax.stop_gradient((graph, items))
    was_valid = items.is_valid
    is_sound = (
        jnp.any(items.key != 0.0, axis=-1)
        & jnp.all(jnp.isfinite(items.value), axis=-1)
        & jnp.isfinite(items.confidence)
        & (items.weight >= 0)
    )
    items = items._replace(is_valid=was_valid & is_sound)
    if not is_timed:
        tick = jnp.cumsum(items.is_valid, dtype=jnp.int32)
        items = items._replace(time=saturating_add(graph.clock, tick))
    if threshold is not None:
        threshold = jnp.asarray(threshold, jnp.float32)
        # A unit vector's cosine with itself may round to just below 1.
        threshold = jnp.where(threshold <= 1.0, jnp.minimum(threshold, 1.0 - 1e-5), threshold)
    policy = None if policy is None else jnp.asarray(policy, jnp.int32)
    num_free = _count(~graph.is_live)
    if merge_rule == "leader" or threshold is None or items.key.shape[0] == 0:
        graph, info = _insert_batch(graph, items, threshold, policy)
    else:
        decay = jnp.asarray(ema_decay, jnp.float32)
        graph, info = _insert_moving(graph, items, threshold, decay, policy)
    rejected = was_valid & (info.node_id == graph.num_nodes)
    latest = jnp.max(jnp.where(items.is_valid, items.time, graph.clock), initial=graph.clock)
    num_evicted = jnp.maximum(_count(info.created) - num_free, 0)
    graph = graph._replace(
        clock=latest,
        num_updates=saturating_add(graph.num_updates, _count(info.merged | info.created)),
        num_merged=saturating_add(graph.num_merged, _count(info.merged)),
        num_rejected=saturating_add(graph.num_rejected, _count(rejected)),
        num_evicted=saturating_add(graph.num_evicted, num_evicted),
    )
    return graph, info._replace(rejected=rejected)


def _insert_batch(
    graph: KnowledgeGraph,
    items: Items,
    threshold: Float[Array, ""] | None,
    policy: Int[Array, ""] | None,
) -> tuple[KnowledgeGraph, InsertInfo]:
    """All items at once, keys fixed; the caller keeps the graph's counters."""
    num_items, nowhere = items.key.shape[0], graph.num_nodes
    may_evict = policy is not None and num_items > 0
    like = None
    if threshold is not None and num_items > 0:
        like = compare(graph, items, threshold, min(_FETCH, nowhere) if may_evict else 1)
    outcome = assign(graph, items, like, threshold)
    if may_evict:
        evict = evict_one_by_one if num_items == 1 else evict_in_rounds
        is_short = jnp.any(items.is_valid & (outcome.node_id == nowhere))
        outcome = jax.lax.cond(
            is_short,
            lambda: evict(graph, items, like, threshold, policy),
            lambda: outcome,
        )
    node_id, created, similarity = outcome
    merged = (node_id < nowhere) & ~created
    stays = is_current(node_id, created, nowhere)
    info = InsertInfo(node_id, merged, created, jnp.zeros_like(merged), similarity, stays)
    at = jnp.where(stays, node_id, nowhere)
    graph = store(graph, items, at, created, may_merge=like is not None, may_evict=may_evict)
    return graph, info


def _insert_moving(
    graph: KnowledgeGraph,
    items: Items,
    threshold: Float[Array, ""],
    decay: Float[Array, ""],
    policy: Int[Array, ""] | None,
) -> tuple[KnowledgeGraph, InsertInfo]:
    """One item after the other, each merge moving the node's key towards the item."""

    def step(graph: KnowledgeGraph, item: Items) -> tuple[KnowledgeGraph, InsertInfo]:
        graph, info = _insert_batch(graph, item, threshold, policy)
        at = jnp.where(info.merged, info.node_id, graph.num_nodes)
        old = graph.key[jnp.minimum(info.node_id, graph.num_nodes - 1)]
        moved = normalize(decay * old + (1.0 - decay) * item.key)
        # Opposite vectors may cancel, and a node without a direction could never be found.
        moved = jnp.where(jnp.any(moved != 0.0, axis=-1, keepdims=True), moved, old)
        return with_keys(graph, at, moved), info

    one_by_one = jax.tree.map(lambda x: x[:, None], items)
    graph, info = jax.lax.scan(step, graph, one_by_one)
    info = jax.tree.map(lambda x: x[:, 0], info)
    stays = is_current(info.node_id, info.created, graph.num_nodes)
    return graph, info._replace(is_current=stays)


def _count(mask: Bool[Array, "I"]) -> Int[Array, ""]:
    return jnp.sum(mask, dtype=jnp.int32)
