"""Asking the graph what it knows about the sequences of a batch."""

import functools
import weakref
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import graph as kg
from moe_jax._types import Array, Bool, Float, Variables
from moe_jax.graph import Hits, KnowledgeGraph
from moe_jax.system.output import MoEOutput


@functools.partial(jax.jit, static_argnums=0)
def infer(
    system: nn.Module,
    variables: Variables,
    x: Float[Array, "B S D"],
    graph: KnowledgeGraph,
    is_valid: Bool[Array, "B S"] | None,
) -> MoEOutput:
    """The call of a system, compiled once per shape."""
    return system.apply(variables, x, graph, is_valid=is_valid)


def search_reports(
    graph: KnowledgeGraph,
    output: MoEOutput,
    k: int,
    *,
    threshold: float = -1.0,
    index: Any = None,
) -> Hits:
    """Searches the graph for every report of a batch and merges the hits per sequence.

    Args:
        graph: the graph to search.
        output: of a system whose `report_scope` is "sequence".
        k: nodes wanted per sequence.
        threshold: least cosine of a hit.
        index: a `moe_jax.interop.faiss.FaissIndex` to bring up to date with the graph and search
            on the host instead; not inside jit.

    Returns:
        Hits of shape [B, k], each node at most once per sequence.

    Raises:
        ValueError: the reports are not one per (sequence, expert).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax import MoESystem
        >>> from moe_jax.config import tiny
        >>> system, x = MoESystem(tiny()), jnp.ones((2, 16, 32))
        >>> variables = jax.jit(system.init)(jax.random.key(0), x)
        >>> output = jax.jit(system.apply)(variables, x)
        >>> bool(search_reports(system.create_graph(), output, k=3).is_valid.any())
        False
    """
    batch = output.output.shape[0]
    num_experts = output.stats.load.shape[0]
    if output.reports is None or output.reports.summary.shape[0] != batch * num_experts:
        raise ValueError('report_scope must be "sequence" to query by sequence')
    keys = jnp.where(output.reports.is_valid[:, None], output.proposals.key, 0.0)
    if index is None:
        hits = kg.search(graph, keys, k, threshold)
    else:
        with index.lock:
            index.sync(graph)
            hits = index.search(keys, k, threshold)
    per_sequence = jax.tree.map(lambda a: a.reshape(batch, -1), hits)
    return _best_distinct(per_sequence, k, graph.num_nodes)


_faiss_indexes: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def faiss_index(system: nn.Module, graph: KnowledgeGraph) -> Any:
    """The index of a system, new when there is none yet or the graph has another size."""
    from moe_jax.interop.faiss import FaissIndex

    index = _faiss_indexes.get(system)
    if index is None or (index.num_nodes, index.dim) != (graph.num_nodes, graph.dim):
        index = _faiss_indexes[system] = FaissIndex(graph)
    return index


@functools.partial(jax.jit, static_argnums=(1, 2))
def _best_distinct(hits: Hits, k: int, nowhere: int) -> Hits:
    """The k best hits of each row, of each node only the best."""
    ids, scores = hits.ids, jnp.where(hits.is_valid, hits.scores, -jnp.inf)
    order = jnp.argsort(-scores, axis=1, stable=True)
    ids = jnp.take_along_axis(ids, order, axis=1)
    scores = jnp.take_along_axis(scores, order, axis=1)
    is_same = ids[:, :, None] == ids[:, None, :]
    is_repeat = jnp.any(is_same & jnp.tri(ids.shape[1], k=-1, dtype=bool)[None], axis=2)
    scores, at = jax.lax.top_k(jnp.where(is_repeat, -jnp.inf, scores), k)
    is_valid = scores > -jnp.inf
    ids = jnp.where(is_valid, jnp.take_along_axis(ids, at, axis=1), nowhere)
    return Hits(ids=ids, scores=jnp.where(is_valid, scores, 0.0), is_valid=is_valid)
