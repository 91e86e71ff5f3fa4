"""Keys by node id in a faiss index: build, add, remove, search, read and write."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Options", "Store"]

# The index is built anew when so many of its rows are dead, and cells when nodes are so many
# times those that they were trained on.
_DEAD_SHARE, _GROWTH = 0.25, 4
_BUILD_WIDTH = 80  # candidates that HNSW keeps while it places a node (efConstruction)
_GPU_MOST = 2048  # rows that faiss lets a search on the GPU return
_PER_CELL = 39  # nodes a cell below which faiss thinks k-means ill-founded


class Options(NamedTuple):
    """How to build and search an index; see `moe_jax.interop.faiss.FaissIndex`."""

    kind: str = "flat"
    gpu: bool = False
    num_cells: int | None = None
    probes: int = 8
    links: int = 32
    search_width: int = 64

    def check(self) -> None:
        """ValueError where an option is out of range."""
        if self.kind not in ("flat", "ivf", "hnsw"):
            raise ValueError(f"kind must be one of 'flat', 'ivf', 'hnsw', got {self.kind!r}")
        if self.gpu and self.kind == "hnsw":
            raise ValueError("kind must be 'flat' or 'ivf' with gpu=True, got 'hnsw'")
        least = {"num_cells": 1, "probes": 1, "links": 2, "search_width": 1}
        for name, size in least.items():
            value = getattr(self, name)
            if value is not None and value < size:
                raise ValueError(f"{name} must be at least {size}, got {value}")


class Store:
    """A faiss index whose ids are node ids; dead rows carry the id N, `nowhere`."""

    def __init__(self, dim: int, nowhere: int, options: Options) -> None:
        options.check()
        self.faiss = import_faiss(options.gpu)
        self.dim, self.nowhere, self.options = dim, nowhere, options
        self._resources = self.faiss.StandardGpuResources() if options.gpu else None
        self._can_remove = options.kind != "hnsw" and not options.gpu
        self.build(np.zeros(0, np.int64), np.zeros((0, dim), np.float32))

    @property
    def num_rows(self) -> int:
        """Rows of the index, dead ones included."""
        return self._index.ntotal

    def build(self, ids: np.ndarray, keys: np.ndarray) -> None:
        """Starts anew with these keys."""
        self._index = self._new(keys, gpu=self.options.gpu)
        self._num_dead, self._num_trained = 0, len(ids)
        self.add(ids, keys)

    def is_worn(self, num_gone: int, num_new: int) -> bool:
        """Whether to build anew rather than remove and add so many rows."""
        if not self._can_remove:
            dead, rows = self._num_dead + num_gone, self.num_rows + num_new
            if dead > _DEAD_SHARE * rows:
                return True
        live = self.num_rows - self._num_dead - num_gone + num_new
        return self.options.kind == "ivf" and live > _GROWTH * self._num_trained

    def add(self, ids: np.ndarray, keys: np.ndarray) -> None:
        """Adds keys of nodes that have none."""
        if len(ids):
            self._index.add_with_ids(np.ascontiguousarray(keys, np.float32), ids.astype(np.int64))

    def remove(self, ids: np.ndarray) -> None:
        """Removes the keys of nodes, or marks their rows as dead."""
        if self._can_remove and len(ids):
            self._index.remove_ids(self.faiss.IDSelectorBatch(ids.astype(np.int64)))
        elif len(ids):
            id_map = self._index.id_map
            row_ids = self.faiss.rev_swig_ptr(id_map.data(), id_map.size())
            row_ids[np.isin(row_ids, ids)] = self.nowhere
            self._num_dead += len(ids)

    def search(
        self, queries: np.ndarray, fetch: int, is_candidate: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(scores, ids, last scores): up to `fetch` rows of each query, best first.

        `is_candidate` is a bool for each node, or None for all. Rows that are dead, no candidate
        or missing have score -inf and id `nowhere`; the last score is that of the last row
        that faiss returned, -inf where it has no more.
        """
        params, mask = None, None
        if is_candidate is not None or self._num_dead:
            mask = np.ones(self.nowhere, bool) if is_candidate is None else is_candidate
            mask = np.append(mask, False)
        if not self.options.gpu:
            params = self._parameters(fetch, mask)
        if self.options.gpu and fetch > _GPU_MOST:
            scores, at = self._base_on_host().search(np.ascontiguousarray(queries), fetch)
            ids = np.where(at < 0, -1, self.faiss.vector_to_array(self._index.id_map)[at])
        else:
            scores, ids = self._index.search(np.ascontiguousarray(queries), fetch, params=params)
        is_row = ids >= 0
        last = np.where(is_row[:, -1], scores[:, -1], -np.inf)
        if self.options.gpu and mask is not None:
            is_row &= mask[np.where(is_row, ids, self.nowhere)]
        return np.where(is_row, scores, -np.inf), np.where(is_row, ids, self.nowhere), last

    def contents(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids [L], keys [L, D]) of the rows that are not dead."""
        index = self._index
        if self.options.gpu:
            order, keys = _base_contents(self.faiss, self._base_on_host())
            ids = self.faiss.vector_to_array(index.id_map)[order]
        else:
            ids, keys = _contents(self.faiss, index)
        is_live = ids != self.nowhere
        return ids[is_live], keys[is_live]

    def save(self, path: str | Path) -> None:
        """Writes the live rows to a file, which appears whole or not at all."""
        index = self._index
        if self.options.gpu or self._num_dead:
            ids, keys = self.contents()
            index = self._new(keys, gpu=False)
            index.add_with_ids(np.ascontiguousarray(keys), ids.astype(np.int64))
        part = f"{os.fspath(path)}.part"
        self.faiss.write_index(index, part)
        os.replace(part, path)

    @classmethod
    def read(cls, path: str | Path, nowhere: int, options: dict[str, Any]) -> "Store":
        """Reads what `save` wrote, whatever graph it was of."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no index at {path}")
        faiss = import_faiss(False)
        index = faiss.read_index(os.fspath(path))
        ids, keys = _contents(faiss, index)
        if np.any((ids < 0) | (ids >= nowhere)) or len(np.unique(ids)) < len(ids):
            raise ValueError(f"{path} must hold distinct ids below {nowhere}, the graph's slots")
        store = cls(index.d, nowhere, Options(kind=_kind(faiss, index), **options))
        if store.options.gpu:
            store.build(ids, keys)
        else:
            store._index, store._num_trained = index, len(ids)
        return store

    def _base_on_host(self) -> Any:
        """A copy of what an index on the GPU holds; its ids are row numbers."""
        return self.faiss.index_gpu_to_cpu(self.faiss.downcast_index(self._index.index))

    def _new(self, keys: np.ndarray, *, gpu: bool) -> Any:
        """An empty index, trained on the keys if its kind needs that and there are any."""
        faiss, metric = self.faiss, self.faiss.METRIC_INNER_PRODUCT
        if self.options.kind == "hnsw":
            index = faiss.IndexHNSWFlat(self.dim, self.options.links, metric)
            index.hnsw.efConstruction = _BUILD_WIDTH
        elif self.options.kind == "flat":
            index = faiss.IndexFlatIP(self.dim)
        else:
            cells = self.options.num_cells or min(4 * int(len(keys) ** 0.5), len(keys) // _PER_CELL)
            cells = max(1, min(cells, len(keys)))
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(self.dim), self.dim, cells, metric)
            index.cp.min_points_per_centroid = 1  # else faiss warns on the console
            index.nprobe = self.options.probes
        if gpu:
            index = faiss.index_cpu_to_gpu(self._resources, 0, index)
        if self.options.kind == "ivf" and len(keys):
            index.train(np.ascontiguousarray(keys))
        # Inverted lists hold ids themselves, and their removal does not keep an outer map in step.
        return index if self.options.kind == "ivf" and not gpu else faiss.IndexIDMap(index)

    def _parameters(self, fetch: int, mask: np.ndarray | None) -> Any:
        faiss, options = self.faiss, {}
        if mask is not None:
            options["sel"] = faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
        if self.options.kind == "flat":
            return faiss.SearchParameters(**options) if options else None
        if self.options.kind == "ivf":
            return faiss.SearchParametersIVF(nprobe=self.options.probes, **options)
        width = max(self.options.search_width, fetch)
        return faiss.SearchParametersHNSW(efSearch=width, **options)


