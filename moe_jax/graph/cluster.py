"""Groups of nodes: levels of clusters by cosine, and communities by edges."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int, PRNGKey
from moe_jax.graph._arguments import is_live_at
from moe_jax.graph._places import turns
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.segment import group_sums
from moe_jax.ops.spherical_kmeans import spherical_kmeans

__all__ = ["ClusterLevel", "Communities", "cluster", "label_propagation"]

_ROWS_AT_ONCE = 2**16


class ClusterLevel(NamedTuple):
    """One level of a clustering: L clusters of a graph's live nodes.

    Attributes:
      assignment: int32 [N], each node's cluster, L for a free slot.
      centroids: float32 [L, D], unit vectors; zero for a cluster without nodes.
      sizes: int32 [L], live nodes in each cluster.
      parent: int32 [L], each cluster's cluster on the next, coarser level; that level's L for a
        cluster without nodes, and 0 on the coarsest level.
      summary: float32 [L, D], mean of the nodes' values, weighted by their confidence; unweighted
        in a cluster where no confidence is above 0.
      typical: int32 [L, T], the nodes nearest to the centroid, best first, N where there are fewer.
    """

    assignment: Int[Array, "N"]
    centroids: Float[Array, "L D"]
    sizes: Int[Array, "L"]
    parent: Int[Array, "L"]
    summary: Float[Array, "L D"]
    typical: Int[Array, "L T"]


class Communities(NamedTuple):
    """What `label_propagation` found.

    Attributes:
      label: int32 [N], the id of one node of the community, N for a free slot.
      rounds: int32 [], how many rounds were taken.
      is_stable: bool [], whether the last round changed nothing, or there are no edges.
    """

    label: Int[Array, "N"]
    rounds: Int[Array, ""]
    is_stable: Bool[Array, ""]


@functools.partial(
    jax.jit, static_argnames=("num_clusters", "iterations", "num_typical", "init", "sample")
)
def cluster(
    graph: KnowledgeGraph,
    num_clusters: tuple[int, ...],
    *,
    key: PRNGKey,
    iterations: int = 10,
    num_typical: int = 3,
    init: str = "k-means++",
    sample: int | None = None,
) -> tuple[ClusterLevel, ...]:
    """Cluster the live nodes by their keys, then the clusters by their centroids, and so on.

    Spherical k-means on every level; above the first a centroid counts for as many as it has
    nodes. A node belongs to the clusters above its finest one.

    Args:
      graph: the graph.
      num_clusters: L of each level, falling, from fine to coarse.
      key: for the seeds.
      iterations: rounds of k-means on each level.
      num_typical: T, at least 1.
      init: "k-means++" or "random", see `moe_jax.ops.spherical_kmeans`.
      sample: learn the finest level from at most so many nodes.

    Returns:
      One `ClusterLevel` for each entry of num_clusters.

    Raises:
      ValueError: if num_clusters is empty, does not fall or ends below 1, or num_typical is
        below 1.

    Example:
      >>> keys = jnp.array([[1.0, 0.0], [0.9, 0.5], [0.0, 1.0], [0.1, -1.0]])
      >>> graph, _ = insert(KnowledgeGraph.create(8, 2), keys)
      >>> fine, coarse = cluster(graph, (3, 2), key=jax.random.key(0))
      >>> sorted(fine.sizes.tolist()), int(coarse.sizes.sum()), coarse.parent.tolist()
      ([1, 1, 2], 4, [0, 0])
    """
    if not num_clusters or min(num_clusters) < 1:
        raise ValueError(f"num_clusters must be positive sizes, got {num_clusters}")
    if any(a <= b for a, b in itertools.pairwise(num_clusters)):
        raise ValueError(f"num_clusters must fall from level to level, got {num_clusters}")
    if num_typical < 1:
        raise ValueError(f"num_typical must be at least 1, got {num_typical}")
    graph = jax.lax.stop_gradient(graph)
    kmeans = functools.partial(spherical_kmeans, iterations=iterations, init=init)
    keys = jax.random.split(key, len(num_clusters))
    found = kmeans(graph.key, num_clusters[0], key=keys[0], is_valid=graph.is_live, sample=sample)
    assignment, centroids = found.assignment, found.centroids
    levels = []
    for i, size in enumerate(num_clusters):
        sizes = jnp.zeros(size, jnp.int32).at[assignment].add(1, mode="drop")
        level = ClusterLevel(
            assignment=assignment,
            centroids=jnp.where((sizes > 0)[:, None], centroids, 0.0),
            sizes=sizes,
            parent=jnp.zeros(size, jnp.int32),
            summary=_summary(graph, assignment, sizes),
            typical=_typical(graph, assignment, centroids, num_typical),
        )
        if i + 1 < len(num_clusters):
            coarser = num_clusters[i + 1]
            weight = sizes.astype(jnp.float32)
            found = kmeans(level.centroids, coarser, key=keys[i + 1], weight=weight)
            level = level._replace(parent=found.assignment)
            assignment = found.assignment.at[assignment].get(mode="fill", fill_value=coarser)
            centroids = found.centroids
        levels.append(level)
    return tuple(levels)


def _summary(
    graph: KnowledgeGraph, assignment: Int[Array, "N"], sizes: Int[Array, "L"]
) -> Float[Array, "L D"]:
    """Mean values of clusters, weighted by confidence where there is any."""
    weight = jnp.maximum(graph.confidence, 0.0)
    size, ones = sizes.shape[0], jnp.ones((graph.num_nodes, 1), jnp.float32)
    total = group_sums(ones, assignment, weight, size)[:, 0]
    has_weight = (total > 0).at[assignment].get(mode="fill", fill_value=False)
    weight = jnp.where(has_weight, weight, 1.0)
    sums = group_sums(graph.value, assignment, weight, size)
    total = jnp.where(total > 0, total, jnp.maximum(sizes, 1))
    return sums / total[:, None]


def _typical(
    graph: KnowledgeGraph, assignment: Int[Array, "N"], centroids: Float[Array, "L D"], count: int
) -> Int[Array, "L T"]:
    """The nodes nearest to each centroid."""
    nodes, size = graph.num_nodes, centroids.shape[0]

    def closeness(row: Int[Array, "R"]) -> Float[Array, "R"]:
        own = centroids.at[assignment[row]].get(mode="fill", fill_value=0.0)
        return jnp.sum(graph.key[row] * own, axis=1)

    # Each node's own centroid beside it would be as large as all keys.
    turn = turns(assignment, in_blocks(closeness, (jnp.arange(nodes),), _ROWS_AT_ONCE))
    at = jnp.where((assignment < size) & (turn < count), assignment * count + turn, size * count)
    typical = jnp.full(size * count, nodes, jnp.int32)
    typical = typical.at[at].set(jnp.arange(nodes, dtype=jnp.int32), mode="drop")
    return typical.reshape(size, count)


@functools.partial(jax.jit, static_argnames=("max_iterations",))
def label_propagation(graph: KnowledgeGraph, max_iterations: int = 32) -> Communities:
    """Communities by label propagation (Raghavan, Albert and Kumara 2007), all nodes at once.

    Every live node starts with its own id as its label. In a round each takes the label with the
    largest total weight among its edges' targets and itself, ties to the lowest label. Its own
    label counts as much as its strongest edge, so that two nodes pointing at each other agree
    and do not swap for ever. Edges count in their direction, from the node to its targets; those
    to the node itself, to free slots and with a weight that is not above 0 do not count.

    Args:
      graph: the graph.
      max_iterations: rounds at most, at least 0.

    Returns:
      `Communities`.

    Raises:
      ValueError: if max_iterations is negative.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 3), jnp.eye(3))
      >>> graph, _ = link(graph, jnp.array([0, 1]), jnp.array([1, 0]), weight=0.5)
      >>> label_propagation(graph).label.tolist()
      [0, 0, 2, 4]
    """
    if max_iterations < 0:
        raise ValueError(f"max_iterations must be at least 0, got {max_iterations}")
    nodes = graph.num_nodes
    own = jnp.arange(nodes, dtype=jnp.int32)[:, None]
    target = graph.edge_target
    counts = is_live_at(graph, target) & (target != own) & (graph.edge_weight > 0)
    counts &= graph.is_live[:, None]
    weight = jnp.where(counts, graph.edge_weight, 0.0)
    weight = jnp.concatenate([jnp.max(weight, axis=1, keepdims=True), weight], axis=1)
    voters = jnp.concatenate([own, jnp.where(counts, target, own)], axis=1)

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        label, rounds, _ = state
        votes = label[voters]
        # Slot by slot, so that the order of the additions is fixed.
        total = sum(
            jnp.where(votes == votes[:, j : j + 1], weight[:, j : j + 1], 0.0)
            for j in range(votes.shape[1])
        )
        is_best = total == jnp.max(total, axis=1, keepdims=True)
        best = jnp.min(jnp.where(is_best, votes, nodes), axis=1)
        return best, rounds + 1, jnp.all(best == label)

    def is_unfinished(state: tuple[Array, Array, Array]) -> Array:
        return ~state[2] & (state[1] < max_iterations)

    start = jnp.where(graph.is_live, own[:, 0], nodes)
    label, rounds, is_stable = jax.lax.while_loop(
        is_unfinished, step, (start, jnp.int32(0), ~jnp.any(counts))
    )
    return Communities(label, rounds, is_stable)
