"""Read a knowledge graph: search by cosine."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.graph._arguments import per_row, vectors
from moe_jax.graph.state import KnowledgeGraph
from moe_jax.ops.nearest import nearest
from moe_jax.ops.similarity import normalize
from moe_jax.ops.top_k import top_k

__all__ = ["Hits", "search"]


class Hits(NamedTuple):
    """What `search` found, best first.

    Attributes:
      ids: int32 [Q, k], node ids, N where there is no hit.
      scores: float32 [Q, k], cosines, 0 where there is no hit.
      is_valid: bool [Q, k].
    """

    ids: Int[Array, "Q k"]
    scores: Float[Array, "Q k"]
    is_valid: Bool[Array, "Q k"]


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
) -> Hits:
    """The k live nodes whose keys have the largest cosine to each query.

    Exact: the best k in order, ties to the lowest id, and, if `reproducible`, with scores that are
    the same bits however queries are batched or the graph is sharded. Each filter is one value for
    all queries or one per query. No gradient flows through.

    Args:
      graph: the graph.
      queries: [Q, D], of any length; a query that is zero, NaN or infinite has no hits.
      k: how many, between 1 and N.
      threshold: the least cosine of a hit; a scalar, which may be traced.
      expert_id: only nodes whose value came from this expert.
      kind: only nodes of this kind.
      as_of: only nodes created at or before this logical time.
      min_confidence: only nodes at least this confident.
      reproducible: score by `moe_jax.ops.exact_cosine`. False takes the scores of a plain float32
        matmul, which is faster for many queries; what differs by less than its rounding may then
        come in another order in another shape.

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
    queries = normalize(vectors("queries", queries, graph.dim))
    if not 1 <= k <= graph.num_nodes:
        raise ValueError(f"k must be between 1 and {graph.num_nodes} (node slots), got {k}")
    rows = queries.shape[0]
    is_candidate = graph.is_live[None, :] & jnp.any(queries != 0.0, axis=-1, keepdims=True)
    if expert_id is not None:
        wanted = per_row("expert_id", expert_id, rows, -1, jnp.int32)
        is_candidate &= graph.expert_id[None, :] == wanted[:, None]
    if kind is not None:
        wanted = per_row("kind", kind, rows, 0, jnp.int32)
        is_candidate &= graph.kind[None, :] == wanted[:, None]
    if as_of is not None:
        latest = per_row("as_of", as_of, rows, 0, jnp.int32)
        is_candidate &= graph.created[None, :] <= latest[:, None]
    if min_confidence is not None:
        least = per_row("min_confidence", min_confidence, rows, 0.0, jnp.float32)
        is_candidate &= graph.confidence[None, :] >= least[:, None]
    return _search(graph.key, queries, is_candidate, threshold, k=k, reproducible=reproducible)


@functools.partial(jax.jit, static_argnames=("k", "reproducible"))
def _search(
    keys: Float[Array, "N D"],
    queries: Float[Array, "Q D"],
    is_candidate: Bool[Array, "Q N"],
    threshold: ArrayLike,
    *,
    k: int,
    reproducible: bool,
) -> Hits:
    keys, queries = jax.lax.stop_gradient((keys, queries))
    if reproducible:
        ids, scores = nearest(queries, keys, is_candidate, k, floor=threshold)
    else:
        rough = jnp.matmul(queries, keys.T, precision=jax.lax.Precision.HIGHEST)
        scores, ids = top_k(jnp.where(is_candidate, rough, -jnp.inf), k)
    is_hit = (scores > -jnp.inf) & (scores >= threshold)
    return Hits(jnp.where(is_hit, ids, keys.shape[0]), jnp.where(is_hit, scores, 0.0), is_hit)
