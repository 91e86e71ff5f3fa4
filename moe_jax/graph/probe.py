"""Search a few cells of a graph instead of all of it."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import check_choice, per_row, vectors, whole_number
from moe_jax.graph._filters import FILTERS
from moe_jax.graph.cells import Cells, check_cells
from moe_jax.graph.query import Hits
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.similarity import exact_cosine_pairs, normalize
from moe_jax.ops.top_k import top_k

__all__ = ["search_cells"]

# `jax.lax.top_k` is one kernel on GPUs for as many, and a sort for more.
_QUICK = 16
# Rows up to this length are not worth two stages.
_SHORT = 1024
# So many coordinates of candidates are read at once: where a compiler stores them, 1 GiB.
_CODES_AT_ONCE = 2**30


def search_cells(
    graph: KnowledgeGraph,
    cells: Cells,
    queries: ArrayLike,
    k: int = 10,
    threshold: ArrayLike = -1.0,
    *,
    probes: int = 8,
    expert_id: ArrayLike | None = None,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
    min_confidence: ArrayLike | None = None,
    first_pass: str = "codes",
) -> Hits:
    """The most similar live nodes among those in the cells most similar to each query.

    Approximate: a node in a cell that is not probed is not found. The cosines of what is found are
    those of `search`, to the bit, best first, ties to the lower id. The overflow list is always
    scanned. Each filter is one value for all queries or one per query; a filter that few nodes
    pass needs more probes. A query reads about 4 L D bytes of centroids and P D bytes of codes for
    each probe, without a loop or a branch in the program. No gradient flows through.

    Args:
      graph: the graph.
      cells: its cells, from `build_cells`, kept in step by `update_cells`.
      queries: [Q, D], of any length; a query that is zero, NaN or infinite has no hits.
      k: how many, between 1 and N.
      threshold: the least cosine of a hit; a scalar, which may be traced.
      probes: how many cells each query looks into, at least 1; all of them if there are fewer.
      expert_id: only nodes whose value came from this expert.
      kind: only nodes of this kind.
      as_of: only nodes created at or before this logical time.
      min_confidence: only nodes at least this confident.
      first_pass: "codes" chooses some more than k by the graph's eight-bit codes, so that a
        near-tie at the end of that choice may be lost; "keys" scores every probed node exactly,
        reads four times as much, and with all cells probed gives what `search` gives.

    Returns:
      `Hits` of shape [Q, k].

    Raises:
      ValueError: if an argument has the wrong shape, k or probes is out of range, first_pass is
        unknown, or the cells are of another size of graph.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(16, 2), jnp.eye(2))
      >>> cells = build_cells(graph, 2, key=jax.random.key(0))
      >>> search_cells(graph, cells, jnp.array([[2.0, 1.0]]), k=1, probes=1).ids.tolist()
      [[0]]
    """
    check_cells(graph, cells)
    check_choice("first_pass", first_pass, ("codes", "keys"))
    queries = normalize(vectors("queries", queries, graph.dim))
    rows = queries.shape[0]
    k = whole_number("k", k, 1, graph.num_nodes, " (node slots)")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    probes = min(probes, cells.num_cells)
    given = {
        "expert_id": expert_id,
        "kind": kind,
        "as_of": as_of,
        "min_confidence": min_confidence,
    }
    wanted = {
        name: per_row(name, value, rows, 0, FILTERS[name].dtype)
        for name, value in given.items()
        if value is not None
    }
    return _search(
        graph, cells, queries, wanted, threshold, k=k, probes=probes, first_pass=first_pass
    )


@functools.partial(jax.jit, static_argnames=("k", "probes", "first_pass"))
def _search(
    graph: KnowledgeGraph,
    cells: Cells,
    queries: Float[Array, "Q D"],
    wanted: dict[str, Array],
    threshold: ArrayLike,
    *,
    k: int,
    probes: int,
    first_pass: str,
) -> Hits:
    graph, queries = jax.lax.stop_gradient((graph, queries))
    size = probes * cells.members.shape[1] + cells.overflow.shape[0]
    at_once = max(1, _CODES_AT_ONCE // (size * graph.dim))
    some = functools.partial(_search_some, graph, cells, threshold, k, probes, first_pass)
    return in_blocks(some, (queries, wanted), at_once)


def _search_some(
    graph: KnowledgeGraph,
    cells: Cells,
    threshold: ArrayLike,
    k: int,
    probes: int,
    first_pass: str,
    queries: Float[Array, "Q D"],
    wanted: dict[str, Array],
) -> Hits:
    node_id = _candidates(cells, queries, probes)
    is_valid = _is_accepted(graph, node_id, wanted)
    is_valid &= jnp.any(queries != 0.0, axis=1)[:, None]
    row = jnp.minimum(node_id, graph.num_nodes - 1)
    if first_pass == "codes":
        fetch = min(_QUICK if k <= _QUICK - 4 else k + max(8, k // 4), row.shape[1])
        # A plain reduction: the gather of the codes fuses into it, and nothing large is stored.
        score = jnp.sum(graph.code[row].astype(jnp.float32) * queries[:, None, :], axis=-1)
        score = jnp.where(is_valid, score * graph.code_scale[row], -jnp.inf)
        score, at = _top_k(score, fetch)
        row = jnp.take_along_axis(row, at, axis=1)
        is_valid = score > -jnp.inf
        score = _exact(graph, queries, row)
    else:
        score = jnp.where(is_valid, _exact(graph, queries, row), -jnp.inf)
        at = _best(score, row, min(k, row.shape[1]))
        row, score, is_valid = (jnp.take_along_axis(a, at, 1) for a in (row, score, is_valid))
    is_hit = is_valid & (score >= threshold)
    return _in_order(row, score, is_hit, k, graph.num_nodes)


def _candidates(cells: Cells, queries: Float[Array, "Q D"], probes: int) -> Int[Array, "Q F"]:
    """The ids in the cells that each query probes and in the overflow list, N in empty places."""
    rows = queries.shape[0]
    cosine = jnp.matmul(queries, cells.centroids.T, precision=jax.lax.Precision.HIGHEST)
    _, cell = _top_k(cosine, probes)
    inside = cells.members[cell].reshape(rows, -1)
    overflow = jnp.broadcast_to(cells.overflow[None], (rows, cells.overflow.shape[0]))
    return jnp.concatenate([inside, overflow], axis=1)


def _is_accepted(
    graph: KnowledgeGraph, node_id: Int[Array, "Q F"], wanted: dict[str, Array]
) -> Bool[Array, "Q F"]:
    """Whether a node is live and passes the filters."""
    row = jnp.minimum(node_id, graph.num_nodes - 1)
    accepted = (node_id < graph.num_nodes) & graph.is_live[row]
    for name, value in wanted.items():
        field = getattr(graph, FILTERS[name].field)
        accepted &= FILTERS[name].compare(field[row], value[:, None])
    return accepted


def _exact(
    graph: KnowledgeGraph, queries: Float[Array, "Q D"], row: Int[Array, "Q F"]
) -> Float[Array, "Q F"]:
    keys = graph.key[row]
    return exact_cosine_pairs(jnp.broadcast_to(queries[:, None, :], keys.shape), keys)


def _best(score: Float[Array, "Q F"], row: Int[Array, "Q F"], k: int) -> Int[Array, "Q k"]:
    """Positions of the k best, in no order; equal scores go to the lower ids."""
    last = _top_k(score, k)[0][:, -1:]
    # What beats the k-th score comes first, then ties with it by id; ids are below 2**30.
    rank = jnp.where(score > last, 2**30, jnp.where(score == last, 2**30 - 1 - row, -1))
    return _top_k(rank, k)[1]


def _in_order(
    row: Int[Array, "Q F"],
    score: Float[Array, "Q F"],
    is_hit: Bool[Array, "Q F"],
    k: int,
    nodes: int,
) -> Hits:
    """The best k by (score descending, id ascending), filled up with "none"."""
    negated, node_id = jnp.where(is_hit, -score, jnp.inf), jnp.where(is_hit, row, nodes)
    negated, node_id = jax.lax.sort((negated, node_id), dimension=1, num_keys=2)
    fill = ((0, 0), (0, max(0, k - row.shape[1])))
    node_id = jnp.pad(node_id[:, :k], fill, constant_values=nodes)
    negated = jnp.pad(negated[:, :k], fill, constant_values=jnp.inf)
    is_valid = node_id < nodes
    return Hits(node_id, jnp.where(is_valid, -negated, 0.0), is_valid)


def _top_k(x: Array, k: int) -> tuple[Array, Array]:
    """Top-k of rows of thousands, equal values in any order.

    A row's top-k is one block's work on a GPU, some 3 ns an entry, or a sort where k is above 16.
    So only the k chunks with the largest maxima are searched, as in `moe_jax.ops.top_k`.
    """
    rows, size = x.shape
    chunk = 2 ** int(math.log2(max(1.0, (size / k) ** 0.5)))
    if size <= _SHORT or chunk == 1:
        return top_k(x, k, chunk_size=size)
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    lowest = -jnp.inf if is_float else jnp.iinfo(x.dtype).min
    x = jnp.pad(x, ((0, 0), (0, -size % chunk)), constant_values=lowest)
    x = x.reshape(rows, -1, chunk)
    best = jax.lax.top_k(jnp.max(x, axis=2), k)[1]
    found = jnp.take_along_axis(x, best[:, :, None], axis=1).reshape(rows, -1)
    values, at = top_k(found, k, chunk_size=found.shape[1])
    within = jnp.take_along_axis(best, at // chunk, axis=1)
    # Padding is only ever chosen with the lowest value, which nobody reads.
    return values, jnp.minimum(within * chunk + at % chunk, size - 1)
