"""Personalised PageRank over the edge slots of a knowledge graph, the same bits every time.

Rank flows along edges, so what a node gets is a sum over the edges that lead to it, of which
there may be any number. Adding them up in memory (a scatter-add) has no fixed order on a GPU. Here
edges are sorted by target once, and a segmented prefix sum, whose tree of additions is fixed by
the number of edge slots alone, adds them up: no result depends on the run, nor on which queries
are answered together.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import array
from moe_jax.graph.incoming import IncomingEdges, incoming_edges
from moe_jax.graph.query import Hits
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["num_steps", "pagerank", "rounded", "seed_weights", "seeds_of", "walk"]


def pagerank(
    graph: KnowledgeGraph | IncomingEdges,
    *,
    damping: float = 0.85,
    personalization: ArrayLike | tuple[ArrayLike, ArrayLike] | Hits | None = None,
    weighted: bool = True,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
    tol: float = 1e-7,
    max_iterations: int = 100,
) -> Float[Array, "Q N"]:
    """Personalised PageRank of every node, for Q queries at once.

    A walker follows edges, and with probability 1 - damping, or where no edge leads on, starts
    again at a node drawn from the personalisation; its share of time at a node is the node's rank
    (Page, Brin, Motwani and Winograd 1999; what `networkx.pagerank` computes). As a series: what
    arrives after t steps is damping times what arrived after t - 1, moved along the edges. All
    that the steps after the t-th will add sums to damping ** (t + 1) exactly, so the number of
    steps follows from `tol` alone, and nothing needs to be looked at on the way.

    Args:
      graph: the graph, or its `incoming_edges`, which carry their own filters.
      damping: the probability of following an edge, at least 0 and below 1.
      personalization: where walkers start: [Q, N]; or (ids [Q, R], weights [Q, R]), or `Hits`,
        whose scores are the weights. By default one query, all live nodes alike. Only live nodes
        and positive, finite weights count; a query without any has rank 0 everywhere.
      weighted: see `incoming_edges`.
      kind: see `incoming_edges`.
      as_of: see `incoming_edges`.
      tol: how much of each query's rank, which sums to 1, may be left to come.
      max_iterations: the cap on steps, at least 0.

    Returns:
      float32 [Q, N].

    Raises:
      ValueError: if an argument has the wrong shape or a number is out of range.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> graph, _ = link(graph, jnp.array([0]), jnp.array([1]), weight=1.0)
      >>> rank = pagerank(graph, personalization=(jnp.array([[0]]), jnp.array([[1.0]])))
      >>> [round(float(x), 3) for x in rank[0]]
      [0.541, 0.459, 0.0, 0.0]
    """
    steps = num_steps(damping, tol, max_iterations)
    if isinstance(graph, KnowledgeGraph):
        edges = incoming_edges(graph, weighted=weighted, kind=kind, as_of=as_of)
    else:
        edges = graph
    start = _personalization(personalization, edges.is_live)
    return walk(edges, start, damping=float(damping), steps=steps)


def num_steps(damping: float, tol: float, max_iterations: int) -> int:
    """How many terms of the series behind the first leave at most `tol` of the rank to come.

    Args:
      damping: at least 0 and below 1.
      tol: at least 0.
      max_iterations: the cap, at least 0.

    Returns:
      The number of steps.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> num_steps(0.5, 0.125, 100), num_steps(0.5, 0.0, 100)
      (3, 100)
    """
    if not 0.0 <= damping < 1.0:
        raise ValueError(f"damping must be at least 0 and below 1, got {damping}")
    if tol < 0.0:
        raise ValueError(f"tol must not be negative, got {tol}")
    if max_iterations < 0:
        raise ValueError(f"max_iterations must not be negative, got {max_iterations}")
    if damping == 0.0 or max_iterations == 0:
        return 0
    wanted = math.log(tol) / math.log(damping) if tol > 0.0 else math.inf
    return max(0, math.ceil(min(wanted, max_iterations)))


@functools.partial(jax.jit, static_argnames=("damping", "steps", "counts_start"))
def walk(
    edges: IncomingEdges,
    start: Float[Array, "Q N"],
    *,
    damping: float,
    steps: int,
    counts_start: bool = True,
) -> Float[Array, "Q N"]:
    """The first terms of the series of `pagerank`.

    Args:
      edges: from `incoming_edges`.
      start: float32 [Q, N], weights.
      damping: at least 0 and below 1.
      steps: how many terms behind the first.
      counts_start: False leaves out the first term, what the walkers bring when they start.

    Returns:
      float32 [Q, N].

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> graph, _ = link(graph, jnp.array([0]), jnp.array([1]), weight=1.0)
      >>> start = jnp.array([[1.0, 0.0, 0.0, 0.0]])
      >>> walk(incoming_edges(graph), start, damping=0.5, steps=1, counts_start=False).tolist()
      [[0.0, 0.25, 0.0, 0.0]]
    """
    edges, start = jax.lax.stop_gradient((edges, start))
    start = jnp.where(edges.is_live[None, :] & jnp.isfinite(start), start, 0.0)
    start = jnp.clip(start, 0.0, 1e28).T  # so that no sum overflows
    start = rounded(start * _inverse(_sum_first(start)))

    def step(_: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rank, missing, arriving = state
        stuck = _sum_first(jnp.where(edges.is_dangling[:, None], arriving, 0.0))
        arriving = _arrivals(edges, arriving) + rounded(stuck * start)
        arriving = rounded(damping * arriving)
        # Compensated addition (Kahan 1965): a hundred small terms must not round away.
        term = arriving - missing
        total = rank + term
        return total, (total - rank) - term, arriving

    first = (1.0 - damping) * start
    none = jnp.zeros_like(first)
    state = first if counts_start else none, none, first
    return jax.lax.fori_loop(0, steps, step, state)[0].T


def _arrivals(edges: IncomingEdges, rank: Float[Array, "N Q"]) -> Float[Array, "N Q"]:
    """What flows to each node along the edges."""

    def add(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        (is_first, value), (is_next_first, next_value) = left, right
        total = jnp.where(is_next_first, next_value, value + next_value)
        return is_first | is_next_first, total

    flow = rounded(rank[edges.source] * edges.share[:, None])
    _, total = jax.lax.associative_scan(add, (edges.is_first[:, None], flow), axis=0)
    has_any = edges.last < edges.source.shape[0]
    return jnp.where(has_any[:, None], total[jnp.where(has_any, edges.last, 0)], 0.0)


def _inverse(x: Float[Array, "1 Q"]) -> Float[Array, "1 Q"]:
    """1 / x, or 0 for 0; a division by x itself compilers rewrite in some shapes only."""
    tiny = jnp.finfo(jnp.float32).tiny
    return jnp.where(x > 0.0, 1.0 / jnp.maximum(x, tiny), 0.0)


def rounded(x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    """A product that is not fused with an addition, which would leave it unrounded.

    Compilers fuse in some shapes only, so the result would depend on what is computed together.
    They see through a barrier and through rounding to all 23 bits of a float32, so one is given up.

    Args:
      x: float32 [...].

    Returns:
      float32 [...], rounded to 22 bits.

    Example:
      >>> float(rounded(jnp.float32(1.0 + 2.0**-23)))
      1.0
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=22)


