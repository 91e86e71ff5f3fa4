"""Approximate search: nodes sorted into cells around centroids, of which a query probes a few."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int, PRNGKey
from moe_jax.graph._arguments import ids, is_live_at
from moe_jax.graph._places import once, seat
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.spherical_kmeans import nearest_centroids, spherical_kmeans

__all__ = ["Cells", "build_cells", "num_missing", "refine_cells", "update_cells"]

_CHOICES = 4
"""How many cells a node tries, the most similar first, before it goes to the overflow list.
Once that is full, it tries as many of those with room, until it has a place."""
_BALANCE = 1.5
"""Cells above so many times the mean are split while learning; they have twice the mean places."""


class Cells(NamedTuple):
    """An inverted file over a graph's nodes (Sivic and Zisserman 2003), of fixed sizes.

    L cells of P places around centroids, and V overflow places for nodes whose cells were full,
    which every search scans. A node is in one place or none. The lists hold ids only: searches
    read keys from the graph, so an id that is stale costs recall and never a wrong score.

    Attributes:
      centroids: float32 [L, D], unit vectors; zero for a cell that is not used.
      members: int32 [L, P], node ids, N in an empty place.
      counts: int32 [L], how many places of each cell are taken.
      overflow: int32 [V], node ids, N in an empty place.
      place: int32 [N], each node's place, counted through members and then overflow; L*P + V for
        a node in neither.

    Example:
      >>> graph, info = insert(KnowledgeGraph.create(4, 3), jnp.eye(3))
      >>> cells = build_cells(graph, 2, key=jax.random.key(0))
      >>> cells.members.shape, int(jnp.sum(cells.counts)), int(num_missing(graph, cells))
      ((2, 8), 3, 0)
    """

    centroids: Float[Array, "L D"]
    members: Int[Array, "L P"]
    counts: Int[Array, "L"]
    overflow: Int[Array, "V"]
    place: Int[Array, "N"]

    @property
    def num_cells(self) -> int:
        """L."""
        return self.members.shape[0]

    @property
    def num_inside(self) -> int:
        """L * P, the number of places in cells."""
        return self.members.shape[0] * self.members.shape[1]

    @property
    def num_places(self) -> int:
        """L * P + V, also the place of a node that has none."""
        return self.num_inside + self.overflow.shape[0]


def build_cells(
    graph: KnowledgeGraph,
    num_cells: int | None = None,
    *,
    key: PRNGKey,
    slots_per_cell: int | None = None,
    overflow_slots: int | None = None,
    iterations: int = 10,
    sample_per_cell: int = 64,
    init: str = "random",
) -> Cells:
    """Cut the live nodes into cells by balanced spherical k-means.

    Where more nodes want a cell than it has places, those nearest to its centroid get them; the
    others try their second to fourth choice, then the overflow list, and then further cells, so
    that every node has a place if there are as many places as nodes. Of a graph that is not full
    as many cells are used as its nodes fill as well, or a probe would find a node or two.

    Args:
      graph: the graph.
      num_cells: L, by default 4 sqrt(N).
      key: for the choice of the sample and the seeds.
      slots_per_cell: P, by default twice N / L, rounded up to a multiple of 8.
      overflow_slots: V, by default P.
      iterations: rounds of k-means.
      sample_per_cell: k-means learns from L times so many nodes.
      init: "random" or "k-means++", see `moe_jax.ops.spherical_kmeans`.

    Returns:
      `Cells`.

    Raises:
      ValueError: if a size is not positive.
    """
    nodes = graph.num_nodes
    num_cells = max(1, round(4 * nodes**0.5)) if num_cells is None else num_cells
    _check_sizes(num_cells=num_cells, sample_per_cell=sample_per_cell)
    if slots_per_cell is None:
        slots_per_cell = -(-2 * nodes // num_cells // 8) * 8
    overflow_slots = slots_per_cell if overflow_slots is None else overflow_slots
    _check_sizes(slots_per_cell=slots_per_cell, overflow_slots=overflow_slots)
    centroids = _learn(graph, key, None, num_cells, iterations, sample_per_cell, init)
    return _fill(graph, centroids, slots_per_cell, overflow_slots)


def refine_cells(
    graph: KnowledgeGraph,
    cells: Cells,
    *,
    key: PRNGKey,
    iterations: int = 2,
    sample_per_cell: int = 64,
) -> Cells:
    """Move the centroids by a few more rounds of k-means, and give every live node its place anew.

    Args:
      graph: the graph.
      cells: cells of the graph, or of an earlier state of it.
      key: for the choice of the sample.
      iterations: rounds of k-means.
      sample_per_cell: k-means learns from L times so many nodes.

    Returns:
      `Cells` of the same sizes.

    Raises:
      ValueError: if the cells do not belong to a graph of this size.
    """
    check_cells(graph, cells)
    _check_sizes(sample_per_cell=sample_per_cell)
    num_cells, slots = cells.members.shape
    start = cells.centroids
    centroids = _learn(graph, key, start, num_cells, iterations, sample_per_cell, "random")
    return _fill(graph, centroids, slots, cells.overflow.shape[0])


def update_cells(graph: KnowledgeGraph, cells: Cells, node_id: ArrayLike) -> Cells:
    """Follow a change of the graph at some nodes: created, moved, evicted, replaced or deleted.

    A dead node leaves its place. A live one that is not in its most similar cell leaves its place,
    too, and takes a free one as in `build_cells`; of several that want the same cell, the nearest
    come first. Where the overflow list and all nearest cells are full, a node opens an unused cell,
    whose centroid it becomes. Other centroids stay, so call `refine_cells` once many nodes have
    come and gone.

    Args:
      graph: the graph after the change.
      cells: the cells before.
      node_id: [R] integers, such as `InsertInfo.node_id`; ids out of range and repeated ones are
        ignored, and ids of unchanged nodes do no harm.

    Returns:
      The cells after.

    Raises:
      ValueError: if node_id is not a list of integers, or the cells are of another size of graph.

    Example:
      >>> graph = KnowledgeGraph.create(4, 3)
      >>> cells = build_cells(graph, 2, key=jax.random.key(0))
      >>> graph, info = insert(graph, jnp.eye(3))
      >>> cells = update_cells(graph, cells, info.node_id)
      >>> cells.overflow[:5].tolist()  # there was nothing to make cells of
      [0, 1, 2, 4, 4]
    """
    check_cells(graph, cells)
    return _update_cells(graph, cells, ids("node_id", node_id))


@jax.jit
def _update_cells(graph: KnowledgeGraph, cells: Cells, node_id: Int[Array, "R"]) -> Cells:
    nodes, nowhere, inside = graph.num_nodes, cells.num_places, cells.num_inside
    node_id = once(node_id, nodes)
    row = jnp.minimum(node_id, nodes - 1)
    is_live = is_live_at(graph, node_id)
    choices, fit = _choices(graph.key[row], is_live, cells.centroids)
    old = jnp.where(node_id < nodes, cells.place[row], nowhere)
    num_cells, slots = cells.members.shape
    is_moved = ~is_live | (old >= inside) | (old // slots != choices[:, 0])

    left = jnp.where(is_moved, old, nowhere)
    cells = _write(cells, left, jnp.full_like(node_id, nodes))
    left_cell = jnp.where(left < inside, left // slots, num_cells)
    counts = cells.counts.at[left_cell].add(-1, mode="drop")
    choices = jnp.where(is_moved[:, None], choices, num_cells)
    cell, turn, spare, centroids = seat(
        graph.key[row], is_live & is_moved, choices, fit,
        cells.centroids, slots - counts, cells.overflow == nodes,
    )  # fmt: skip
    is_empty = cells.members[jnp.minimum(cell, num_cells - 1)] == nodes
    is_turn = is_empty & (jnp.cumsum(is_empty, axis=1) == turn[:, None] + 1)
    slot = jnp.argmax(is_turn, axis=1).astype(jnp.int32)
    place = jnp.where(cell < num_cells, cell * slots + slot, inside + spare)
    at = jnp.where(is_moved, node_id, nodes)
    cells = _write(cells, place, node_id)
    return cells._replace(
        centroids=centroids,
        counts=counts.at[cell].add(1, mode="drop"),
        place=cells.place.at[at].set(place, mode="drop"),
    )


def num_missing(graph: KnowledgeGraph, cells: Cells) -> Int[Array, ""]:
    """How many live nodes have no place, so that no search of the cells can find them.

    Args:
      graph: the graph.
      cells: its cells.

    Returns:
      int32 scalar.
    """
    check_cells(graph, cells)
    return jnp.sum(graph.is_live & (cells.place == cells.num_places), dtype=jnp.int32)


def check_cells(graph: KnowledgeGraph, cells: Cells) -> None:
    """ValueError unless the cells have the graph's sizes."""
    if (cells.place.shape[0], cells.centroids.shape[1]) != (graph.num_nodes, graph.dim):
        raise ValueError(
            f"cells must be of a graph of {graph.num_nodes} nodes of width {graph.dim}, got "
            f"{cells.place.shape[0]} nodes of width {cells.centroids.shape[1]}"
        )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _learn(
    graph: KnowledgeGraph,
    key: PRNGKey,
    start: Float[Array, "L D"] | None,
    num_cells: int,
    iterations: int,
    sample_per_cell: int,
    init: str,
) -> Float[Array, "L D"]:
    """Centroids of the live nodes; jitted, so that assigning every node is left out."""
    share = graph.num_live / graph.num_nodes
    return spherical_kmeans(
        graph.key,
        num_cells,
        key=key,
        iterations=iterations,
        is_valid=graph.is_live,
        init=init if start is None else start,
        sample=sample_per_cell * num_cells,
        balance=_BALANCE,
        num_used=jnp.maximum(1.0, jnp.ceil(num_cells * share)),
    ).centroids


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fill(graph: KnowledgeGraph, centroids: Float[Array, "L D"], slots: int, spare: int) -> Cells:
    """A place for every live node, all cells being empty."""
    num_cells, nodes = centroids.shape[0], graph.num_nodes
    inside = num_cells * slots
    cells = Cells(
        centroids=centroids,
        members=jnp.full((num_cells, slots), nodes, jnp.int32),
        counts=jnp.zeros(num_cells, jnp.int32),
        overflow=jnp.full(spare, nodes, jnp.int32),
        place=jnp.full(nodes, inside + spare, jnp.int32),
    )
    choices, fit = _choices(graph.key, graph.is_live, centroids)
    room = jnp.full(num_cells, slots, jnp.int32)
    cell, turn, spilled, centroids = seat(
        graph.key, graph.is_live, choices, fit, centroids, room, cells.overflow == nodes
    )
    place = jnp.where(cell < num_cells, cell * slots + turn, inside + spilled)
    cells = _write(cells, place, jnp.arange(nodes, dtype=jnp.int32))
    counts = cells.counts.at[cell].add(1, mode="drop")
    return cells._replace(centroids=centroids, counts=counts, place=place)


def _choices(
    keys: Float[Array, "R D"], is_live: Bool[Array, "R"], centroids: Float[Array, "L D"]
) -> tuple[Int[Array, "R c"], Float[Array, "R c"]]:
    """The cells that each row tries, best first, L where there is none, and their cosines."""
    num_cells = centroids.shape[0]
    choices, fit = nearest_centroids(keys, centroids, min(_CHOICES, num_cells))
    return jnp.where(is_live[:, None], choices, num_cells), fit


def _write(cells: Cells, place: Int[Array, "R"], value: Int[Array, "R"]) -> Cells:
    """Write ids at places; the last place is nowhere."""
    inside, spare = cells.num_inside, cells.overflow.shape[0]
    within = jnp.where(place < inside, place, inside)
    beyond = jnp.where(place < inside, spare, place - inside)
    members = cells.members.reshape(-1).at[within].set(value, mode="drop")
    return cells._replace(
        members=members.reshape(cells.members.shape),
        overflow=cells.overflow.at[beyond].set(value, mode="drop"),
    )