def import_faiss(gpu: bool) -> Any:
    """The faiss module; ImportError says how to get it."""
    try:
        import faiss
    except ImportError as error:
        message = "faiss is not installed: pip install 'moe-jax[cpu]' or 'moe-jax[cuda12]'"
        raise ImportError(message) from error
    if gpu and not hasattr(faiss, "StandardGpuResources"):
        raise ImportError("the faiss installed here has no GPU part: pip install 'moe-jax[cuda12]'")
    return faiss


def _kind(faiss: Any, index: Any) -> str:
    base = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    kinds = {"hnsw": faiss.IndexHNSWFlat, "flat": faiss.IndexFlat, "ivf": faiss.IndexIVFFlat}
    for kind, known in kinds.items():
        is_nested = (base is index) == (kind == "ivf")
        if isinstance(base, known) and is_nested and base.metric_type == faiss.METRIC_INNER_PRODUCT:
            return kind
    raise ValueError(f"the file must hold an index that was saved here, got {type(base).__name__}")


def _contents(faiss: Any, index: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ids, keys) of all rows of an index of the host."""
    if _kind(faiss, index) == "ivf":
        return _base_contents(faiss, index)
    rows, keys = _base_contents(faiss, faiss.downcast_index(index.index))
    return faiss.vector_to_array(index.id_map)[rows], keys


def _base_contents(faiss: Any, base: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(base, faiss.IndexIVFFlat):
        keys = base.reconstruct_n(0, base.ntotal) if base.ntotal else np.zeros((0, base.d), "f4")
        return np.arange(base.ntotal), keys
    lists, ids, keys = base.invlists, [np.zeros(0, np.int64)], [np.zeros((0, base.d), np.float32)]
    for cell in range(base.nlist):
        size = lists.list_size(cell)
        if size:
            codes = faiss.rev_swig_ptr(lists.get_codes(cell), size * base.d * 4)
            ids.append(faiss.rev_swig_ptr(lists.get_ids(cell), size).copy())
            keys.append(codes.view(np.float32).reshape(size, base.d).copy())
    return np.concatenate(ids), np.concatenate(keys)
