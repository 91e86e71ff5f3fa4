"""Search a few cells of a graph instead of all of it."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import (
    check_choice,
    cosine_threshold,
    reachable,
    vectors,
    whole_number,
)
from moe_jax.graph._filters import FILTERS, given_filters, shared_mask
from moe_jax.graph.cells import Cells, check_cells
from moe_jax.graph.query import Hits, above
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops._hardware import runs_triton
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.search import MAX_FUSED_K, Code, Lists, can_fuse, nearest_in_cells

__all__ = ["search_cells"]

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
      implementation: "pallas", four kernels for NVIDIA GPUs that take codes, k up to 48, widths
        that 64 divides and filters that are the same for all queries; or "xla". By default the
        faster one that can take the call.

    Returns:
      `Hits` of shape [Q, k].

    Raises:
      ValueError: if an argument has the wrong shape, k or probes is out of range, first_pass or
        implementation is unknown or cannot take the call, or the cells are of another size of
        graph.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
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
    is_fusible = first_pass == "codes" and can_fuse(graph.num_nodes, cells.num_cells, graph.dim, k)
    is_fusible &= all(value.ndim == 0 for value in wanted.values())
    if implementation is None:
        implementation = "pallas" if is_fusible and runs_triton() else "xla"
    check_choice("implementation", implementation, ("pallas", "xla"))
    if implementation == "pallas" and not is_fusible:
        raise ValueError(
            "implementation='pallas' needs first_pass='codes', "
            f"k up to {MAX_FUSED_K}, a width that 64 divides and filters of one value, got "
            f"{first_pass=}, {k=}, width {graph.dim} and filters of shapes "
            f"{ {name: value.shape for name, value in wanted.items()} }"
        )
    threshold = cosine_threshold(threshold)
    # Only what a search reads: handing over whole states takes the host longer than the search.
    lists = Lists(cells.centroids, cells.members, cells.overflow, cells.counts)
    return _search(
        graph.key, graph.codes, graph.is_live, fields, lists, queries, wanted, threshold,
        k=k, probes=probes, first_pass=first_pass, reproducible=reproducible,
        implementation=implementation,
    )  # fmt: skip


@functools.partial(
    jax.jit, static_argnames=("k", "probes", "first_pass", "reproducible", "implementation")
)
def _search(
    keys: Float[Array, "N D"],
    codes: Code,
    is_live: Bool[Array, "N"],
    fields: dict[str, Array],
    lists: Lists,
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
    keys, codes, queries = jax.lax.stop_gradient((keys, codes, queries))
    num_nodes, dim = keys.shape
    find = functools.partial(
        nearest_in_cells, keys=keys, code=codes, lists=lists, k=k, probes=probes,
        first_pass=first_pass, reproducible=reproducible, implementation=implementation,
    )  # fmt: skip

    def by_row(queries: Float[Array, "Q D"], wanted: dict[str, Array]) -> Hits:
        def accepts(row: Int[Array, "Q F"]) -> Bool[Array, "Q F"]:
            accepted = jnp.ones(row.shape, bool)
            for name, value in wanted.items():
                accepted &= FILTERS[name].compare(fields[name][row], value[:, None])
            return accepted

        return find(queries, is_candidate=is_live, accepts=accepts)

    if implementation == "pallas":
        candidates = shared_mask(is_live, wanted, fields)
        at_once = max(1, _PLACES_AT_ONCE // (lists.num_places(probes) + lists.members.shape[1]))
        hits = in_blocks(lambda q: find(q, is_candidate=candidates), (queries,), at_once)
    else:
        rows = queries.shape[0]
        wanted = {name: jnp.broadcast_to(value, (rows,)) for name, value in wanted.items()}
        at_once = max(1, _CODES_AT_ONCE // (lists.num_places(probes) * dim))
        hits = in_blocks(by_row, (queries, wanted), at_once)
    return hits if threshold is None else above(hits, reachable(threshold), num_nodes)
