"""Personalised PageRank near its seeds, at a cost that does not grow with the graph.

What s steps move lies within s edges of where they start. So the nodes around each query's seeds
are gathered into a fixed number P of places, and the walk goes over those alone. Shares of rank
stay as they are in the whole graph: what flows to a node without a place is lost, and no rank is
ever too large.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Float, Int
from moe_jax.graph._arguments import is_live_at, per_row
from moe_jax.graph.incoming import by_target, shares
from moe_jax.graph.pagerank import num_steps, seed_weights, seeds_of, walk
from moe_jax.graph.query import Hits
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.top_k import top_k

__all__ = ["LocalRank", "check_places", "local_pagerank", "local_walk", "place_of"]

# So many edge slots of gathered nodes are held at once: 64 MiB an array.
_EDGES_AT_ONCE = 2**24
# The first hops are compiled each to its own few nodes, the others as one loop.
_SMALL_HOPS = 2


class LocalRank(NamedTuple):
    """What `local_pagerank` found around the seeds of Q queries.

    Attributes:
      ids: int32 [Q, P], the nodes that have a place, by id; N where there is no more.
      rank: float32 [Q, P], 0 where there is no more.
      num_left_out: int32 [Q], nodes that had no place left, of those as near to a seed as the
        farthest that have one; 0 says that all nodes within the hops have one.
      lost: float32 [Q], rank that flowed to nodes without a place, up to rounding; no rank is
        further than this below that of `pagerank`.
    """

    ids: Int[Array, "Q P"]
    rank: Float[Array, "Q P"]
    num_left_out: Int[Array, "Q"]
    lost: Float[Array, "Q"]


class _Near(NamedTuple):
    """Nodes gathered so far: those of the last hop are the frontier, F of them."""

    ids: Int[Array, "Q P"]
    count: Int[Array, "Q"]
    num_left_out: Int[Array, "Q"]
    frontier: Int[Array, "Q F"]
    strength: Float[Array, "Q F"]


def local_pagerank(
    graph: KnowledgeGraph,
    personalization: tuple[ArrayLike, ArrayLike] | Hits,
    *,
    max_nodes: int = 1024,
    hops: int | None = None,
    damping: float = 0.85,
    weighted: bool = True,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
    tol: float = 1e-7,
    max_iterations: int = 100,
) -> LocalRank:
    """`pagerank` of the nodes around each query's seeds, without looking at the others.

    Nodes get places by hops from the seeds. Where those of one hop do not all fit, the strongest
    do, ties to the lower id, and the gathering ends; a node is as strong as the strongest way to
    it is, the seed's weight times the share of rank that each edge carries. Equal to `pagerank`
    up to rounding where `num_left_out` is 0 and hops are as many as steps, or `lost` is 0.

    Args:
      graph: the graph.
      personalization: where walkers start: (ids [Q, R], weights [Q, R]), or `Hits`, whose scores
        are the weights, as for `pagerank`.
      max_nodes: P, places for each query, at least R.
      hops: gather nodes within so many edges of a seed; by default as many as steps are walked.
      damping: see `pagerank`.
      weighted: see `pagerank`.
      kind: see `pagerank`.
      as_of: see `pagerank`.
      tol: see `pagerank`.
      max_iterations: see `pagerank`.

    Returns:
      `LocalRank` of shape [Q, P].

    Raises:
      ValueError: if an argument has the wrong shape or a number is out of range.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> graph, _ = link(graph, jnp.array([0]), jnp.array([1]), weight=1.0)
      >>> found = local_pagerank(graph, (jnp.array([[0]]), jnp.array([[1.0]])), max_nodes=3)
      >>> found.ids.tolist(), [round(float(x), 3) for x in found.rank[0]]
      ([[0, 1, 4]], [0.541, 0.459, 0.0])
    """
    steps = num_steps(damping, tol, max_iterations)
    seeds, weight = seeds_of(personalization)
    check_places(max_nodes, hops, seeds.shape[1])
    return local_walk(
        graph,
        *(seeds, weight, kind, as_of),
        max_nodes=max_nodes,
        hops=hops,
        damping=float(damping),
        steps=steps,
        weighted=weighted,
    )


def check_places(max_nodes: int, hops: int | None, seeds: int) -> None:
    """ValueError unless the sizes of a neighbourhood are in range."""
    if max_nodes < max(seeds, 1):
        raise ValueError(f"max_nodes must be at least {max(seeds, 1)} (seeds), got {max_nodes}")
    if hops is not None and hops < 0:
        raise ValueError(f"hops must not be negative, got {hops}")


def local_walk(
    graph: KnowledgeGraph,
    seeds: Int[Array, "Q R"],
    weight: Float[Array, "Q R"],
    kind: ArrayLike | None,
    as_of: ArrayLike | None,
    *,
    max_nodes: int,
    hops: int | None,
    damping: float,
    steps: int,
    weighted: bool = True,
    counts_start: bool = True,
) -> LocalRank:
    """As `local_pagerank`, for a number of steps and as `moe_jax.graph.pagerank.walk` counts."""
    if kind is not None:
        kind = per_row("kind", kind, 1, 0, jnp.int32)[:, None]
    if as_of is not None:
        as_of = per_row("as_of", as_of, 1, 0, jnp.int32)[:, None]
    hops = steps if hops is None else min(hops, steps)
    return _local_walk(
        graph,
        *(seeds, weight, kind, as_of),
        sizes=(max_nodes, hops, steps),
        damping=damping,
        weighted=weighted,
        counts_start=counts_start,
    )


@functools.partial(jax.jit, static_argnames=("sizes", "damping", "weighted", "counts_start"))
def _local_walk(
    graph: KnowledgeGraph,
    seeds: Int[Array, "Q R"],
    weight: Float[Array, "Q R"],
    kind: Int[Array, "1 1"] | None,
    as_of: Int[Array, "1 1"] | None,
    *,
    sizes: tuple[int, int, int],
    damping: float,
    weighted: bool,
    counts_start: bool,
) -> LocalRank:
    graph, weight = jax.lax.stop_gradient((graph, weight))
    max_nodes, hops, steps = sizes

    def edges_out(node: Int[Array, "Q F"]) -> tuple[Array, Array]:
        return shares(graph, node, kind, as_of, weighted=weighted)

    gather = functools.partial(
        _gather, edges_out, nowhere=graph.num_nodes, places=max_nodes, hops=hops
    )

    def some(seeds: Int[Array, "Q R"], weight: Float[Array, "Q R"]) -> LocalRank:
        is_seed = is_live_at(graph, seeds) & (weight > 0.0) & jnp.isfinite(weight)
        seeds = jnp.where(is_seed, seeds, graph.num_nodes)
        near = gather(seeds=seeds, weight=weight)
        ids = jnp.sort(near.ids, axis=1)
        target, share = edges_out(ids)
        target = place_of(ids, jax.lax.collapse(target, 1, 3), graph.num_nodes)
        start = seed_weights(place_of(ids, seeds, graph.num_nodes), weight, max_nodes)
        step = functools.partial(walk, damping=damping, steps=steps, counts_start=counts_start)
        edges = jax.vmap(by_target)(target.reshape(share.shape), share, ids < graph.num_nodes)
        rank = jax.vmap(lambda edges, start: step(edges, start[None])[0])(edges, start)
        whole = (1.0 if counts_start else damping) - damping ** (steps + 1)
        whole = jnp.where(jnp.any(is_seed, axis=1), whole, 0.0)
        lost = jnp.maximum(whole - jnp.sum(rank, axis=1), 0.0)
        return LocalRank(ids, rank, near.num_left_out, lost)

    size = max_nodes * graph.num_edge_slots
    return in_blocks(some, (seeds, weight), max(1, _EDGES_AT_ONCE // size))


def _gather(
    edges_out: Callable[[Array], tuple[Array, Array]],
    seeds: Int[Array, "Q R"],
    weight: Float[Array, "Q R"],
    *,
    nowhere: int,
    places: int,
    hops: int,
) -> _Near:
    """The nodes within some hops of seeds, nearest first, of a hop the strongest first."""
    rows, width = seeds.shape
    add = functools.partial(_add, nowhere=nowhere)

    def hop(near: _Near, known: int) -> _Near:
        target, share = edges_out(near.frontier)
        target = jax.lax.collapse(target, 1, 3)
        strength = jax.lax.collapse(near.strength[:, :, None] * share, 1, 3)
        width = min(places, strength.shape[1])
        return add(near, target, strength, known=known, width=width)

    none = jnp.zeros(rows, jnp.int32)
    empty = jnp.full((rows, places), nowhere, jnp.int32)
    near = _Near(empty, none, none, seeds, weight)
    near = add(near, seeds, weight, known=0, width=width)
    known = width
    for _ in range(min(hops, _SMALL_HOPS)):
        near = hop(near, known)
        known = min(places, known + near.frontier.shape[1])
    if hops <= _SMALL_HOPS:
        return near
    missing = ((0, 0), (0, places - near.frontier.shape[1]))
    near = near._replace(
        frontier=jnp.pad(near.frontier, missing, constant_values=nowhere),
        strength=jnp.pad(near.strength, missing),
    )

    def is_unfinished(state: tuple[Array, _Near]) -> Array:
        return (state[0] < hops) & jnp.any(state[1].frontier < nowhere)

    def more(state: tuple[Array, _Near]) -> tuple[Array, _Near]:
        return state[0] + 1, hop(state[1], places)

    return jax.lax.while_loop(is_unfinished, more, (jnp.int32(_SMALL_HOPS), near))[1]


def _add(
    near: _Near,
    node: Int[Array, "Q L"],
    strength: Float[Array, "Q L"],
    *,
    nowhere: int,
    known: int,
    width: int,
) -> _Near:
    """Give places to those nodes that have none, `width` at most; they are the next frontier.

    No more than the first `known` places are taken. A copy counts as its strongest.
    """
    query, places = jnp.arange(node.shape[0])[:, None], near.ids.shape[1]
    node = jnp.concatenate([near.ids[:, :known], node], axis=1)
    strength = jnp.pad(strength, ((0, 0), (known, 0)), constant_values=jnp.inf)
    # Sorting one array and looking places up in it is several times as fast as sorting two.
    ordered = jnp.sort(node, axis=1)
    first = jax.vmap(jnp.searchsorted)(ordered, node)
    best = jnp.full(node.shape, -jnp.inf).at[query, first].max(strength)
    is_new = (best > -jnp.inf) & (best < jnp.inf) & (ordered < nowhere)
    best, at = top_k(jnp.where(is_new, best, -jnp.inf), min(width, node.shape[1]))
    turn = near.count[:, None] + jnp.arange(at.shape[1], dtype=jnp.int32)[None, :]
    is_taken = (best > -jnp.inf) & (turn < places)
    taken = jnp.where(is_taken, jnp.take_along_axis(ordered, at, axis=1), nowhere)
    num_taken = jnp.sum(is_taken, axis=1, dtype=jnp.int32)
    num_left_out = jnp.sum(is_new, axis=1, dtype=jnp.int32) - num_taken
    at = jnp.where(is_taken, turn, places)
    return _Near(
        ids=near.ids.at[query, at].set(taken, mode="drop"),
        count=near.count + num_taken,
        num_left_out=near.num_left_out + num_left_out,
        # Nothing that lies behind those left out could have a place.
        frontier=jnp.where((num_left_out > 0)[:, None], nowhere, taken),
        strength=jnp.where(is_taken, best, 0.0),
    )


def place_of(ids: Int[Array, "Q P"], node: Int[Array, "Q L"], nowhere: int) -> Int[Array, "Q L"]:
    """Where each node stands among ascending ids; P where it does not, and for N."""
    place = jax.vmap(jnp.searchsorted)(ids, node).astype(jnp.int32)
    found = jnp.take_along_axis(ids, jnp.minimum(place, ids.shape[1] - 1), axis=1)
    return jnp.where((found == node) & (node < nowhere), place, ids.shape[1])
