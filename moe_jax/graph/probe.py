"""Search a few cells of a graph instead of all of it."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import check_choice, vectors, whole_number
from moe_jax.graph._filters import FILTERS, given_filters, shared_mask
from moe_jax.graph.cells import Cells, check_cells
from moe_jax.graph.query import Hits
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops import _cells_gpu, _coded_gpu
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.code import Code
from moe_jax.ops.similarity import exact_cosine_pairs, normalize
from moe_jax.ops.top_k import top_k

__all__ = ["search_cells"]

# `jax.lax.top_k` is one kernel on GPUs for as many, and a sort for more.
_QUICK = 16
# Rows up to this length are not worth two stages.
_SHORT = 1024
# So many coordinates of candidates are read at once: where a compiler stores them, 1 GiB.
_CODES_AT_ONCE = 2**30
# So many places of cells are scored at once, 2 GiB of rows and scores.
_PLACES_AT_ONCE = 2**28


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
    reproducible: bool = True,
    implementation: str | None = None,
) -> Hits:
    """The most similar live nodes among those in the cells most similar to each query.

    Approximate: a node in a cell that is not probed is not found. If `reproducible`, the cosines of
    what is found are those of `search`, to the bit, best first, ties to the lower id. The overflow
    list is always scanned. Each filter is one value for all queries or one per query; a filter that
    few nodes pass needs more probes. A query reads about 4 L D bytes of centroids and P D bytes of
    codes for each probe, without a branch in the program. No gradient flows through.

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
      reproducible: False is faster: on GPUs the cosines are as a float32 sum gives them.
      implementation: "pallas", four kernels for NVIDIA GPUs that take codes, k up to 24, widths
        that 64 divides and filters that are the same for all queries; or "xla". By default the
        faster one that can take the call.

    Returns:
      `Hits` of shape [Q, k].

    Raises:
      ValueError: if an argument has the wrong shape, k or probes is out of range, first_pass or
        implementation is unknown or cannot take the call, or the cells are of another size of
        graph.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(16, 2), jnp.eye(2))
      >>> cells = build_cells(graph, 2, key=jax.random.key(0))
      >>> search_cells(graph, cells, jnp.array([[2.0, 1.0]]), k=1, probes=1).ids.tolist()
      [[0]]
    """
    check_cells(graph, cells)
    check_choice("first_pass", first_pass, ("codes", "keys"))
    queries = vectors("queries", queries, graph.dim)
    k = whole_number("k", k, 1, graph.num_nodes, " (node slots)")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    probes = min(probes, cells.num_cells)
    given = (expert_id, kind, as_of, min_confidence)
    wanted, fields = given_filters(graph, queries.shape[0], given)
    can_fuse = first_pass == "codes" and k <= _coded_gpu.MAX_K
    can_fuse &= _cells_gpu.is_supported(cells.num_cells, graph.dim)
    can_fuse &= all(value.ndim == 0 for value in wanted.values())
    if implementation is None:
        implementation = "pallas" if can_fuse and jax.default_backend() == "gpu" else "xla"
    check_choice("implementation", implementation, ("pallas", "xla"))
    if implementation == "pallas" and not can_fuse:
        raise ValueError(
            "implementation='pallas' needs first_pass='codes', "
            f"k up to {_coded_gpu.MAX_K}, a width that 64 divides and filters of one value, got "
            f"{first_pass=}, {k=}, width {graph.dim} and filters of shapes "
            f"{ {name: value.shape for name, value in wanted.items()} }"
        )
    if isinstance(threshold, float) and threshold == -1.0:
        threshold = None  # spares a transfer in each call
    # Only what a search reads: handing over whole states takes the host longer than the search.
    table = _Table(graph.key, graph.codes, graph.is_live, fields)
    return _search(
        table, cells.centroids, cells.members, cells.overflow, queries, wanted, threshold,
        k=k, probes=probes, first_pass=first_pass, reproducible=reproducible,
        implementation=implementation,
    )  # fmt: skip


class _Table(NamedTuple):
    """What a search reads of a graph; `fields` are those that filters compare."""

    key: Float[Array, "N D"]
    codes: Code
    is_live: Bool[Array, "N"]
    fields: dict[str, Array]


@functools.partial(
    jax.jit, static_argnames=("k", "probes", "first_pass", "reproducible", "implementation")
)
def _search(
    table: _Table,
    centroids: Float[Array, "L D"],
    members: Int[Array, "L P"],
    overflow: Int[Array, "V"],
    queries: Float[Array, "Q D"],
    wanted: dict[str, Array],
    threshold: ArrayLike | None,
    *,
    k: int,
    probes: int,
    first_pass: str,
    reproducible: bool,
    implementation: str,
) -> Hits:
    table, queries = jax.lax.stop_gradient((table, queries))
    num_nodes, dim = table.key.shape
    size = probes * members.shape[1] + overflow.shape[0]

    def by_kernels(queries: Float[Array, "Q D"]) -> Hits:
        num_picked = _coded_gpu.num_to_pick(k)
        found = _cells_gpu.probe(
            queries, table.key, table.codes, shared_mask(table.is_live, wanted, table.fields),
            centroids, members, overflow, probes, num_picked, num_picked if reproducible else k,
            interpret=jax.default_backend() != "gpu",
        )  # fmt: skip
        if not reproducible:
            return Hits(found.ids, found.scores, found.is_found)
        row = jnp.minimum(found.ids, num_nodes - 1)
        score = _exact(table, normalize(queries), row)
        return _in_order(row, score, found.is_found, k, num_nodes)

    def by_xla(queries: Float[Array, "Q D"], wanted: dict[str, Array]) -> Hits:
        queries = normalize(queries)
        node_id = _candidates(centroids, members, overflow, queries, probes)
        return _best_of(table, queries, node_id, wanted, k, first_pass)

    if implementation == "pallas":
        at_once = max(1, _PLACES_AT_ONCE // (size + members.shape[1]))
        hits = in_blocks(by_kernels, (queries,), at_once)
    else:
        rows = queries.shape[0]
        wanted = {name: jnp.broadcast_to(value, (rows,)) for name, value in wanted.items()}
        hits = in_blocks(by_xla, (queries, wanted), max(1, _CODES_AT_ONCE // (size * dim)))
    if threshold is None:
        return hits
    is_hit = hits.is_valid & (hits.scores >= threshold)
    ids, scores = jnp.where(is_hit, hits.ids, num_nodes), jnp.where(is_hit, hits.scores, 0.0)
    return Hits(ids, scores, is_hit)


def _best_of(
    table: _Table,
    queries: Float[Array, "Q D"],
    node_id: Int[Array, "Q F"],
    wanted: dict[str, Array],
    k: int,
    first_pass: str,
) -> Hits:
    """The best k of the nodes given for each query."""
    num_nodes = table.key.shape[0]
    is_valid = _is_accepted(table, node_id, wanted)
    is_valid &= jnp.any(queries != 0.0, axis=1)[:, None]
    row = jnp.minimum(node_id, num_nodes - 1)
    if first_pass == "codes":
        fetch = min(_QUICK if k <= _QUICK - 4 else k + max(8, k // 4), row.shape[1])
        # A plain reduction: the gather of the codes fuses into it, and nothing large is stored.
        code = table.codes.code[row].astype(jnp.float32)
        score = jnp.sum(code * queries[:, None, :], axis=-1)
        score = jnp.where(is_valid, score * table.codes.scale[row], -jnp.inf)
        score, at = _top_k(score, fetch)
        row = jnp.take_along_axis(row, at, axis=1)
        is_valid = score > -jnp.inf
        score = _exact(table, queries, row)
    else:
        score = jnp.where(is_valid, _exact(table, queries, row), -jnp.inf)
        at = _best(score, row, min(k, row.shape[1]))
        row, score, is_valid = (jnp.take_along_axis(a, at, 1) for a in (row, score, is_valid))
    return _in_order(row, score, is_valid, k, num_nodes)


def _candidates(
    centroids: Float[Array, "L D"],
    members: Int[Array, "L P"],
    overflow: Int[Array, "V"],
    queries: Float[Array, "Q D"],
    probes: int,
) -> Int[Array, "Q F"]:
    """The ids in the cells that each query probes and in the overflow list, N in empty places."""
    rows = queries.shape[0]
    cosine = jnp.matmul(queries, centroids.T, precision=jax.lax.Precision.HIGHEST)
    _, cell = _top_k(cosine, probes)
    inside = members[cell].reshape(rows, -1)
    overflow = jnp.broadcast_to(overflow[None], (rows, overflow.shape[0]))
    return jnp.concatenate([inside, overflow], axis=1)


def _is_accepted(
    table: _Table, node_id: Int[Array, "Q F"], wanted: dict[str, Array]
) -> Bool[Array, "Q F"]:
    """Whether a node is live and passes the filters."""
    num_nodes = table.key.shape[0]
    row = jnp.minimum(node_id, num_nodes - 1)
    accepted = (node_id < num_nodes) & table.is_live[row]
    for name, value in wanted.items():
        accepted &= FILTERS[name].compare(table.fields[name][row], value[:, None])
    return accepted


def _exact(
    table: _Table, queries: Float[Array, "Q D"], row: Int[Array, "Q F"]
) -> Float[Array, "Q F"]:
    keys = table.key[row]
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
