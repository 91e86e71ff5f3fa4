"""Reading whole documents from front to back with a token memory."""

import hashlib
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax._types import Array, Bool, Variables
from moe_jax.data import Batch, Corpus, stream_batches
from moe_jax.graph import KnowledgeGraph
from moe_jax.lm import MoELanguageModel
from moe_jax.memory import ContextVectors, Evidence, MemoryInterpolation, Projection
from moe_jax.training.stream import (
    StreamSums,
    TokenReader,
    make_hidden_step,
    make_stream_step,
)

__all__ = [
    "Reading",
    "StreamReader",
    "documents_by_name",
    "first_documents",
    "put_on_one_device",
]


class Reading(NamedTuple):
    """What one pass over a text gave.

    Attributes:
        sums: over the text, on the host.
        evidence: [T] of every position.
        is_counted: [T], which positions count.
        seconds: wall time.
    """

    sums: StreamSums
    evidence: Evidence
    is_counted: Bool[Array, "T"]
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        """With the memory."""
        return self.sums.nats / (self.sums.count * math.log(2))

    @property
    def without(self) -> float:
        """Bits per byte of the same targets by the model alone."""
        return self.sums.nats_without / (self.sums.count * math.log(2))


class StreamReader:
    """One model that reads documents with any token memory; compiled once per memory's size.

    Args:
        model: the model.
        params: of the model.
        corpus: the text.
        reports: the graph of a model that reads one itself.
        vectors: what a position looks like to a memory.
        interpolation: how the distributions are mixed.
        seq_len: positions in a window.
        context: of each window so many positions only give context.
        rows: documents read side by side.
        k: seen positions that each position reads.
        policy: of a full memory, see `moe_jax.memory.write_tokens`.

    Example:
        >>> from moe_jax.config import smallest_run
        >>> from moe_jax.data import load_corpus
        >>> model, corpus = MoELanguageModel(smallest_run().model), load_corpus()
        >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 16), int))["params"]
        >>> how = {"seq_len": 32, "context": 8, "rows": 2, "policy": "reject"}
        >>> reader = StreamReader(model, params, corpus, vectors=ContextVectors(32), **how)
        >>> batches = reader.batches([0, 1], max_document_bytes=48)
        >>> projection = reader.fit_projection(batches)
        >>> memory, gate = reader.empty(128), reader.any_gate
        >>> found = reader.read(batches, memory, TokenReader(projection, gate))
        >>> float(found.sums.count), found.is_counted.shape
        (96.0, (96,))
    """

    def __init__(
        self,
        model: MoELanguageModel,
        params: Variables,
        corpus: Corpus,
        *,
        reports: KnowledgeGraph | None = None,
        vectors: ContextVectors,
        interpolation: MemoryInterpolation | None = None,
        seq_len: int,
        context: int,
        rows: int = 8,
        k: int = 32,
        policy: str = "oldest",
    ) -> None:
        self.params, self.reports = put_on_one_device((params, reports))
        self.corpus, self.vectors = corpus, vectors
        self.seq_len, self.context, self.rows = seq_len, context, rows
        self.positions = rows * (seq_len - context)
        """Positions of a batch that count, at most."""
        gate = interpolation or MemoryInterpolation()
        nothing = (jnp.zeros((1, 1), t) for t in (float, float, int, bool))
        self.any_gate: Variables = jax.jit(gate.init)(jax.random.key(0), *nothing)
        self.hidden_step = make_hidden_step(model)
        self._step = make_stream_step(
            model, vectors, gate, k=k, span=seq_len - context, policy=policy
        )

    def batches(
        self, documents: Sequence[int], max_document_bytes: int | None = None
    ) -> list[Batch]:
        """Windows of documents, on the device; see `moe_jax.data.stream_batches`."""
        found = stream_batches(
            self.corpus,
            documents,
            batch_size=self.rows,
            seq_len=self.seq_len,
            context=self.context,
            max_document_bytes=max_document_bytes,
        )
        return put_on_one_device(found)

    def fit_projection(self, batches: Sequence[Batch]) -> Projection:
        """Fits the projection of hidden states, to training text."""
        hidden = []
        for batch in batches:
            states, _ = self.hidden_step(self.params, batch, self.reports)
            hidden.append(np.asarray(states)[np.asarray(batch.is_valid)])
        return put_on_one_device(self.vectors.fit(jnp.asarray(np.concatenate(hidden))))

    def empty(self, size: int) -> KnowledgeGraph:
        """A memory of so many nodes, none live."""
        memory = KnowledgeGraph.create(size, self.vectors.dim, num_edge_slots=1)
        return put_on_one_device(memory)

    def written(
        self, batches: Sequence[Batch], memory: KnowledgeGraph, reader: TokenReader
    ) -> KnowledgeGraph:
        """A memory, which is donated, after a text."""
        reader = put_on_one_device(reader)
        for batch in batches:
            memory, *_ = self._call(reader, memory, batch)
        return memory

    def read(
        self,
        batches: Sequence[Batch],
        memory: KnowledgeGraph,
        reader: TokenReader,
        *,
        is_writing: bool = True,
        is_shuffled: bool = False,
    ) -> Reading:
        """Reads a text with a copy of a memory.

        Args:
            batches: of the text.
            memory: before the text.
            reader: the projection and the gate.
            is_writing: whether the memory learns what it has seen of the text.
            is_shuffled: read the symbols of other nodes.

        Returns:
            What it cost, and the evidence of every position.
        """
        found, reader = [], put_on_one_device(reader)
        memory = jax.block_until_ready(jax.tree.map(jnp.copy, memory))
        began = time.perf_counter()
        for batch in batches:
            how = {"is_writing": is_writing, "is_shuffled": is_shuffled}
            memory, *rest = self._call(reader, memory, batch, **how)
            found.append(rest)
        jax.block_until_ready((memory, found[-1][0]))
        seconds = time.perf_counter() - began
        # End to end on the host, as XLA takes long to compile the joining of so many arrays.
        sums, evidence, counted = zip(*jax.device_get(found), strict=True)
        total = jax.tree.map(lambda *a: float(sum(a)), *sums)
        joined = jax.tree.map(lambda *a: np.concatenate(a), *evidence)
        return Reading(total, *put_on_one_device((joined, np.concatenate(counted))), seconds)

    def _call(
        self,
        reader: TokenReader,
        memory: KnowledgeGraph,
        batch: Batch,
        is_writing: bool = True,
        is_shuffled: bool = False,
    ) -> tuple[KnowledgeGraph, StreamSums, Evidence, Bool[Array, "Q"]]:
        how = {"is_writing": is_writing, "is_shuffled": is_shuffled}
        return self._step(self.params, reader, memory, batch, reports=self.reports, **how)


