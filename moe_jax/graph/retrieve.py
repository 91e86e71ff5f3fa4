"""Retrieval by graph: seed by similarity, spread along edges, rank."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Float, Int
from moe_jax.graph._arguments import vectors, whole_number
from moe_jax.graph.incoming import IncomingEdges, incoming_edges
from moe_jax.graph.local import check_places, local_walk, place_of
from moe_jax.graph.pagerank import rounded, seed_weights, walk
from moe_jax.graph.query import Hits, search
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.search import SCORES_AT_ONCE
from moe_jax.ops.similarity import exact_cosine_at, normalize
from moe_jax.ops.top_k import top_k

__all__ = ["retrieve"]

_TINY = float(jnp.finfo(jnp.float32).tiny)


def retrieve(
    graph: KnowledgeGraph,
    queries: ArrayLike,
    k: int = 10,
    *,
    seeds: int = 8,
    threshold: ArrayLike = 0.0,
    sharpness: float = 8.0,
    damping: float = 0.5,
    iterations: int = 8,
    mix: ArrayLike = 0.8,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
    edges: IncomingEdges | None = None,
    max_nodes: int | None = 1024,
    hops: int | None = None,
) -> Hits:
    """The k nodes that a query leads to: what resembles it, and what the edges from there reach.

    A search by cosine finds the seeds. Personalised PageRank starts from them, in proportion to
    cosine ** sharpness, and spreads along the edges. What a node received along edges, divided by
    the most that any node received, is its spread. The max(k, seeds) nodes of the best cosine and
    the k + seeds that received most are ranked by `mix * spread + (1 - mix) * cosine`. (After
    Gutiérrez et al. 2024, HippoRAG, which spreads over entities; here the nodes are linked.)

    In a graph of more than `max_nodes` nodes only so many near the seeds of each query are walked,
    as by `local_pagerank`, which also tells how much is lost by that. So what follows the search
    costs the same in a graph of any size.

    Args:
      graph: the graph.
      queries: [Q, D], of any length; a query that is zero, NaN or infinite has no hits.
      k: how many, between 1 and N.
      seeds: how many nodes to start from, at least 1.
      threshold: the least cosine of a seed, and of a hit that nothing flowed to.
      sharpness: how much more the best seeds weigh than the others.
      damping: how far to spread: the probability of following one more edge.
      iterations: the cap on how many edges to follow one after the other.
      mix: what spread counts for against the cosine, between 0 and 1.
      kind: spread only along edges of this kind, an integer.
      as_of: start only from nodes created, and spread only along edges that hold, at this time.
      edges: `incoming_edges` of this graph, to walk all of it in each of many calls; it carries
        its own filters.
      max_nodes: how many nodes to walk for each query, at least `seeds`; None for all.
      hops: of those, walk only nodes within so many edges of a seed; by default `iterations`.

    Returns:
      `Hits` of shape [Q, k], best first, ties to the node that received more, then to the lowest
      id.

    Raises:
      ValueError: if an argument has the wrong shape or a number is out of range.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 3), jnp.eye(3))
      >>> graph, _ = link(graph, jnp.array([0]), jnp.array([2]), weight=1.0)
      >>> retrieve(graph, jnp.array([[1.0, 0.1, 0.0]]), k=2).ids.tolist()
      [[2, 0]]
    """
    queries = normalize(vectors("queries", queries, graph.dim))
    k = whole_number("k", k, 1, graph.num_nodes, " (node slots)")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if not 0.0 <= damping < 1.0:
        raise ValueError(f"damping must be at least 0 and below 1, got {damping}")
    if iterations < 0:
        raise ValueError(f"iterations must not be negative, got {iterations}")
    if sharpness <= 0.0:
        raise ValueError(f"sharpness must be positive, got {sharpness}")
    if isinstance(mix, (int, float)) and not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix must be between 0 and 1, got {mix}")
    if edges is not None and edges.is_live.shape[0] != graph.num_nodes:
        raise ValueError(
            f"edges must be of a graph of {graph.num_nodes} nodes, got {edges.is_live.shape[0]}"
        )
    seeds = min(seeds, graph.num_nodes)
    if max_nodes is None or edges is not None:
        max_nodes = graph.num_nodes
    check_places(max_nodes, hops, seeds)
    if edges is None and max_nodes >= graph.num_nodes:
        edges = incoming_edges(graph, kind=kind, as_of=as_of)
    found = search(graph, queries, max(seeds, k), threshold, as_of=as_of)
    return _retrieve(
        graph.key,
        *(graph if edges is None else edges, queries, found, mix, kind, as_of),
        k=k,
        seeds=seeds,
        sharpness=float(sharpness),
        damping=float(damping),
        sizes=(max_nodes, iterations if hops is None else hops, iterations),
    )


@functools.partial(jax.jit, static_argnames=("k", "seeds", "sharpness", "damping", "sizes"))
def _retrieve(
    keys: Float[Array, "N D"],
    walked: KnowledgeGraph | IncomingEdges,
    queries: Float[Array, "Q D"],
    found: Hits,
    mix: ArrayLike,
    kind: ArrayLike | None,
    as_of: ArrayLike | None,
    *,
    k: int,
    seeds: int,
    sharpness: float,
    damping: float,
    sizes: tuple[int, int, int],
) -> Hits:
    nowhere, (max_nodes, hops, steps) = keys.shape[0], sizes
    keys, mix = jax.lax.stop_gradient(keys), jnp.asarray(mix, jnp.float32)
    options = {"steps": steps, "damping": damping, "counts_start": False}

    def rank(queries: Float[Array, "Q D"], found: Hits) -> Hits:
        start, weight = found.ids[:, :seeds], _seed_shares(found.scores[:, :seeds], sharpness)
        if isinstance(walked, IncomingEdges):
            received = walk(walked, seed_weights(start, weight, nowhere), **options)
            place = found.ids
            most, reached = top_k(received, min(k + seeds, nowhere))
            node = reached
        else:
            sizes = {"max_nodes": max_nodes, "hops": hops}
            near = local_walk(walked, start, weight, kind, as_of, **sizes, **options)
            received, place = near.rank, place_of(near.ids, found.ids, nowhere)
            most, reached = top_k(received, min(k + seeds, max_nodes))
            node = jnp.take_along_axis(near.ids, reached, axis=1)
        node = jnp.concatenate([found.ids, jnp.where(most > 0.0, node, nowhere)], axis=1)
        place = jnp.concatenate([place, reached], axis=1)
        is_placed = place < received.shape[1]
        received = jnp.take_along_axis(received, jnp.where(is_placed, place, 0), axis=1)
        received = jnp.where(is_placed, received, 0.0)
        cosine = exact_cosine_at(queries, keys, jnp.minimum(node, nowhere - 1))
        spread = received * (1.0 / jnp.maximum(most[:, :1], _TINY))
        score = cosine + rounded(mix * (rounded(spread) - cosine))
        return _best(node, score, received, k, nowhere)

    if isinstance(walked, IncomingEdges):
        # A walk of the whole graph holds what flows along each edge for each query.
        at_once = max(1, SCORES_AT_ONCE // max(1, walked.source.shape[0]))
        return in_blocks(rank, (queries, found), at_once)
    return rank(queries, found)


def _seed_shares(score: Float[Array, "Q R"], sharpness: float) -> Float[Array, "Q R"]:
    """Shares in proportion to cosine ** sharpness; the best is 1, so that no power vanishes."""
    score = jnp.maximum(score, 0.0)
    best = jnp.maximum(jnp.max(score, axis=1, keepdims=True), _TINY)
    return rounded((score * (1.0 / best)) ** sharpness)


def _best(
    node: Int[Array, "Q C"],
    score: Float[Array, "Q C"],
    received: Float[Array, "Q C"],
    k: int,
    nowhere: int,
) -> Hits:
    """The k best, each node once."""
    score = jnp.where(node < nowhere, score, -jnp.inf)
    worst, less, node = jax.lax.sort((-score, -received, node), dimension=1, num_keys=3)
    # Repeats have the same score, so they are side by side.
    is_repeat = jnp.zeros(node.shape, bool).at[:, 1:].set(node[:, 1:] == node[:, :-1])
    worst = jnp.where(is_repeat, jnp.inf, worst)
    worst, _, node = jax.lax.sort((worst, less, node), dimension=1, num_keys=3)
    is_hit = worst[:, :k] < jnp.inf
    ids = jnp.where(is_hit, node[:, :k], nowhere)
    return Hits(ids, jnp.where(is_hit, -worst[:, :k], 0.0), is_hit)
