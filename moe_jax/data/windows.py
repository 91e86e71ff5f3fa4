"""Windows over a corpus, and the shuffled training batches made of them.

A window predicts consecutive bytes of one document. Its first input is the byte before them, or
`BOS` at the start of the document, so that every byte can be predicted and none is predicted
from another file.
"""

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Array, Bool, Int, Int64, Shaped, UInt64

from moe_jax.data.text import Corpus

__all__ = [
    "BOS",
    "VOCAB_SIZE",
    "Batch",
    "TrainBatches",
    "check_sizes",
    "gather_windows",
    "hash64",
    "training_batches",
]

BOS = 256
"""The input symbol before the first byte of a document."""

VOCAB_SIZE = 257
"""Input symbols: 256 bytes and `BOS`. Targets are bytes, below 256."""

_PAD = 0


class Batch(NamedTuple):
    """B windows of S positions.

    Attributes:
      tokens: Inputs, int32 [B,S]; `tokens[b, s]` is the byte before `targets[b, s]`, or `BOS`.
      targets: Bytes to predict, int32 [B,S].
      is_valid: Targets that count, bool [B,S]; False on padding and on leading context.
      source: Document id and byte offset of the first *target*, int32 [B,2]: target `s` is byte
        `source[b, 1] + s` of document `source[b, 0]`. Rows that are all padding hold -1.

    Example:
      >>> ones = np.ones((2, 4), np.int32)
      >>> batch = Batch(ones, ones, ones == 1, np.zeros((2, 2), np.int32))
      >>> bool(batch.is_input.all())
      True
    """

    tokens: Shaped[np.ndarray | Array, "B S"]
    targets: Shaped[np.ndarray | Array, "B S"]
    is_valid: Shaped[np.ndarray | Array, "B S"]
    source: Shaped[np.ndarray | Array, "B 2"]

    @property
    def is_input(self) -> Bool[np.ndarray | Array, "B S"]:
        """Inputs that are no padding, bool [B,S]: the mask to give a model.

        It differs from `is_valid` where a window leads with context, which a model must read
        though its targets do not count. Works on numpy and on JAX arrays, also inside jit.
        """
        # Context only leads and padding only trails, so an input is real when it or anything
        # after it counts.
        return self.is_valid[:, ::-1].cumsum(axis=1)[:, ::-1] > 0


@dataclass(frozen=True, eq=False)
class TrainBatches:
    """Endless shuffled training batches, by step. Made by `training_batches`.

    `batches[step]` is a pure function of the corpus, the seed and the step: going on from step
    n after a restart needs nothing but n. Each epoch visits every window once in a new order,
    and lays the windows of each document at new offsets such that every byte is a target.

    Attributes:
      corpus: The corpus.
      batch_size: B.
      seq_len: S.
      seed: Seed of the order and of the offsets.
      num_windows: Windows in one epoch; step n starts at window n*B of the endless sequence.
    """

    corpus: Corpus
    batch_size: int
    seq_len: int
    seed: int
    num_windows: int
    # The first window of each training document among num_windows, and the documents' ids.
    _first_window: Int64[np.ndarray, "n"]
    _documents: Int64[np.ndarray, "n"]
    _order: Any

    def __getitem__(self, step: SupportsIndex) -> Batch:
        """The batch of a step, counted from 0; a negative step raises IndexError."""
        step = operator.index(step)
        if step < 0:
            raise IndexError(f"step must be at least 0, got {step}")
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        windows = np.array([self._order[i] for i in positions], np.int64)
        epochs = np.array(positions, np.int64) // self.num_windows
        rank = np.searchsorted(self._first_window, windows, side="right") - 1
        documents = self._documents[rank]
        offsets = self._offsets(documents, windows - self._first_window[rank], epochs)
        sizes = self.corpus.sizes[documents]
        stops = np.minimum(offsets + self.seq_len, sizes)
        return gather_windows(self.corpus, documents, offsets, offsets, stops, self.seq_len)

    def _offsets(
        self,
        documents: Int[np.ndarray, "B"],
        index: Int[np.ndarray, "B"],
        epochs: Int[np.ndarray, "B"],
    ) -> Int[np.ndarray, "B"]:
        """Window `index` of a document starts at index*S - shift, kept inside the document.

        A document's windows could hold `slack` more bytes than it has. A shift of at most the
        slack still reaches the last byte, and one that leaves less than a window of slack at
        the end keeps the last two windows apart.
        """
        sizes = self.corpus.sizes[documents]
        S = self.seq_len
        slack = _num_windows(sizes, S) * S - sizes
        low, high = np.maximum(slack - S + 1, 0), np.minimum(slack, S - 1)
        random = hash64(self.seed, epochs, documents)
        shift = low + (random % (high - low + 1).astype(np.uint64)).astype(np.int64)
        return np.clip(index * S - shift, 0, np.maximum(sizes - S, 0))


