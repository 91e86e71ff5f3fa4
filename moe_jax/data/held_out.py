"""The fixed held-out sample, as batches for a model and as bytes for the baselines."""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt8

from moe_jax.data.text import Corpus
from moe_jax.data.windows import Batch, check_sizes, gather_windows, hash64

__all__ = ["Sample", "held_out_batches", "held_out_bytes"]


class Sample(NamedTuple):
    """Held-out bytes of one window.

    Attributes:
      before: All bytes of the document before them, uint8 [m].
      predicted: The bytes to predict, uint8 [n].

    Example:
      >>> Sample(np.array([97], np.uint8), np.array([98], np.uint8)).predicted.tobytes()
      b'b'
    """

    before: UInt8[np.ndarray, "m"]
    predicted: UInt8[np.ndarray, "n"]


def held_out_batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, min_bytes: int = 65536, context: int = 0
) -> list[Batch]:
    """The held-out sample in batches of one shape; it is always the same.

    Each document is cut into spans of `seq_len - context` bytes. The sample takes one span of
    every held-out document, then more, in an order given by a hash, until it holds `min_bytes`
    or everything. No byte counts twice.

    Args:
      corpus: The corpus; only its held-out documents are used.
      batch_size: Windows in a batch, B. The last batch is filled up with padding.
      seq_len: Positions in a window, S.
      min_bytes: The least number of counted bytes, where the held-out documents have as many.
      context: Leading positions that are only context: each counted byte has at least as many
        bytes before it in its window, where its document has. `is_valid` is False there, so
        give the model `Batch.is_input` as its mask.

    Returns:
      The batches, in order of document and offset.

    Raises:
      ValueError: A size is less than 1, or `context` is not in [0, seq_len).

    Example:
      >>> from moe_jax.data.text import load_corpus
      >>> batches = held_out_batches(load_corpus(), batch_size=8, seq_len=256)
      >>> sum(int(b.is_valid.sum()) for b in batches) >= 65536
      True
    """
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    documents, starts, stops = _held_out_spans(corpus, seq_len, min_bytes, context)
    offsets = np.maximum(starts - context, 0)
    batches = []
    for i in range(0, len(documents), batch_size):
        rows = slice(i, i + batch_size)
        batch = gather_windows(
            corpus, documents[rows], offsets[rows], starts[rows], stops[rows], seq_len
        )
        batches.append(_fill_rows(batch, batch_size))
    return batches


def held_out_bytes(
    corpus: Corpus, *, seq_len: int, min_bytes: int = 65536, context: int = 0
) -> list[Sample]:
    """The bytes that count in `held_out_batches` of the same arguments, window by window.

    Args:
      corpus: The corpus.
      seq_len: As given to `held_out_batches`.
      min_bytes: As given to `held_out_batches`.
      context: As given to `held_out_batches`.

    Returns:
      For each window the predicted bytes, and all bytes of the document before them.

    Raises:
      ValueError: As `held_out_batches`.

    Example:
      >>> from moe_jax.data.text import load_corpus
      >>> samples = held_out_bytes(load_corpus(), seq_len=256)
      >>> sum(len(s.predicted) for s in samples) >= 65536
      True
    """
    spans = _held_out_spans(corpus, seq_len, min_bytes, context)
    return [
        Sample(corpus.document(d)[:start], corpus.document(d)[start:stop])
        for d, start, stop in zip(*spans, strict=True)
    ]


def _held_out_spans(
    corpus: Corpus, seq_len: int, min_bytes: int, context: int
) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Document, first byte and end of each sampled span."""
    check_sizes(seq_len=seq_len)
    if not 0 <= context < seq_len:
        raise ValueError(f"context must be in [0, seq_len={seq_len}), got {context}")
    span = seq_len - context
    ids = corpus.ids(held_out=True)
    counts = -(-corpus.sizes[ids] // span)
    documents = np.repeat(ids, counts)
    index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    # Keyed by name, so that other documents do not move a document's spans.
    keys = np.array([_name_key(corpus.names[i]) for i in ids], np.int64)
    ticket = hash64(0, np.repeat(keys, counts), index)
    by_ticket = np.lexsort((ticket, documents))
    is_extra = np.ones(len(documents), bool)
    is_extra[by_ticket[np.cumsum(counts) - counts]] = False
    order = np.lexsort((ticket, is_extra))
    starts = index * span
    stops = np.minimum(starts + span, corpus.sizes[documents])
    total = np.cumsum((stops - starts)[order])
    num = max(len(ids), int(np.searchsorted(total, min_bytes)) + 1)
    chosen = np.sort(order[:num])
    return documents[chosen], starts[chosen], stops[chosen]


def _name_key(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _fill_rows(batch: Batch, batch_size: int) -> Batch:
    missing = batch_size - len(batch.tokens)
    if not missing:
        return batch
    rows = [np.pad(a, ((0, missing), (0, 0))) for a in batch]
    rows[3][-missing:] = -1
    return Batch(*rows)
