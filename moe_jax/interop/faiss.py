"""Search a knowledge graph through faiss, on the host; faiss is imported when first used."""

import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moe_jax.graph import Hits, KnowledgeGraph
from moe_jax.graph._arguments import per_row, vectors, whole_number
from moe_jax.graph._filters import FILTERS
from moe_jax.interop._faiss_store import Options, Store
from moe_jax.interop._keys import fingerprint, rows
from moe_jax.ops import normalize

__all__ = ["FaissIndex", "SyncCounts"]

_SPARE = 8  # fetched beyond k, so that the first search settles most ties at the end
_COLUMNS = tuple(one.field for one in FILTERS.values())


class SyncCounts(NamedTuple):
    """What one `FaissIndex.sync` found changed.

    Attributes:
      added: nodes that had no key in the index.
      removed: nodes that are no longer live.
      replaced: nodes with another key: it moved, or the slot went to a new node.
      rebuilt: whether the index was built anew rather than changed.
    """

    added: int
    removed: int
    replaced: int
    rebuilt: bool


class FaissIndex:
    """A faiss index over a graph's live nodes, kept in step with the graph by `sync`.

    "flat" is exact up to the rounding of a float32 inner product. "ivf" (inverted lists over
    k-means cells) and "hnsw" (Malkov and Yashunin 2018) are approximate, and faster on many nodes.
    HNSW and GPU indexes cannot remove: dead rows are masked, and the index is built anew when more
    than a quarter are dead. Not for use inside jit.

    Args:
      graph: the graph; its live keys are copied.
      kind: "flat", "ivf" or "hnsw".
      gpu: keep the index on the GPU, where the installed faiss can; "flat" and "ivf" only.
      num_cells: k-means cells of "ivf"; by default 4 sqrt(nodes), with 39 nodes a cell at least.
      probes: cells of "ivf" that a query looks into.
      links: links of a node of "hnsw".
      search_width: candidates that a search of "hnsw" keeps at least (efSearch).

    Attributes:
      kind: as given.
      num_nodes: N of the graph.
      dim: D of the graph.
      lock: to be held by threads that sync and search one index.

    Raises:
      ImportError: faiss, or its GPU part where asked for, is not installed.
      ValueError: an argument is out of range, or "hnsw" is asked for on the GPU.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe_jax.graph import KnowledgeGraph, insert
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.array([[1.0, 0.0]]))
      >>> index = FaissIndex(graph)
      >>> graph, _ = insert(graph, jnp.array([[0.0, 1.0]]))
      >>> index.sync(graph)
      SyncCounts(added=1, removed=0, replaced=0, rebuilt=False)
      >>> index.search(jnp.array([[2.0, 1.0]]), k=3).ids.tolist()
      [[0, 1, 4]]
    """

    def __init__(
        self,
        graph: KnowledgeGraph,
        kind: str = "flat",
        *,
        gpu: bool = False,
        num_cells: int | None = None,
        probes: int = 8,
        links: int = 32,
        search_width: int = 64,
    ) -> None:
        options = Options(kind, gpu, num_cells, probes, links, search_width)
        self._start(Store(graph.dim, graph.num_nodes, options), graph)

    def _start(self, store: Store, graph: KnowledgeGraph) -> None:
        """Takes over what the store holds, and syncs."""
        self._store, self.kind = store, store.options.kind
        self.num_nodes, self.dim, self.lock = graph.num_nodes, graph.dim, threading.RLock()
        self._mark = np.zeros((graph.num_nodes, 2), np.uint32)
        self._is_stored = np.zeros(graph.num_nodes, bool)
        ids, keys = store.contents()
        if len(ids):
            self._mark[ids] = fingerprint(jnp.asarray(keys))
            self._is_stored[ids] = True
        self._seen: list[Any] = []
        self.sync(graph)

    @property
    def num_live(self) -> int:
        """The number of nodes that can be found."""
        return int(self._is_stored.sum())

    def sync(self, graph: KnowledgeGraph) -> SyncCounts:
        """Brings the index up to date with a graph; only keys that changed are written.

        A changed key shows in a fingerprint of its bits, taken on the device, whatever times its
        node carries; the chance to miss one is about 2**-32 at most. What filters read (expert,
        kind, time of creation, confidence) is copied too.

        Args:
          graph: any graph of the same size, usually a later state of the last one.

        Returns:
          How many nodes were added, removed and replaced.

        Raises:
          ValueError: the graph has another size.
        """
        if graph.key.shape != (self.num_nodes, self.dim):
            size = (self.num_nodes, self.dim)
            raise ValueError(f"graph must have keys of shape {size}, got {graph.key.shape}")
        now = [getattr(graph, name) for name in ("key", "is_live", *_COLUMNS)]
        if self._seen and all(old() is new for old, new in zip(self._seen, now, strict=True)):
            return SyncCounts(0, 0, 0, False)
        is_live, mark = np.array(graph.is_live), np.asarray(fingerprint(graph.key))
        is_other = np.any(mark != self._mark, axis=1)
        gone = np.flatnonzero(self._is_stored & (~is_live | is_other))
        new = np.flatnonzero(is_live & (~self._is_stored | is_other))
        rebuilt = self._store.is_worn(len(gone), len(new))
        if rebuilt:
            live = np.flatnonzero(is_live)
            self._store.build(live, rows(graph.key, live))
        else:
            self._store.remove(gone)
            self._store.add(new, rows(graph.key, new))
        self._mark, self._is_stored = mark, is_live
        self._columns = {name: np.array(getattr(graph, name)) for name in _COLUMNS}
        # A jax array never changes; others might, so they are compared every time.
        is_fixed = all(isinstance(field, jax.Array) for field in now)
        self._seen = [weakref.ref(field) for field in now] if is_fixed else []
        replaced = int(np.isin(gone, new).sum())
        return SyncCounts(len(new) - replaced, len(gone) - replaced, replaced, rebuilt)

    def search(
        self,
        queries: ArrayLike,
        k: int = 10,
        threshold: ArrayLike = -1.0,
        *,
        expert_id: ArrayLike | None = None,
        kind: ArrayLike | None = None,
        as_of: ArrayLike | None = None,
        min_confidence: ArrayLike | None = None,
    ) -> Hits:
        """Finds the k nearest nodes of each query, as `moe_jax.graph.search` does.

        Each filter is one value for all queries or one per query; queries that share their
        filters are searched together. Nodes whose scores from faiss are equal come lowest id
        first. An approximate kind may find fewer nodes than there are, above all under filters
        that few nodes pass.

        Args:
          queries: [Q, D], of any length; a query that is zero, NaN or infinite has no hits.
          k: how many, between 1 and N.
          threshold: the least cosine of a hit; a scalar.
          expert_id: only nodes whose value came from this expert.
          kind: only nodes of this kind.
          as_of: only nodes created at or before this logical time.
          min_confidence: only nodes at least this confident.

        Returns:
          Hits of shape [Q, k] on the graph as it was at the last sync.

        Raises:
          ValueError: queries or a filter has the wrong shape, or k is out of range.
        """
        unit = np.asarray(normalize(vectors("queries", queries, self.dim)))
        k = whole_number("k", k, 1, self.num_nodes, " (node slots)")
        given = {"expert_id": expert_id, "kind": kind, "as_of": as_of}
        given["min_confidence"] = min_confidence
        ids = np.full((len(unit), k), self.num_nodes, np.int32)
        scores = np.zeros((len(unit), k), np.float32)
        has_direction = np.flatnonzero(np.any(unit != 0.0, axis=1))
        for group, is_candidate in self._groups(given, len(unit), has_direction):
            found = self._ranked(unit[group], k, float(threshold), is_candidate)
            ids[group], scores[group] = found
        return Hits(jnp.asarray(ids), jnp.asarray(scores), jnp.asarray(ids < self.num_nodes))

    def save(self, path: str | Path) -> None:
        """Writes the index to a file that `faiss.read_index` reads too; its ids are node ids.

        Dead rows are left out, and an index on the GPU is written as one of the host. The file
        appears whole or not at all.

        Args:
          path: the file; replaced if it exists.
        """
        self._store.save(path)

    @classmethod
    def load(cls, path: str | Path, graph: KnowledgeGraph, **options: Any) -> "FaissIndex":
        """Reads an index written by `save` and brings it up to date with a graph.

        Args:
          path: the file.
          graph: the graph as it is now, with no fewer slots than it had.
          **options: those of the constructor, without kind.

        Returns:
          The index; its cells and links are those of the file until it is built anew.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it holds another kind of index, or a width or ids that the graph lacks.

        Example:
          >>> import tempfile, jax.numpy as jnp
          >>> from moe_jax.graph import KnowledgeGraph, insert
          >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     FaissIndex(graph, "hnsw").save(f"{folder}/index")
          ...     index = FaissIndex.load(f"{folder}/index", graph)
          >>> index.kind, index.search(jnp.eye(2), k=1).ids.tolist()
          ('hnsw', [[0], [1]])
        """
        store = Store.read(path, graph.num_nodes, options)
        if store.dim != graph.dim:
            raise ValueError(f"graph must have keys of width {store.dim}, got {graph.dim}")
        index = cls.__new__(cls)
        index._start(store, graph)
        return index

    def _groups(
        self, given: dict[str, ArrayLike | None], num_queries: int, queries: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """(queries, nodes that pass or None for all) for each combination of filters."""
        wanted = {}
        for name, value in given.items():
            if value is not None:
                column = per_row(name, value, num_queries, 0, FILTERS[name].dtype)
                wanted[name] = np.asarray(column)[queries]
        if not len(queries):
            return
        if not wanted:
            yield queries, None
            return
        table = np.stack([column.astype(np.float64) for column in wanted.values()], axis=1)
        _, first, group = np.unique(table, axis=0, return_index=True, return_inverse=True)
        for number, row in enumerate(first):
            is_candidate = self._is_stored.copy()
            for name, column in wanted.items():
                field = self._columns[FILTERS[name].field]
                is_candidate &= FILTERS[name].compare(field, column[row])
            if is_candidate.any():
                yield queries[group.ravel() == number], is_candidate

    def _ranked(
        self, unit: np.ndarray, k: int, threshold: float, is_candidate: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, scores), each [Q, k], by score and then id; N and 0 where there is no hit.

        Fetches more until what was left out scores less than the last one wanted, or than the
        threshold.
        """
        if threshold <= -1.0:
            threshold = -np.inf  # opposite vectors may be rounded to less than -1
        most = self._store.num_rows
        fetch = min(most, k + _SPARE)
        ids = np.full((len(unit), k), self.num_nodes)
        scores = np.full((len(unit), k), -np.inf, np.float32)
        while fetch:
            found, at, last = self._store.search(unit, fetch, is_candidate)
            order = np.lexsort((at, -found), axis=-1)[:, :k]
            width = order.shape[1]
            scores[:, :width] = np.take_along_axis(found, order, axis=1)
            ids[:, :width] = np.take_along_axis(at, order, axis=1)
            is_settled = (last < np.maximum(scores[:, -1], threshold)) | (last == -np.inf)
            if fetch == most or is_settled.all():
                break
            fetch = min(most, 2 * fetch)
        is_hit = (scores > -np.inf) & (scores >= threshold)
        return np.where(is_hit, ids, self.num_nodes), np.where(is_hit, scores, 0.0)
