"""Eviction for a whole batch: guess what becomes of all items, and correct the guess in rounds.

A round takes a guess of what became of every item and works out, for all items at once, what
would become of each if the guess was right about the items before it. A guess that a round leaves
as it is is right about the first item, hence about the second, and so on. Each round settles at
least the first item that was not settled yet.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._leaders import Items, Likeness, Outcome
from moe_jax.graph._one_by_one import evict_one_by_one
from moe_jax.graph._victims import (
    Guess,
    Problem,
    go_in_order,
    num_evicted_before,
    pose,
    turns,
    victims,
)
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.search import SCORES_AT_ONCE, Hits, nearest

__all__ = ["evict_in_rounds", "solve"]

# A guess that is still wrong after so many rounds is given up for the sequential way.
_MAX_ROUNDS = 64


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
    policy: Int[Array, ""],
) -> Outcome:
    """As `evict_one_by_one`, for all items at once, in a few rounds on typical streams.

    Falls back to it where a merge lowers a node in the policy's order (a time before the node's
    last one), or the rounds run out.
    """
    problem = pose(graph, items, like, threshold, policy)
    (guess, score), _, is_right = solve(problem, policy)

    def one_by_one() -> Outcome:
        return evict_one_by_one(graph, items, like, threshold, policy)

    is_scored = items.is_valid & (score > -jnp.inf)
    outcome = Outcome(guess.slot, guess.created, jnp.where(is_scored, score, 0.0))
    return jax.lax.cond(is_right, lambda: outcome, one_by_one)


def solve(
    problem: Problem, policy: Int[Array, ""]
) -> tuple[tuple[Guess, Float[Array, "R"]], Int[Array, ""], Bool[Array, ""]]:
    """The guess that stays as it is with each item's best cosine, rounds, and whether it is right.

    Where it is not, a merge lowers a node in the policy's order, or the rounds ran out.
    """

    def is_unsettled(state: tuple[tuple[Guess, Array], Array, Array, Array]) -> Array:
        _, count, is_settled, _ = state
        return ~is_settled & (count < _MAX_ROUNDS)

    def correct(
        state: tuple[tuple[Guess, Array], Array, Array, Array],
    ) -> tuple[tuple[Guess, Array], Array, Array, Array]:
        (guess, _), count, _, _ = state
        victim, is_raised = victims(problem, guess, policy)
        after, score = _settle(problem, guess, victim, may_search=True)
        same = [jnp.all(a == b) for a, b in zip(guess, after, strict=True)]
        return (after, score), count + 1, same[0] & same[1] & same[2], is_raised

    start = _first_guess(problem)
    is_sure = go_in_order(problem, start[0], policy)
    state = (start, jnp.int32(0), is_sure, is_sure)
    found, count, is_settled, is_raised = jax.lax.while_loop(is_unsettled, correct, state)
    return found, count, is_settled & is_raised


def _first_guess(problem: Problem) -> tuple[Guess, Float[Array, "R"]]:
    """Old nodes go in their order at the start, and leaders are as if none went."""
    items, size = problem.items, problem.pool.shape[0]
    created = items.is_valid if problem.like is None else problem.like.leads
    turn = jnp.clip(num_evicted_before(problem, created), 0, size - 1)
    victim = problem.pool[turn]
    start = Guess(created, _own_node(problem), _slots_for_new(problem, created, victim))
    return _settle(problem, start, victim, may_search=False)


def _settle(
    problem: Problem, guess: Guess, victim: Int[Array, "R"], *, may_search: bool
) -> tuple[Guess, Float[Array, "R"]]:
    """What would become of each item if the guess was right before it, and its best cosine."""
    nowhere, is_valid = problem.graph.num_nodes, problem.items.is_valid
    created, node = is_valid, _own_node(problem)
    score = jnp.full(node.shape, -jnp.inf)
    if problem.like is not None:
        fates = _fates(problem, guess, victim)
        best, score = _best(problem, guess, fates, may_search)
        merges = is_valid & (score >= problem.threshold)
        created, node = is_valid & ~merges, jnp.where(merges, best, node)
    slot = _slots_for_new(problem, guess.created, victim)
    maker = jnp.clip(node - nowhere, 0, node.shape[0] - 1)
    slot = jnp.where(node < nowhere, node, slot[maker])
    last = nowhere + node.shape[0]
    node, slot = jnp.where(is_valid, node, last), jnp.where(is_valid, slot, nowhere)
    return Guess(created, node, slot), score


def _own_node(problem: Problem) -> Int[Array, "R"]:
    return problem.graph.num_nodes + turns(problem)


def _fates(problem: Problem, guess: Guess, victim: Int[Array, "R"]) -> _Fates:
    num_nodes, turn = problem.graph.num_nodes, turns(problem)
    num_items = turn.shape[0]
    evicts = guess.created & (num_evicted_before(problem, guess.created) >= 0)
    at_old = jnp.where(evicts, victim, num_nodes)
    at_new = jnp.where(evicts & (victim >= num_nodes), victim - num_nodes, num_items)
    never = jnp.full(num_nodes, num_items, jnp.int32), jnp.full(num_items, num_items, jnp.int32)
    return _Fates(
        never[0].at[at_old].min(turn, mode="drop"), never[1].at[at_new].min(turn, mode="drop")
    )


def _slots_for_new(
    problem: Problem, created: Bool[Array, "R"], victim: Int[Array, "R"]
) -> Int[Array, "R"]:
    """The slot of each item if it becomes a node: a free one, or its victim's, or that one's..."""
    num_nodes, turn = problem.graph.num_nodes, turns(problem)
    num_items = turn.shape[0]
    num_evicted = num_evicted_before(problem, created)
    is_free = num_evicted < 0
    free = problem.free[jnp.clip(num_evicted + problem.num_free, 0, num_items - 1)]
    slot = jnp.where(is_free, free, jnp.minimum(victim, num_nodes))
    has_new_victim = ~is_free & (victim >= num_nodes)
    root = jnp.where(has_new_victim, jnp.clip(victim - num_nodes, 0, num_items - 1), turn)
    for _ in range((num_items - 1).bit_length()):
        root = root[root]
    return slot[root]


def _best(
    problem: Problem, guess: Guess, fates: _Fates, may_search: bool
) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """The node most similar to each item among those there at its turn, and its cosine."""
    nowhere, turn = problem.graph.num_nodes, turns(problem)
    old_id, old_score = _best_old(problem, fates, may_search)
    is_there = guess.created[None, :] & (turn[None, :] < turn[:, None])
    is_there &= fates.new[None, :] >= turn[:, None]
    score = jnp.where(is_there, problem.like.score, -jnp.inf)
    new_score = jnp.max(score, axis=1)
    is_best = is_there & (score == new_score[:, None])
    slot = jnp.where(is_best, guess.slot[None, :], nowhere)
    new, new_slot = jnp.argmin(slot, axis=1), jnp.min(slot, axis=1)
    is_new = (new_score > old_score) | ((new_score == old_score) & (new_slot < old_id))
    node = jnp.where(is_new, nowhere + new.astype(jnp.int32), old_id)
    return node, jnp.maximum(new_score, old_score)


def _best_old(
    problem: Problem, fates: _Fates, may_search: bool
) -> tuple[Int[Array, "R"], Float[Array, "R"]]:
    """As `_best`, among old nodes.

    An item whose fetched nodes are all gone is compared with all nodes again.
    """
    graph, items, (ids, scores, *_) = problem.graph, problem.items, problem.like
    nowhere, turn = graph.num_nodes, turns(problem)
    old_fate = fates.old[jnp.minimum(ids, nowhere - 1)]
    is_there = (ids < nowhere) & (old_fate >= turn[:, None])
    at = jnp.argmax(is_there, axis=1)[:, None]
    has_any = jnp.any(is_there, axis=1)
    best_id = jnp.where(has_any, jnp.take_along_axis(ids, at, axis=1)[:, 0], nowhere)
    best = jnp.where(has_any, jnp.take_along_axis(scores, at, axis=1)[:, 0], -jnp.inf)
    if ids.shape[1] == nowhere or not may_search:
        return best_id, best
    is_used_up = items.is_valid & ~has_any & (ids[:, -1] < nowhere)

    def find(key: Array, turn: Array, is_used_up: Array) -> Hits:
        is_candidate = graph.is_live[None, :] & (fates.old[None, :] >= turn[:, None])
        is_candidate &= is_used_up[:, None]
        return nearest(key, graph.key, is_candidate, 1, floor=problem.threshold)

    def look_again() -> tuple[Array, Array]:
        # A mask for each item takes the room of all their scores.
        at_once = max(1, SCORES_AT_ONCE // nowhere)
        hits = in_blocks(find, (items.key, turn, is_used_up), at_once)
        found, score = hits.ids[:, 0], jnp.where(hits.is_valid, hits.scores, -jnp.inf)[:, 0]
        return jnp.where(is_used_up, found, best_id), jnp.where(is_used_up, score, best)

    return jax.lax.cond(jnp.any(is_used_up), look_again, lambda: (best_id, best))
