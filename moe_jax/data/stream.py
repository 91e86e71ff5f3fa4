"""Whole documents read from front to back, in rows side by side."""

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np

from moe_jax.data.text import Corpus
from moe_jax.data.windows import Batch, check_sizes, gather_windows

__all__ = ["stream_batches"]


def stream_batches(
    corpus: Corpus,
    documents: Sequence[SupportsIndex],
    *,
    batch_size: int,
    seq_len: int,
    context: int = 0,
    max_document_bytes: int | None = None,
) -> list[Batch]:
    """Cuts documents into consecutive windows, one of each row after the other.

    A document goes to the row with the fewest bytes so far, the lowest among equals, and follows
    the documents already there. Each of its bytes counts once, in order. So what row b counts in
    batch i comes before what it counts in batch i + 1, and a memory may learn from the one to
    predict the other.

    Args:
        corpus: the corpus.
        documents: ids, in the order in which they are dealt out.
        batch_size: rows, B.
        seq_len: positions in a window, S; at most `seq_len - context` of them count.
        context: positions before the counted ones, where the document has as many.
        max_document_bytes: read only so many bytes of each document.

    Returns:
        The batches; rows that are out of text hold padding.

    Raises:
        ValueError: a size is less than 1, `context` is not in [0, seq_len), or there is no
            document.

    Example:
        >>> from moe_jax.data.text import load_corpus
        >>> first, *_ = stream_batches(load_corpus(), [0], batch_size=2, seq_len=8, context=4)
        >>> first.is_valid.sum(axis=1).tolist()
        [4, 0]
    """
    check_sizes(batch_size=batch_size, seq_len=seq_len)
    if not 0 <= context < seq_len:
        raise ValueError(f"context must be in [0, seq_len={seq_len}), got {context}")
    if max_document_bytes is not None and max_document_bytes < 1:
        raise ValueError(f"max_document_bytes must be at least 1, got {max_document_bytes}")
    if not len(documents):
        raise ValueError("documents must hold at least one id, got none")
    span = seq_len - context
    rows: list[list[tuple[int, int, int]]] = [[] for _ in range(batch_size)]
    filled = np.zeros(batch_size, np.int64)
    for document in documents:
        index = int(document)
        size = int(corpus.sizes[index])
        size = min(size, max_document_bytes or size)
        row = int(np.argmin(filled))
        filled[row] += size
        rows[row] += [(index, s, min(s + span, size)) for s in range(0, size, span)]
    length = max(map(len, rows))
    # An empty span of document 0 is a window of padding.
    table = np.array([row + [(0, 0, 0)] * (length - len(row)) for row in rows], np.int64)
    batches = []
    for document, start, stop in table.transpose(1, 2, 0):
        offset = np.maximum(start - context, 0)
        batch = gather_windows(corpus, document, offset, start, stop, seq_len)
        batch.source[stop == 0] = -1
        batches.append(batch)
    return batches
