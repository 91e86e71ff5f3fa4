"""How healthy a graph is: how full, how redundant, how read, how connected."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.similarity import exact_cosine_pairs

__all__ = ["NUM_BINS", "GraphHealth", "health"]

NUM_BINS = 32
"""Bins of a histogram: bin 0 counts values up to 0, bin b those in [2**(b-1), 2**b)."""

_ROWS_AT_ONCE = 64
_MAX_SAMPLE = 32_768  # Its square still fits an int32.


class GraphHealth(NamedTuple):
    """What `health` measures, all on the device; a share of nothing is 0.

    An edge is a slot whose target is a slot of the graph. It is dead when a node at either end is
    not live; only the others count as edges below.

    Attributes:
      num_live: int32, live nodes.
      occupancy: float32, live nodes by node slots.
      merge_rate: float32, items merged by node updates, over the graph's life.
      duplicate_rate: float32, of a sample of live nodes, the share whose nearest other node is as
        near as asked.
      hits_histogram: int32 [32], live nodes by hits, in bins of powers of two; see `NUM_BINS`.
      age_histogram: int32 [32], live nodes by logical time since their creation, likewise.
      never_read_share: float32, live nodes without a read that `record_reads` was told of.
      num_edges: int32, edges.
      mean_out_degree: float32, edges by live nodes.
      max_in_degree: int32, edges into the most pointed-at node.
      hub_share: float32, the share of edges that end in the most pointed-at 1% of live nodes,
        rounded up.
      isolated_share: float32, live nodes without an edge from or to another node.
      dead_edges: int32, edges to or from a node that is not live.
    """

    num_live: Int[Array, ""]
    occupancy: Float[Array, ""]
    merge_rate: Float[Array, ""]
    duplicate_rate: Float[Array, ""]
    hits_histogram: Int[Array, "32"]
    age_histogram: Int[Array, "32"]
    never_read_share: Float[Array, ""]
    num_edges: Int[Array, ""]
    mean_out_degree: Float[Array, ""]
    max_in_degree: Int[Array, ""]
    hub_share: Float[Array, ""]
    isolated_share: Float[Array, ""]
    dead_edges: Int[Array, ""]

    @property
    def has_reads(self) -> bool:
        """Of a report on the host: whether any read was recorded; else the share says nothing."""
        return bool(self.num_live > 0 and self.never_read_share < 1)


def health(
    graph: KnowledgeGraph,
    *,
    now: ArrayLike | None = None,
    duplicate_cosine: ArrayLike = 0.9,
    sample: int = 512,
) -> GraphHealth:
    """Measures a graph in one pass over its arrays, plus `sample` searches.

    Args:
      graph: the graph.
      now: the logical time that ages are counted to; the graph's clock by default.
      duplicate_cosine: the cosine from which on two nodes count as duplicates. Under the leader
        rule no two nodes reach the merge threshold, so ask for less.
      sample: at most so many live nodes, evenly spaced, are compared with all others.

    Returns:
      A `GraphHealth`.

    Raises:
      ValueError: if sample is below 1 or above 32768.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.array([[1.0, 0.0], [0.9, 0.5]]))
      >>> report = health(graph, duplicate_cosine=0.8)
      >>> float(report.occupancy), float(report.duplicate_rate), report.hits_histogram[:3].tolist()
      (0.5, 1.0, [0, 2, 0])
    """
    if not 1 <= sample <= _MAX_SAMPLE:
        raise ValueError(f"sample must be between 1 and {_MAX_SAMPLE}, got {sample}")
    now = jnp.asarray(graph.clock if now is None else now, jnp.int32)
    cosine = jnp.asarray(duplicate_cosine, jnp.float32)
    return _health(graph, now, cosine, sample=min(sample, graph.num_nodes))


@functools.partial(jax.jit, static_argnames="sample")
def _health(
    graph: KnowledgeGraph,
    now: Int[Array, ""],
    duplicate_cosine: Float[Array, ""],
    *,
    sample: int,
) -> GraphHealth:
    live, num_live = graph.is_live, graph.num_live
    num_nodes = graph.num_nodes
    is_slot = (graph.edge_target >= 0) & (graph.edge_target < num_nodes)
    target = jnp.where(is_slot, graph.edge_target, 0)
    is_edge = is_slot & live[:, None] & live[target]
    num_edges = _count(is_edge)
    at = jnp.where(is_edge, target, num_nodes)
    in_degree = jnp.zeros(num_nodes, jnp.int32).at[at.ravel()].add(1, mode="drop")
    # Free slots have no edges, so they sort behind every live node that has one.
    reached = jnp.cumsum(-jnp.sort(-in_degree), dtype=jnp.int32)
    num_hubs = (num_live + 99) // 100
    age = now - graph.created
    return GraphHealth(
        num_live=num_live,
        occupancy=_share(num_live, num_nodes),
        merge_rate=_share(graph.num_merged, graph.num_updates),
        duplicate_rate=_duplicate_rate(graph, duplicate_cosine, sample),
        hits_histogram=_histogram(graph.hits, live),
        age_histogram=_histogram(age, live),
        never_read_share=_share(_count(live & (graph.reads <= 0)), num_live),
        num_edges=num_edges,
        mean_out_degree=_share(num_edges, num_live),
        max_in_degree=jnp.max(in_degree),
        hub_share=_share(reached[jnp.maximum(num_hubs, 1) - 1], num_edges),
        isolated_share=_share(_count(live & ~_is_connected(target, is_edge)), num_live),
        dead_edges=_count(is_slot & ~is_edge),
    )


def _duplicate_rate(
    graph: KnowledgeGraph, threshold: Float[Array, ""], sample: int
) -> Float[Array, ""]:
    """The share of sampled live nodes with another live node at or above the threshold."""
    num_live, order = graph.num_live, jnp.arange(sample, dtype=jnp.int32)
    # The i-th of the sample has rank i * live // sample, computed without overflow.
    whole, rest = num_live // sample, num_live % sample
    spread = order * whole + (order * rest) // sample
    rank = jnp.where(num_live <= sample, order, spread)
    is_taken = order < num_live
    running = jnp.cumsum(graph.is_live, dtype=jnp.int32)
    node = jnp.minimum(jnp.searchsorted(running, rank + 1), graph.num_nodes - 1)

    def has_twin(one: Int[Array, ""]) -> Bool[Array, ""]:
        key = graph.key[one]
        cosine = jnp.matmul(graph.key, key, precision=jax.lax.Precision.HIGHEST)
        is_other = graph.is_live & (jnp.arange(graph.num_nodes) != one)
        other = jnp.argmax(jnp.where(is_other, cosine, -jnp.inf))
        return is_other[other] & (exact_cosine_pairs(key, graph.key[other]) >= threshold)

    # A few rows at a time, so that sample x nodes never exists whole.
    is_twin = jax.lax.map(has_twin, node, batch_size=min(sample, _ROWS_AT_ONCE))
    return _share(_count(is_twin & is_taken), jnp.minimum(num_live, sample))


def _is_connected(target: Int[Array, "N M"], is_edge: Bool[Array, "N M"]) -> Bool[Array, "N"]:
    """Which nodes have an edge from or to another node."""
    num_nodes = target.shape[0]
    is_between = is_edge & (target != jnp.arange(num_nodes, dtype=jnp.int32)[:, None])
    at = jnp.where(is_between, target, num_nodes).ravel()
    is_end = jnp.zeros(num_nodes, bool).at[at].set(True, mode="drop")
    return is_end | jnp.any(is_between, axis=1)


def _histogram(value: Int[Array, "N"], live: Bool[Array, "N"]) -> Int[Array, "32"]:
    """Live nodes by the number of binary digits of a value; below 1 is none."""
    digits = NUM_BINS - jax.lax.clz(jnp.maximum(value, 0))
    at = jnp.where(live, digits, NUM_BINS)
    return jnp.zeros(NUM_BINS, jnp.int32).at[at].add(1, mode="drop")


def _count(mask: Bool[Array, "*N"]) -> Int[Array, ""]:
    return jnp.sum(mask, dtype=jnp.int32)


def _share(part: ArrayLike, whole: ArrayLike) -> Float[Array, ""]:
    part, whole = jnp.asarray(part, jnp.float32), jnp.asarray(whole, jnp.float32)
    return part / jnp.maximum(whole, 1.0)
