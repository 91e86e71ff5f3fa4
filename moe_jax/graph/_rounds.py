"""Eviction for a whole batch: guess what becomes of all items, and correct the guess in rounds.

A round takes a guess of what became of every item and works out, for all items at once, what
would become of each if the guess was right about the items before it. A guess that a round leaves
as it is is right about the first item, hence about the second, and so on. Each round settles at
least the first item that was not settled yet.

Who is evicted when is found by counting. Call the state of a node between two of its merges a
version; suppose that a merge never lowers a node in the policy's order. Of N slots, all taken,
every node but the lowest is safe. Let E be the number of evictions so far. Then the evicted nodes
and the unsafe one are the E + 1 lowest of all versions, old or new, that no merge has replaced:
true at first, a merge keeps it, and a new node either is the lowest now or makes the lowest safe
node unsafe. So a version becomes unsafe at the first item at which no more than E versions are
lower, and an item evicts the version that became unsafe last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._leaders import Items, Likeness, Outcome
from moe_jax.graph._one_by_one import evict_one_by_one
from moe_jax.graph._order import lowest, policy_keys
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.nearest import nearest

__all__ = ["evict_in_rounds"]

# A guess that is still wrong after so many rounds is given up for the sequential way.
_MAX_ROUNDS = 64
# Rows of the count of lower versions that are held at a time.
_BLOCK = 1024


class _Problem(NamedTuple):
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


class _Guess(NamedTuple):
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


class _Fates(NamedTuple):
    """When nodes go: the item that evicts each one, R if none does.

    Attributes:
      old: int32 [N], of old nodes, by slot.
      new: int32 [R], of new nodes, by the item that became them.
    """

    old: Int[Array, "N"]
    new: Int[Array, "R"]


def evict_in_rounds(
    graph: KnowledgeGraph,
    items: Items,
    like: Likeness | None,
    threshold: Float[Array, ""] | None,
    policy: str,
) -> Outcome:
    """As `evict_one_by_one`, for all items at once, in a few rounds on typical streams.

    Falls back to it where a merge lowers a node in the policy's order (a negative weight, a time
    before the node's last one), or the rounds run out.
    """
    problem = _problem(graph, items, like, threshold, policy)
    guess, _, is_right = solve(problem, policy)

    def finish() -> Outcome:
        similarity = jnp.zeros(guess.slot.shape[0])
        if like is not None:
            victim, _ = _victims(problem, guess, policy)
            score = _best(problem, guess, _fates(problem, guess, victim), -jnp.inf)[1]
            similarity = jnp.where(items.is_valid & (score > -jnp.inf), score, 0.0)
        return Outcome(guess.slot, guess.created, similarity)

    def one_by_one() -> Outcome:
        return evict_one_by_one(graph, items, like, threshold, policy)

    return jax.lax.cond(is_right, finish, one_by_one)


def solve(problem: _Problem, policy: str) -> tuple[_Guess, Int[Array, ""], Bool[Array, ""]]:
    """The guess that stays as it is, after how many rounds, and whether it can be trusted."""

    def is_unsettled(state: tuple[_Guess, Array, Array, Array]) -> Array:
        _, count, is_settled, _ = state
        return ~is_settled & (count < _MAX_ROUNDS)

    def correct(state: tuple[_Guess, Array, Array, Array]) -> tuple[_Guess, Array, Array, Array]:
        guess, count, _, _ = state
        victim, is_raised = _victims(problem, guess, policy)
        after = _settle(problem, guess, victim)
        is_same = [jnp.all(a == b) for a, b in zip(guess, after, strict=True)]
        return after, count + 1, is_same[0] & is_same[1] & is_same[2], is_raised

    no = jnp.zeros((), bool)
    state = (_first_guess(problem), jnp.int32(0), no, no)
    guess, count, is_settled, is_raised = jax.lax.while_loop(is_unsettled, correct, state)
    return guess, count, is_settled & is_raised


def _problem(
    graph: KnowledgeGraph,
    items: Items,
    like: Likeness | None,
    threshold: Float[Array, ""] | None,
    policy: str,
) -> _Problem:
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
    free = jnp.nonzero(~graph.is_live, size=num_items, fill_value=nowhere)[0].astype(jnp.int32)
    num_free = jnp.sum(~graph.is_live, dtype=jnp.int32)
    return _Problem(graph, items, like, threshold, free, num_free, pool, rank, first, second)


def _first_guess(problem: _Problem) -> _Guess:
    """Old nodes go in their order at the start, and leaders are as if none went."""
    items, size = problem.items, problem.pool.shape[0]
    created = items.is_valid if problem.like is None else problem.like.leads
    turn = jnp.clip(_num_evicted(problem, created), 0, size - 1)
    victim = problem.pool[turn]
    start = _Guess(created, _own_node(problem), _slots_for_new(problem, created, victim))
    return _settle(problem, start, victim)


def _settle(problem: _Problem, guess: _Guess, victim: Int[Array, "R"]) -> _Guess:
    """What would become of each item if the guess was right about the ones before."""
    nowhere, is_valid = problem.graph.num_nodes, problem.items.is_valid
    created, node = is_valid, _own_node(problem)
    if problem.like is not None:
        fates = _fates(problem, guess, victim)
        best, score = _best(problem, guess, fates, problem.threshold)
        merges = is_valid & (score >= problem.threshold)
        created, node = is_valid & ~merges, jnp.where(merges, best, node)
    slot = _slots_for_new(problem, guess.created, victim)
    maker = jnp.clip(node - nowhere, 0, node.shape[0] - 1)
    slot = jnp.where(node < nowhere, node, slot[maker])
    last = nowhere + node.shape[0]
    return _Guess(created, jnp.where(is_valid, node, last), jnp.where(is_valid, slot, nowhere))


def _own_node(problem: _Problem) -> Int[Array, "R"]:
    return problem.graph.num_nodes + _turns(problem)


def _turns(problem: _Problem) -> Int[Array, "R"]:
    return jnp.arange(problem.items.weight.shape[0], dtype=jnp.int32)


def _num_evicted(problem: _Problem, created: Bool[Array, "R"]) -> Int[Array, "R"]:
    """How many nodes were evicted before each item; less than 0 while slots are free."""
    return jnp.cumsum(created, dtype=jnp.int32) - created - problem.num_free


def _fates(problem: _Problem, guess: _Guess, victim: Int[Array, "R"]) -> _Fates:
    num_nodes, turn = problem.graph.num_nodes, _turns(problem)
    num_items = turn.shape[0]
    evicts = guess.created & (_num_evicted(problem, guess.created) >= 0)
    at_old = jnp.where(evicts, victim, num_nodes)
    at_new = jnp.where(evicts & (victim >= num_nodes), victim - num_nodes, num_items)
    never = jnp.full(num_nodes, num_items, jnp.int32), jnp.full(num_items, num_items, jnp.int32)
    return _Fates(
        never[0].at[at_old].min(turn, mode="drop"), never[1].at[at_new].min(turn, mode="drop")
    )


def _slots_for_new(
    problem: _Problem, created: Bool[Array, "R"], victim: Int[Array, "R"]
) -> Int[Array, "R"]:
    """The slot of each item if it becomes a node: a free one, or its victim's, or that one's..."""
    num_nodes, turn = problem.graph.num_nodes, _turns(problem)
    num_items = turn.shape[0]
    num_evicted = _num_evicted(problem, created)
    is_free = num_evicted < 0
    free = problem.free[jnp.clip(num_evicted + problem.num_free, 0, num_items - 1)]
    slot = jnp.where(is_free, free, jnp.minimum(victim, num_nodes))
    has_new_victim = ~is_free & (victim >= num_nodes)
    root = jnp.where(has_new_victim, jnp.clip(victim - num_nodes, 0, num_items - 1), turn)
    for _ in range((num_items - 1).bit_length()):
        root = root[root]
    return slot[root]


def _best(
    problem: _Problem, guess: _Guess, fates: _Fates, floor: Float[Array, ""] | float
) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """The node most similar to each item among those there at its turn, and its cosine.

    An item whose fetched nodes are all gone is compared with all nodes again, if the last of
    those nodes was at or above the floor.
    """
    graph, items, like = problem.graph, problem.items, problem.like
    nowhere, turn = graph.num_nodes, _turns(problem)
    old_fate = fates.old[jnp.minimum(like.old_id, nowhere - 1)]
    is_there = (like.old_id < nowhere) & (old_fate >= turn[:, None])
    at = jnp.argmax(is_there, axis=1)[:, None]
    has_old = jnp.any(is_there, axis=1)
    old_id = jnp.where(has_old, jnp.take_along_axis(like.old_id, at, axis=1)[:, 0], nowhere)
    old_score = jnp.take_along_axis(like.old_score, at, axis=1)[:, 0]
    old_score = jnp.where(has_old, old_score, -jnp.inf)
    if like.old_id.shape[1] < nowhere:
        is_used_up = items.is_valid & ~has_old & (like.old_id[:, -1] < nowhere)
        is_used_up &= like.old_score[:, -1] >= floor

        def look_again() -> tuple[Array, Array]:
            is_candidate = graph.is_live[None, :] & (fates.old[None, :] >= turn[:, None])
            is_candidate &= is_used_up[:, None]
            ids, scores = nearest(items.key, graph.key, is_candidate, 1, floor=problem.threshold)
            return (
                jnp.where(is_used_up, ids[:, 0], old_id),
                jnp.where(is_used_up, scores[:, 0], old_score),
            )

        old_id, old_score = jax.lax.cond(
            jnp.any(is_used_up), look_again, lambda: (old_id, old_score)
        )
    is_there = guess.created[None, :] & (turn[None, :] < turn[:, None])
    is_there &= fates.new[None, :] >= turn[:, None]
    score = jnp.where(is_there, like.score, -jnp.inf)
    new_score = jnp.max(score, axis=1)
    is_best = is_there & (score == new_score[:, None])
    slot = jnp.where(is_best, guess.slot[None, :], nowhere)
    new, new_slot = jnp.argmin(slot, axis=1), jnp.min(slot, axis=1)
    is_new = (new_score > old_score) | ((new_score == old_score) & (new_slot < old_id))
    node = jnp.where(is_new, nowhere + new.astype(jnp.int32), old_id)
    return node, jnp.maximum(new_score, old_score)


def _victims(
    problem: _Problem, guess: _Guess, policy: str
) -> tuple[Int[Array, "R"], Bool[Array, ""]]:
    """The node that each item evicts if it needs a slot, and whether no merge lowers a node."""
    items, pool = problem.items, problem.pool
    num_nodes, turn = problem.graph.num_nodes, _turns(problem)
    num_items, size = turn.shape[0], pool.shape[0]
    first, second, before = _versions(problem, guess, policy)
    merges = items.is_valid & ~guess.created
    old = jnp.minimum(guess.node, num_nodes - 1)
    was_first = jnp.where(before >= 0, first[before], problem.first[old])
    was_second = jnp.where(before >= 0, second[before], problem.second[old])
    is_raised = (first > was_first) | ((first == was_first) & (second >= was_second))

    # Versions by number: those of the pool, then those that items made.
    rank, num_lower_old = _ranks(problem, guess, first, second)
    far = size + num_items
    replaced = jnp.where(before >= 0, size + before, problem.pool_rank[old])
    is_known = merges & ((before >= 0) | (replaced < size))
    replaced = jnp.where(is_known, replaced, far)
    item_rank = jnp.where(items.is_valid, rank[size:], far)
    gone_rank = rank.at[replaced].get(mode="fill", fill_value=far)
    num_evicted = _num_evicted(problem, guess.created)
    is_version = jnp.concatenate([pool < num_nodes, items.is_valid])
    born = jnp.concatenate([jnp.full(size, -1, jnp.int32), turn])
    end = jnp.full(size + num_items, num_items, jnp.int32).at[replaced].min(turn, mode="drop")

    def unsafe_from(version: tuple[Array, Array, Array]) -> Array:
        own, num_lower, since = version
        change = (item_rank < own).astype(jnp.int32) - (gone_rank < own)
        lower = num_lower + jnp.cumsum(change) - change
        is_unsafe = (lower <= num_evicted) & (turn > since)
        return jnp.where(jnp.any(is_unsafe), jnp.argmax(is_unsafe), num_items)

    unsafe = jax.lax.map(unsafe_from, (rank, num_lower_old, born), batch_size=_BLOCK)
    unsafe = jnp.where(is_version & (unsafe <= end), unsafe, num_items)
    number = jnp.arange(size + num_items, dtype=jnp.int32)
    latest = jnp.full(num_items, -1, jnp.int32).at[unsafe].max(number, mode="drop")
    last = jax.lax.cummax(jnp.where(latest >= 0, turn, -1))
    latest = latest[jnp.maximum(last, 0)]
    nodes = jnp.concatenate([pool, guess.node])
    victim = jnp.where(latest >= 0, nodes[latest], num_nodes)
    return victim, jnp.all(is_raised | ~merges)


def _ranks(
    problem: _Problem, guess: _Guess, first: Int[Array, "R"], second: Int[Array, "R"]
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
    problem: _Problem, guess: _Guess, policy: str
) -> tuple[Int[Array, "R"], Int[Array, "R"], Int[Array, "R"]]:
    """The policy's keys of each node after each item, and the item that made the version before."""
    graph, items, turn = problem.graph, problem.items, _turns(problem)
    is_same = (guess.node[:, None] == guess.node[None, :]) & items.is_valid[None, :]
    is_earlier = turn[None, :] < turn[:, None]
    before = jnp.max(jnp.where(is_same & is_earlier, turn[None, :], -1), axis=1)
    is_so_far = is_same & (turn[None, :] <= turn[:, None])
    weight = jnp.sum(jnp.where(is_so_far, items.weight[None, :], 0), axis=1, dtype=jnp.int32)
    confidence = jnp.max(jnp.where(is_so_far, items.confidence[None, :], -jnp.inf), axis=1)
    is_old = guess.node < graph.num_nodes
    old = jnp.minimum(guess.node, graph.num_nodes - 1)
    maker = jnp.clip(guess.node - graph.num_nodes, 0, turn.shape[0] - 1)
    first, second = policy_keys(
        policy,
        confidence=jnp.where(is_old, jnp.maximum(graph.confidence[old], confidence), confidence),
        hits=jnp.where(is_old, graph.hits[old] + weight, weight),
        reads=jnp.where(is_old, graph.reads[old], 0),
        created=jnp.where(is_old, graph.created[old], items.time[maker]),
        updated=items.time,
    )
    return first, second, before