def _sum_first(x: Float[Array, "N Q"]) -> Float[Array, "1 Q"]:
    """The sum over the first axis, by halves, so in an order that does not depend on Q."""
    size = 1 << (x.shape[0] - 1).bit_length()
    x = jnp.pad(x, [(0, size - x.shape[0]), (0, 0)])
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = x[:half] + x[half:]
    return x


def _personalization(
    given: ArrayLike | tuple[ArrayLike, ArrayLike] | Hits | None, is_live: Bool[Array, "N"]
) -> Float[Array, "Q N"]:
    """The argument as weights of all nodes; ValueError where it has the wrong shape."""
    nowhere = is_live.shape[0]
    if given is None:
        return is_live[None, :].astype(jnp.float32)
    if not isinstance(given, tuple):
        weight = jnp.asarray(given, jnp.float32)
        if weight.ndim != 2 or weight.shape[1] != nowhere:
            raise ValueError(
                f"personalization must have shape [queries, {nowhere}] or be (ids, weights), "
                f"got shape {weight.shape}"
            )
        return weight
    return seed_weights(*seeds_of(given), nowhere)


def seeds_of(
    given: tuple[ArrayLike, ArrayLike] | Hits,
) -> tuple[Int[Array, "Q R"], Float[Array, "Q R"]]:
    """The ids and weights of a personalization; ValueError where they have the wrong shape."""
    if isinstance(given, Hits):
        given = given.ids, given.scores
    node, weight = array("personalization", given[0], jnp.int32), jnp.asarray(given[1], jnp.float32)
    if node.ndim != 2 or weight.shape != node.shape:
        raise ValueError(
            f"personalization must be integer ids and weights, both [queries, seeds], got shapes "
            f"{node.shape} and {weight.shape}"
        )
    return node, weight


@functools.partial(jax.jit, static_argnames="nowhere")
def seed_weights(
    node: Int[Array, "Q R"], weight: Float[Array, "Q R"], nowhere: int
) -> Float[Array, "Q N"]:
    """Weights by node, those of one node added in the given order.

    Args:
      node: int32 [Q, R], ids; those out of range are dropped.
      weight: float32 [Q, R]; those not positive or not finite are dropped.
      nowhere: N.

    Returns:
      float32 [Q, N].

    Example:
      >>> seed_weights(jnp.array([[1, 0, 1]]), jnp.array([[1.0, 2.0, 0.5]]), 3).tolist()
      [[2.0, 1.5, 0.0]]
    """
    query = jnp.arange(node.shape[0])
    node = jnp.where((node >= 0) & (node < nowhere), node, nowhere)
    weight = jnp.where((weight > 0.0) & jnp.isfinite(weight), weight, 0.0)

    def put(total: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
        at, value = column
        return total.at[query, at].add(value, mode="drop"), None

    empty = jnp.zeros((node.shape[0], nowhere))
    return jax.lax.scan(put, empty, (node.T, weight.T))[0]