def documents_by_name(corpus: Corpus, *, held_out: bool) -> list[int]:
    """Documents in an order that depends on their names alone.

    Args:
        corpus: the text.
        held_out: the held-out documents, or those to learn from.

    Returns:
        Their ids.

    Example:
        >>> from moe_jax.data import load_corpus
        >>> corpus = load_corpus()
        >>> len(documents_by_name(corpus, held_out=True)) == len(corpus.ids(held_out=True))
        True
    """
    names, ids = corpus.names, corpus.ids(held_out=held_out).tolist()
    return sorted(ids, key=lambda i: hashlib.blake2b(names[i].encode()).digest())


def first_documents(
    corpus: Corpus, documents: Sequence[int], total: int, max_document_bytes: int
) -> list[int]:
    """As many documents as hold `total` bytes, counting only the first bytes of each.

    Args:
        corpus: the text.
        documents: ids.
        total: bytes wanted.
        max_document_bytes: bytes of a document that count.

    Returns:
        The first of the documents; all of them where they hold less.

    Example:
        >>> from moe_jax.data import load_corpus
        >>> first_documents(load_corpus(), [3, 4, 5, 6], 100, 50)
        [3, 4]
    """
    sizes = np.minimum(corpus.sizes[list(documents)], max_document_bytes)
    return list(documents[: int(np.searchsorted(np.cumsum(sizes), total)) + 1])


def put_on_one_device(tree: Any) -> Any:
    """Commits everything to one device, as what is partly committed compiles twice."""
    return jax.device_put(tree, jax.devices()[0])