def training_batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, seed: int = 0
) -> TrainBatches:
    """Shuffled batches of training windows, addressed by step.

    Args:
      corpus: The corpus; only its training documents are used.
      batch_size: Windows in a batch, B.
      seq_len: Bytes that a window predicts, S. Documents shorter than that are padded.
      seed: Any integer from 0.

    Returns:
      Batches with `batches[step] -> Batch`, without end.

    Raises:
      ValueError: A size is less than 1 or the seed is negative.

    Example:
      >>> from moe_jax.data.text import load_corpus
      >>> batches = training_batches(load_corpus(), batch_size=4, seq_len=64, seed=1)
      >>> batches[1000].tokens.shape
      (4, 64)
    """
    # Importing grain takes half a second, which reading a run back should not pay.
    import grain

    check_sizes(batch_size=batch_size, seq_len=seq_len)
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    documents = corpus.ids(held_out=False)
    ends = np.cumsum(_num_windows(corpus.sizes[documents], seq_len))
    # Grain shuffles epoch e with seed + e, so that seeds 0 and 1 would share almost all orders.
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    num_windows = int(ends[-1])
    return TrainBatches(
        corpus=corpus,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        num_windows=num_windows,
        _first_window=np.concatenate([[0], ends[:-1]]),
        _documents=documents,
        _order=grain.MapDataset.range(num_windows).shuffle(seed=order_seed).repeat(),
    )


def check_sizes(*, seq_len: int, batch_size: int = 1) -> None:
    """Raises ValueError where a size is less than 1.

    Args:
      seq_len: Positions in a window.
      batch_size: Windows in a batch.

    Raises:
      ValueError: A size is less than 1.

    Example:
      >>> check_sizes(seq_len=8)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if seq_len < 1:
        raise ValueError(f"seq_len must be at least 1, got {seq_len}")


def _num_windows(sizes: Int[np.ndarray, "n"], seq_len: int) -> Int[np.ndarray, "n"]:
    # Half a window to spare gives every document room to shift.
    return np.where(sizes <= seq_len, 1, -(-(sizes + seq_len // 2) // seq_len))


def hash64(seed: int, *columns: Int[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Mixes integers into uniform 64 bits (splitmix64), the same on every machine.

    Args:
      seed: Any integer, taken modulo 2**64.
      *columns: Integers to mix in, in this order, each [n].

    Returns:
      One hash for each row, uint64 [n].

    Example:
      >>> hash64(0, np.array([1, 2])).dtype
      dtype('uint64')
    """
    state = np.full(columns[0].shape, seed % 2**64, np.uint64)
    for column in columns:
        state = (state ^ column.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def gather_windows(
    corpus: Corpus,
    documents: Int64[np.ndarray, "B"],
    offsets: Int64[np.ndarray, "B"],
    starts: Int64[np.ndarray, "B"],
    stops: Int64[np.ndarray, "B"],
    seq_len: int,
) -> Batch:
    """Cuts windows out of a corpus.

    Args:
      corpus: The corpus.
      documents: Document of each window, int64 [B].
      offsets: Byte offset of the first target of each window, int64 [B].
      starts: Byte offset of the first target that counts, at least the offset, int64 [B].
      stops: Byte offset of the end of the targets, at most the document's size, int64 [B].
      seq_len: Positions in a window, S.

    Returns:
      The windows, padded behind `stops`.

    Example:
      >>> from moe_jax.data.text import load_corpus
      >>> zero = np.zeros(1, np.int64)
      >>> gather_windows(load_corpus(), zero, zero, zero, zero + 3, 4).is_valid
      array([[ True,  True,  True, False]])
    """
    at = offsets[:, None] + np.arange(-1, seq_len)
    is_real = (at >= 0) & (at < stops[:, None])
    index = np.where(is_real, at + corpus.starts[documents][:, None], 0)
    symbols = np.where(is_real, corpus.data[index], _PAD).astype(np.int32)
    tokens = np.where(is_real[:, 1:], symbols[:, :-1], _PAD)
    tokens[offsets == 0, 0] = BOS
    return Batch(
        tokens=tokens,
        targets=symbols[:, 1:],
        is_valid=is_real[:, 1:] & (at[:, 1:] >= starts[:, None]),
        source=np.stack([documents, offsets], axis=1).astype(np.int32),
    )
