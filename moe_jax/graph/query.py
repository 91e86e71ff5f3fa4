"""Read a knowledge graph: search by cosine."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float
from moe_jax.graph._arguments import cosine_threshold, reachable, vectors, whole_number
from moe_jax.graph._filters import FILTERS, given_filters, shared_mask
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.search import SCORES_AT_ONCE, Code, nearest
from moe_jax.ops.search import Hits as Hits

__all__ = ["Hits", "above", "search"]


def search(
    graph: KnowledgeGraph,
    queries: ArrayLike,
    k: int = 10,
    threshold: ArrayLike = -1.0,
    *,
    expert_id: ArrayLike | None = None,
    kind: ArrayLike | None = None,
    as_of: ArrayLike | None = None,
    min_confidence: ArrayLike | None = None,
    reproducible: bool = True,
    implementation: str | None = None,
) -> Hits:
    """The k live nodes whose keys have the largest cosine to each query.

    Exact: the best k in order, ties to the lowest id, and, if `reproducible`, with scores that are
    the same bits however queries are batched or the graph is sharded. Queries x nodes never has to
    fit in memory. Each filter is one value for all queries or one per query. No gradient flows
    through.

    Args:
      graph: the graph.
      queries: [Q, D], of any length; a query that is zero, NaN or infinite has no hits.
      k: how many, between 1 and N.
      threshold: the least cosine of a hit; a scalar, which may be traced.
      expert_id: only nodes whose value came from this expert.
      kind: only nodes of this kind.
      as_of: only nodes created at or before this logical time.
      min_confidence: only nodes at least this confident.
      reproducible: make certain of every last near-tie. False is faster: what differs from the
        k-th score by less than the first pass's rounding may be missed or, in another shape, come
        in another order: 1e-6, or about 1e-3 on GPUs and, among many nodes, on CPUs, where the
        first pass reads eight-bit codes and what it picks is scored in full.
      implementation: of the first pass, see `moe_jax.ops.nearest`.

    Returns:
      `Hits` of shape [Q, k].

    Raises:
      ValueError: if queries or a filter has the wrong shape, or k is out of range.

    Example:
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> hits = search(graph, jnp.array([[2.0, 1.0]]), k=3)
      >>> hits.ids.tolist(), hits.is_valid.tolist()
      ([[0, 1, 4]], [[True, True, False]])
    """
    queries = vectors("queries", queries, graph.dim)
    k = whole_number("k", k, 1, graph.num_nodes, " (node slots)")
    given = (expert_id, kind, as_of, min_confidence)
    filters, fields = given_filters(graph, queries.shape[0], given)
    threshold = cosine_threshold(threshold)
    # Only what a search reads: handing over the whole graph takes the host longer than the search.
    return _search(
        graph.key, graph.codes, graph.is_live, fields, queries, filters, threshold,
        k=k, reproducible=reproducible, implementation=implementation,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("k", "reproducible", "implementation"))
def _search(
    keys: Float[Array, "N D"],
    codes: Code,
    is_live: Bool[Array, "N"],
    fields: dict[str, Array],
    queries: Float[Array, "Q D"],
    filters: dict[str, Array],
    threshold: ArrayLike | None,
    *,
    k: int,
    reproducible: bool,
    implementation: str | None,
) -> Hits:
    keys, codes, queries = jax.lax.stop_gradient((keys, codes, queries))
    threshold = None if threshold is None else reachable(threshold)
    floor = -jnp.inf if threshold is None else threshold
    is_candidate = shared_mask(is_live, filters, fields)
    by_query = {name: wanted for name, wanted in filters.items() if wanted.ndim == 1}
    precision = "exact" if reproducible else "quick"

    def find(queries: Float[Array, "Q D"], by_query: dict[str, Array]) -> Hits:
        mask = is_candidate
        for name, wanted in by_query.items():
            accepted = FILTERS[name].compare(fields[name][None, :], wanted[:, None])
            mask = jnp.atleast_2d(mask) & accepted
        return nearest(
            queries, keys, mask, k, floor, code=codes, is_unit=False, precision=precision,
            implementation=implementation,
        )  # fmt: skip

    num_nodes = keys.shape[0]
    # A mask for each query takes the room of all their scores.
    most = max(1, SCORES_AT_ONCE // num_nodes) if by_query else queries.shape[0]
    hits = in_blocks(find, (queries, by_query), most)
    return hits if threshold is None else above(hits, threshold, num_nodes)


def above(hits: Hits, threshold: ArrayLike, num_nodes: int) -> Hits:
    """The hits that reach a threshold, the others being none."""
    is_hit = hits.is_valid & (hits.scores >= threshold)
    ids, scores = jnp.where(is_hit, hits.ids, num_nodes), jnp.where(is_hit, hits.scores, 0.0)
    return Hits(ids, scores, is_hit)
