"""Insert into a knowledge graph: every item merges into a node, becomes one, or is rejected."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import check_choice, per_row, vectors
from moe_jax.graph._leaders import Items, assign, store
from moe_jax.graph.state import KnowledgeGraph, with_keys
from moe_jax.ops.similarity import normalize

__all__ = ["InsertInfo", "insert"]

_INT32_MAX = 2**31 - 1


class InsertInfo(NamedTuple):
    """What became of each item of one `insert`.

    Attributes:
      node_id: int32 [R], the node that stands for the item, N when it was rejected or invalid.
      merged: bool [R], the item joined a node.
      created: bool [R], the item became a node.
      rejected: bool [R], the item was valid and could not be stored: its key has no direction
        (zero, NaN, infinite), its value or confidence is not finite, or the graph is full.
      similarity: float32 [R], the best cosine over the nodes that were live when the item's turn
        came, 0 when there were none.
    """

    node_id: Int[Array, "R"]
    merged: Bool[Array, "R"]
    created: Bool[Array, "R"]
    rejected: Bool[Array, "R"]
    similarity: Float[Array, "R"]


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
    merge_threshold: ArrayLike = 0.95,
    merge_rule: str = "leader",
    ema_decay: ArrayLike = 0.3,
    policy: str = "reject",
) -> tuple[KnowledgeGraph, InsertInfo]:
    """Insert R items in order, each as if it were inserted alone.

    An item merges into the live node with the best cosine, ties to the lowest id, when that
    cosine reaches the threshold. Otherwise it becomes a node in the lowest free slot, or is
    rejected when there is none. Nodes created earlier in the same call count. On a merge the
    node's hits grow by the item's weight, and if the item is strictly more confident than the
    node, its value, confidence, source, symbol, expert_id and kind replace the
    node's.

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
      weight: [R] integers, how many items each stands for, 1 by default.
      is_valid: [R] bool, all by default; the others are ignored.
      time: [R] integers, by default one tick of the clock for each item that is valid and well
        formed.
      merge_threshold: cosine in (-1, 1] at which items merge. 1 merges what is equal up to
        rounding (1e-5); above 1 nothing merges.
      merge_rule: "leader" or "ema".
      ema_decay: the share that the old key keeps under the "ema" rule.
      policy: what to do when the graph is full; only "reject" for now.

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
    check_choice("policy", policy, ("reject",))
    if isinstance(merge_threshold, (int, float)) and not merge_threshold > -1.0:
        raise ValueError(f"merge_threshold must be above -1, got {merge_threshold}")
    if isinstance(ema_decay, (int, float)) and not 0.0 <= ema_decay <= 1.0:
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
        graph, items, merge_threshold, ema_decay, is_timed=time is not None, merge_rule=merge_rule
    )


@functools.partial(jax.jit, static_argnames=("is_timed", "merge_rule"))
def _insert(
    graph: KnowledgeGraph,
    items: Items,
    threshold: ArrayLike,
    ema_decay: ArrayLike,
    *,
    is_timed: bool,
    merge_rule: str,
) -> tuple[KnowledgeGraph, InsertInfo]:
    graph, items = jax.lax.stop_gradient((graph, items))
    was_valid = items.is_valid
    is_sound = (
        jnp.any(items.key != 0.0, axis=-1)
        & jnp.all(jnp.isfinite(items.value), axis=-1)
        & jnp.isfinite(items.confidence)
    )
    items = items._replace(is_valid=was_valid & is_sound)
    if not is_timed:
        tick = jnp.cumsum(items.is_valid, dtype=jnp.int32)
        items = items._replace(time=_saturating_add(graph.clock, tick))
    threshold = jnp.asarray(threshold, jnp.float32)
    # A unit vector's cosine with itself may round to just below 1.
    threshold = jnp.where(threshold <= 1.0, jnp.minimum(threshold, 1.0 - 1e-5), threshold)
    if merge_rule == "leader" or items.key.shape[0] == 0:
        graph, info = _insert_batch(graph, items, threshold)
    else:
        graph, info = _insert_moving(graph, items, threshold, jnp.asarray(ema_decay, jnp.float32))
    rejected = was_valid & (info.node_id == graph.num_nodes)
    latest = jnp.max(jnp.where(items.is_valid, items.time, graph.clock), initial=graph.clock)
    graph = graph._replace(
        clock=latest,
        num_updates=_saturating_add(graph.num_updates, _count(info.merged | info.created)),
        num_merged=_saturating_add(graph.num_merged, _count(info.merged)),
        num_rejected=_saturating_add(graph.num_rejected, _count(rejected)),
    )
    return graph, info._replace(rejected=rejected)


def _insert_batch(
    graph: KnowledgeGraph, items: Items, threshold: Float[Array, ""]
) -> tuple[KnowledgeGraph, InsertInfo]:
    """All items at once, keys fixed; the caller keeps the graph's counters."""
    node_id, created, similarity = assign(graph, items, threshold)
    merged = (node_id < graph.num_nodes) & ~created
    info = InsertInfo(node_id, merged, created, jnp.zeros_like(merged), similarity)
    return store(graph, items, node_id, created), info


def _insert_moving(
    graph: KnowledgeGraph, items: Items, threshold: Float[Array, ""], decay: Float[Array, ""]
) -> tuple[KnowledgeGraph, InsertInfo]:
    """One item after the other, each merge moving the node's key towards the item."""

    def step(graph: KnowledgeGraph, item: Items) -> tuple[KnowledgeGraph, InsertInfo]:
        graph, info = _insert_batch(graph, item, threshold)
        at = jnp.where(info.merged, info.node_id, graph.num_nodes)
        old = graph.key[jnp.minimum(info.node_id, graph.num_nodes - 1)]
        moved = normalize(decay * old + (1.0 - decay) * item.key)
        # Opposite vectors may cancel, and a node without a direction could never be found.
        moved = jnp.where(jnp.any(moved != 0.0, axis=-1, keepdims=True), moved, old)
        return with_keys(graph, at, moved), info

    one_by_one = jax.tree.map(lambda x: x[:, None], items)
    graph, info = jax.lax.scan(step, graph, one_by_one)
    return graph, jax.tree.map(lambda x: x[:, 0], info)


def _count(mask: Bool[Array, "R"]) -> Int[Array, ""]:
    return jnp.sum(mask, dtype=jnp.int32)


def _saturating_add(x: Int[Array, ""], more: Int[Array, "*R"]) -> Int[Array, "*R"]:
    """The sum of an int32 and a non-negative int32, stopping at the largest one."""
    return x + jnp.minimum(more, _INT32_MAX - x)
