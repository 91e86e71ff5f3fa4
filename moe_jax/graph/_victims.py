"""Who is evicted when, found by counting.

Call the state of a node between two of its merges a version; suppose that a merge never lowers a
node in the policy's order. Of N slots, all taken, every node but the lowest is safe. Let E be the
number of evictions so far. Then the evicted nodes and the unsafe one are the E + 1 lowest of all
versions, old or new, that no merge has replaced: true at first, a merge keeps it, and a new node
either is the lowest now or makes the lowest safe node unsafe. So a version becomes unsafe at the
first item at which no more than E versions are lower, and an item evicts the version that became
unsafe last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._leaders import Items, Likeness
from moe_jax.graph._order import halves, joined, lowest, policy_keys, saturating_add
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.first_true import first_true

__all__ = ["Guess", "Problem", "go_in_order", "num_evicted_before", "pose", "turns", "victims"]

# Rows of the count of lower versions that are held at a time.
_BLOCK = 1024


class Problem(NamedTuple):
    """What stays the same in all rounds. P old nodes, in the policy's order, may have to go.

    Attributes:
      graph: the graph before.
      items: the items, in order.
      like: from `compare`; None if no item may merge.
      threshold: cosine at which two vectors are near; None if no item may merge.
      free: int32 [R], the free slots in order, N where there are fewer.
      num_free: int32 [].
      pool: int32 [P], slots, N where there are fewer.
      pool_rank: int32 [N], the place of each slot in the pool, P for those outside.
      first: int32 [N], with `second` the policy's order of old nodes.
      second: int32 [N].
    """

    graph: KnowledgeGraph
    items: Items
    like: Likeness | None
    threshold: Float[Array, ""] | None
    free: Int[Array, "R"]
    num_free: Int[Array, ""]
    pool: Int[Array, "P"]
    pool_rank: Int[Array, "N"]
    first: Int[Array, "N"]
    second: Int[Array, "N"]


class Guess(NamedTuple):
    """What becomes of each item.

    Attributes:
      created: bool [R].
      node: int32 [R], the node it joins or becomes: the slot of an old node, N + i for the node
        that item i became, N + R for an invalid item.
      slot: int32 [R].
    """

    created: Bool[Array, "R"]
    node: Int[Array, "R"]
    slot: Int[Array, "R"]


def pose(
    graph: KnowledgeGraph,
    items: Items,
    like: Likeness | None,
    threshold: Float[Array, ""] | None,
    policy: Int[Array, ""],
) -> Problem:
    """Gather what no guess changes; the policy is its place in `POLICIES`."""
    num_items, nowhere = items.key.shape[0], graph.num_nodes
    first, second = policy_keys(
        policy,
        confidence=graph.confidence,
        hits=graph.hits,
        reads=graph.reads,
        created=graph.created,
        updated=graph.updated,
    )
    # An old victim is the lowest in its turn, so that each node that was below it at first has
    # been evicted or merged into since: fewer than R have been.
    pool = lowest(first, second, graph.is_live, min(num_items, nowhere))
    size = pool.shape[0]
    rank = jnp.full(nowhere, size, jnp.int32).at[pool].set(jnp.arange(size), mode="drop")
    free = first_true(~graph.is_live, num_items)
    num_free = jnp.sum(~graph.is_live, dtype=jnp.int32)
    return Problem(graph, items, like, threshold, free, num_free, pool, rank, first, second)


def turns(problem: Problem) -> Int[Array, "R"]:
    """0, 1, 2, ... for the items."""
    return jnp.arange(problem.items.weight.shape[0], dtype=jnp.int32)


def num_evicted_before(problem: Problem, created: Bool[Array, "R"]) -> Int[Array, "R"]:
    """How many nodes were evicted before each item; less than 0 while slots are free."""
    return jnp.cumsum(created, dtype=jnp.int32) - created - problem.num_free


def go_in_order(problem: Problem, guess: Guess, policy: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether nothing merges and all new nodes rank above the old ones that have to go."""
    if problem.like is not None:
        return jnp.zeros((), bool)
    size, nowhere = problem.pool.shape[0], problem.graph.num_nodes
    num_evicted = jnp.sum(guess.created, dtype=jnp.int32) - problem.num_free
    last = problem.pool[jnp.clip(num_evicted - 1, 0, size - 1)]
    at = jnp.minimum(last, nowhere - 1)
    first, second, _ = _versions(problem, guess, policy)
    is_above = (first > problem.first[at]) | (
        (first == problem.first[at]) & (second > problem.second[at])
    )
    is_enough = (num_evicted <= size) & (last < nowhere)
    return is_enough & jnp.all(is_above | ~problem.items.is_valid)


