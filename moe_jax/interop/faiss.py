"""Search a knowledge graph through faiss, on the host; faiss is imported when first used."""

import jax.numpy as jnp
import numpy as np

from moe_jax._types import Array, Float
from moe_jax.graph import Hits, KnowledgeGraph
from moe_jax.ops import normalize


class FaissIndex:
    """An exact faiss index over a graph's live nodes, as they were when it was built.

    Args:
        graph: the graph; its live keys are copied to the host.

    Raises:
        ImportError: faiss is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.graph import KnowledgeGraph, insert
        >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
        >>> FaissIndex(graph).search(jnp.array([[2.0, 1.0]]), k=1).ids.tolist()
        [[0]]
    """

    def __init__(self, graph: KnowledgeGraph) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError(
                "faiss is not installed: pip install 'moe-jax[cpu]' or 'moe-jax[cuda12]'"
            ) from error
        self._nowhere = graph.num_nodes
        self._ids = np.flatnonzero(np.asarray(graph.is_live)).astype(np.int32)
        self._index = faiss.IndexFlatIP(graph.dim)
        self._index.add(np.ascontiguousarray(np.asarray(graph.key)[self._ids]))

    def search(self, queries: Float[Array, "Q D"], k: int = 10, threshold: float = -1.0) -> Hits:
        """Finds the k nearest nodes of each query, as `moe_jax.graph.search` does.

        Args:
            queries: [Q, D], normalised here; a zero query has no hits.
            k: nodes wanted.
            threshold: least cosine of a hit.

        Returns:
            Hits of shape [Q, k].
        """
        unit = np.asarray(normalize(queries))
        scores, rows = self._index.search(unit, k)
        is_valid = (rows >= 0) & (scores >= threshold) & np.any(unit != 0, axis=1, keepdims=True)
        ids = self._ids[np.maximum(rows, 0)] if len(self._ids) else np.zeros_like(rows)
        return Hits(
            ids=jnp.asarray(np.where(is_valid, ids, self._nowhere), jnp.int32),
            scores=jnp.asarray(np.where(is_valid, scores, 0.0), jnp.float32),
            is_valid=jnp.asarray(is_valid),
        )