def victims(
    problem: Problem, guess: Guess, policy: Int[Array, ""]
) -> tuple[Int[Array, "R"], Bool[Array, ""]]:
    """The node that each item evicts if it needs a slot, as far as the guess is right before it.

    Args:
      problem: from `pose`.
      guess: what became of the items.
      policy: its place in `POLICIES`.

    Returns:
      (node [R] as in `Guess.node`; whether no merge of the guess lowers a node, bool scalar).
    """
    items, pool = problem.items, problem.pool
    num_nodes, size = problem.graph.num_nodes, pool.shape[0]
    first, second, before = _versions(problem, guess, policy)
    merges = items.is_valid & ~guess.created
    old = jnp.minimum(guess.node, num_nodes - 1)
    was_first = jnp.where(before >= 0, first[before], problem.first[old])
    was_second = jnp.where(before >= 0, second[before], problem.second[old])
    is_raised = (first > was_first) | ((first == was_first) & (second >= was_second))

    # Versions by number: those of the pool, then those that items made.
    replaced = jnp.where(before >= 0, size + before, problem.pool_rank[old])
    is_known = merges & ((before >= 0) | (replaced < size))
    replaced = jnp.where(is_known, replaced, size + first.shape[0])
    rank, num_lower = _ranks(problem, guess, first, second)
    unsafe = _unsafe_from(problem, guess, rank, num_lower, replaced)
    number = jnp.arange(unsafe.shape[0], dtype=jnp.int32)
    latest = jnp.full(first.shape[0], -1, jnp.int32).at[unsafe].max(number, mode="drop")
    last = jax.lax.cummax(jnp.where(latest >= 0, turns(problem), -1))
    latest = latest[jnp.maximum(last, 0)]
    node = jnp.concatenate([pool, guess.node])
    return jnp.where(latest >= 0, node[latest], num_nodes), jnp.all(is_raised | ~merges)


def _unsafe_from(
    problem: Problem,
    guess: Guess,
    rank: Int[Array, "V"],
    num_lower: Int[Array, "V"],
    replaced: Int[Array, "R"],
) -> Int[Array, "V"]:
    """The first item that finds each version unsafe, R if none does before it is replaced."""
    turn, is_valid = turns(problem), problem.items.is_valid
    num_items, size, num_versions = turn.shape[0], problem.pool.shape[0], rank.shape[0]
    item_rank = jnp.where(is_valid, rank[size:], num_versions)
    gone_rank = rank.at[replaced].get(mode="fill", fill_value=num_versions)
    num_evicted = num_evicted_before(problem, guess.created)

    def first_unsafe(version: tuple[Array, Array, Array]) -> Array:
        own, lower, made_by = version
        change = (item_rank < own).astype(jnp.int32) - (gone_rank < own)
        lower = lower + jnp.cumsum(change) - change
        is_unsafe = (lower <= num_evicted) & (turn > made_by)
        return jnp.where(jnp.any(is_unsafe), jnp.argmax(is_unsafe), num_items)

    made_by = jnp.concatenate([jnp.full(size, -1, jnp.int32), turn])
    unsafe = jax.lax.map(first_unsafe, (rank, num_lower, made_by), batch_size=_BLOCK)
    is_version = jnp.concatenate([problem.pool < problem.graph.num_nodes, is_valid])
    end = jnp.full(num_versions, num_items, jnp.int32).at[replaced].min(turn, mode="drop")
    return jnp.where(is_version & (unsafe <= end), unsafe, num_items)


def _ranks(
    problem: Problem, guess: Guess, first: Int[Array, "R"], second: Int[Array, "R"]
) -> tuple[Int[Array, "V"], Int[Array, "V"]]:
    """Places of all versions in the policy's order, and how many of the pool are before each."""
    pool = problem.pool
    is_pool = jnp.arange(pool.shape[0] + first.shape[0]) < pool.shape[0]
    top = 2**31 - 1
    keys = (
        jnp.concatenate([x.at[pool].get(mode="fill", fill_value=top), y])
        for x, y in ((problem.first, first), (problem.second, second))
    )
    slot = jnp.concatenate([pool, guess.slot])
    number = jnp.arange(slot.shape[0], dtype=jnp.int32)
    # Stable: of two nodes in one slot and equal otherwise the first one has been evicted.
    order = jax.lax.sort((*keys, slot, number), num_keys=3, is_stable=True)[3]
    is_old = (is_pool & (slot < problem.graph.num_nodes))[order].astype(jnp.int32)
    rank = jnp.zeros_like(number).at[order].set(number)
    return rank, jnp.zeros_like(number).at[order].set(jnp.cumsum(is_old) - is_old)


def _versions(
    problem: Problem, guess: Guess, policy: Int[Array, ""]
) -> tuple[Int[Array, "R"], Int[Array, "R"], Int[Array, "R"]]:
    """The policy's keys of each node after each item, and the item that made the version before."""
    graph, items, turn = problem.graph, problem.items, turns(problem)
    if problem.like is None:
        keys = policy_keys(
            policy,
            confidence=items.confidence,
            hits=items.weight,
            reads=jnp.zeros_like(turn),
            created=items.time,
            updated=items.time,
        )
        return *keys, jnp.full_like(turn, -1)
    is_same = (guess.node[:, None] == guess.node[None, :]) & items.is_valid[None, :]
    is_earlier = turn[None, :] < turn[:, None]
    before = jnp.max(jnp.where(is_same & is_earlier, turn[None, :], -1), axis=1)
    is_so_far = is_same & (turn[None, :] <= turn[:, None])
    parts = (jnp.where(is_so_far, half[None, :], 0) for half in halves(items.weight))
    weight = joined(*(jnp.sum(part, axis=1, dtype=jnp.uint32) for part in parts))
    confidence = jnp.max(jnp.where(is_so_far, items.confidence[None, :], -jnp.inf), axis=1)
    is_old = guess.node < graph.num_nodes
    old = jnp.minimum(guess.node, graph.num_nodes - 1)
    maker = jnp.clip(guess.node - graph.num_nodes, 0, turn.shape[0] - 1)
    first, second = policy_keys(
        policy,
        confidence=jnp.where(is_old, jnp.maximum(graph.confidence[old], confidence), confidence),
        hits=jnp.where(is_old, saturating_add(graph.hits[old], weight), weight),
        reads=jnp.where(is_old, graph.reads[old], 0),
        created=jnp.where(is_old, graph.created[old], items.time[maker]),
        updated=items.time,
    )
    return first, second, before
