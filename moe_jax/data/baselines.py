"""What a model must beat: byte context models with back-off, and xz."""

import lzma
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from moe_jax.data.held_out import Sample
from moe_jax.data.windows import BOS, VOCAB_SIZE

__all__ = ["ContextModel", "xz_bits_per_byte"]

_BYTES = 256
_MAX_ORDER = 3
# Counting sorts this many 64-bit keys at a time, which bounds its memory.
_CHUNK = 2**22


class _Table(NamedTuple):
    """Sparse counts of one order; a key is context * 256 + next byte."""

    keys: Int64[np.ndarray, "n"]
    discounted: Float64[np.ndarray, "n"]
    contexts: Int64[np.ndarray, "m"]
    totals: Float64[np.ndarray, "m"]
    # What the discounts took from each context, which goes to the next lower order.
    freed: Float64[np.ndarray, "m"]


@dataclass(frozen=True, eq=False)
class ContextModel:
    """Predicts a byte from the `order` bytes before it; made by `ContextModel.fit`.

    It is an interpolated modified Kneser-Ney model: counts are discounted by one of three
    amounts estimated from the data, what that frees goes to the next shorter context, whose
    counts are of the different longer contexts a byte followed, and the shortest falls back on
    the uniform distribution. Contexts never reach past the start of a document.

    Attributes:
      order: Bytes of context, 0 to 3.

    Example:
      >>> documents = [np.frombuffer(b"abababab", np.uint8)]
      >>> model = ContextModel.fit(documents, order=1)
      >>> int(model.distribution(b"a").argmax()) == ord("b")
      True
    """

    order: int
    # One for each order, from 0 up.
    _tables: tuple[_Table, ...]

    @classmethod
    def fit(cls, documents: Iterable[np.ndarray], *, order: int) -> "ContextModel":
        """Counts the bytes of the documents.

        Args:
          documents: Training documents, each uint8 [n], as `corpus.split(held_out=False)`.
          order: Bytes of context, 0 to 3.

        Returns:
          The model.

        Raises:
          ValueError: The order is out of range, or there is no byte to count.

        Example:
          >>> ContextModel.fit([np.frombuffer(b"abc", np.uint8)], order=2).order
          2
        """
        if not 0 <= order <= _MAX_ORDER:
            raise ValueError(f"order must be in [0, {_MAX_ORDER}], got {order}")
        start = np.full(order, BOS, np.uint16)
        parts = [part for document in documents for part in (start, document)]
        stream = np.concatenate([*parts, np.zeros(0, np.uint16)])
        keys, counts = _count(stream, order)
        if not len(keys):
            raise ValueError("documents must hold at least one byte, got none")
        tables = [_table(keys, counts)]
        for lower in range(order - 1, -1, -1):
            # Dropping the oldest byte of each distinct key counts its different predecessors.
            keys, counts = np.unique(keys % _num_keys(lower), return_counts=True)
            tables.append(_table(keys, counts))
        return cls(order, tuple(reversed(tables)))

    def distribution(self, context: bytes) -> Float64[np.ndarray, "256"]:
        """The probability of each next byte, float64 [256].

        Args:
          context: The bytes before it; only the last `order` matter. Where there are fewer, the
            document starts there.

        Returns:
          Probabilities that sum to one.

        Example:
          >>> model = ContextModel.fit([np.frombuffer(b"abc", np.uint8)], order=2)
          >>> round(float(model.distribution(b"ab").sum()), 6)
          1.0
        """
        before = np.frombuffer(context, np.uint8)
        every = np.arange(_BYTES, dtype=np.uint8)
        streams = [_stream(Sample(before, byte[None]), self.order) for byte in every]
        return self._probabilities(np.stack(streams))[:, 0]

    def bits(self, sample: Sample) -> Float64[np.ndarray, "n"]:
        """The cost of each predicted byte of a sample, in bits, float64 [n].

        Args:
          sample: The bytes to predict and those before them.

        Returns:
          -log2 of each byte's probability given the bytes before it.

        Example:
          >>> text = np.frombuffer(b"abab", np.uint8)
          >>> ContextModel.fit([text], order=1).bits(Sample(text[:1], text[1:])).shape
          (3,)
        """
        return -np.log2(self._probabilities(_stream(sample, self.order)[None])[0])

    def bits_per_byte(self, samples: Iterable[Sample]) -> float:
        """The mean cost of all predicted bytes, in bits.

        Args:
          samples: What `held_out_bytes` returns.

        Returns:
          Bits per byte; nan where there is no byte.

        Example:
          >>> text = np.frombuffer(b"abab" * 50, np.uint8)
          >>> ContextModel.fit([text], order=2).bits_per_byte([Sample(text[:9], text[9:])]) < 0.5
          True
        """
        costs = [self.bits(sample) for sample in samples]
        return float(np.concatenate(costs).mean()) if any(map(len, costs)) else float("nan")

    def _probabilities(self, streams: Int64[np.ndarray, "r s"]) -> Float64[np.ndarray, "r n"]:
        """The probability of every symbol but the first `order` of each row."""
        count = streams.shape[1] - self.order
        result = np.full((len(streams), count), 1 / _BYTES)
        for order, table in enumerate(self._tables):
            keys = _pack(streams[:, self.order - order :], order)
            entry, is_hit = _lookup(table.keys, keys)
            context, is_seen = _lookup(table.contexts, keys // _BYTES)
            own = np.where(is_hit, table.discounted[entry], 0.0)
            mixed = (own + table.freed[context] * result) / table.totals[context]
            result = np.where(is_seen, mixed, result)
        return result


def xz_bits_per_byte(samples: Iterable[Sample]) -> float:
    """The size of the predicted bytes under xz, in bits per byte.

    xz (preset 9, extreme) is given the predicted bytes of all samples, end to end, and nothing
    else: not the training bytes and not the bytes before each sample. It learns as it goes, so
    it does better the more bytes the samples hold.

    Args:
      samples: What `held_out_bytes` returns.

    Returns:
      Bits per byte, the container included; nan where there is no byte.

    Example:
      >>> zeros = np.zeros(100_000, np.uint8)
      >>> xz_bits_per_byte([Sample(zeros[:0], zeros)]) < 0.02
      True
    """
    content = b"".join(sample.predicted.tobytes() for sample in samples)
    if not content:
        return float("nan")
    return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)) / len(content)


def _num_keys(order: int) -> int:
    return VOCAB_SIZE**order * _BYTES


def _pack(symbols: np.ndarray, order: int) -> np.ndarray:
    """Keys of all symbols after the first `order` along the last axis, int64."""
    count = symbols.shape[-1] - order
    keys = np.zeros((*symbols.shape[:-1], count), np.int64)
    for i in range(order):
        keys = keys * VOCAB_SIZE + symbols[..., i : i + count]
    return keys * _BYTES + symbols[..., order:]


def _count(stream: np.ndarray, order: int) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for i in range(0, len(stream) - order, _CHUNK):
        chunk = stream[i : i + _CHUNK + order]
        found.append(np.unique(_pack(chunk, order)[chunk[order:] != BOS], return_counts=True))
    keys, inverse = np.unique(np.concatenate([k for k, _ in found]), return_inverse=True)
    counts = np.zeros(len(keys), np.int64)
    np.add.at(counts, inverse, np.concatenate([c for _, c in found]))
    return keys, counts


def _table(keys: Int64[np.ndarray, "n"], counts: Int64[np.ndarray, "n"]) -> _Table:
    contexts, first = np.unique(keys // _BYTES, return_index=True)
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    return _Table(
        keys=keys,
        discounted=counts - discounts,
        contexts=contexts,
        totals=np.add.reduceat(counts, first).astype(np.float64),
        freed=np.add.reduceat(discounts, first),
    )


def _discounts(counts: Int64[np.ndarray, "n"]) -> Float64[np.ndarray, "4"]:
    """What to take from a count of 0, 1, 2, and 3 or more (Chen and Goodman, 1999)."""
    # Small or very regular texts may lack keys of some count; no estimate may divide by zero.
    n1, n2, n3, n4 = (max(int((counts == c).sum()), 1) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    raw = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # A discount of nothing would leave unseen bytes impossible, one of all would forget.
    return np.clip(raw, [0.0, 0.05, 0.05, 0.05], [0.0, 0.95, 1.95, 2.95])


def _lookup(
    sorted_keys: Int64[np.ndarray, "n"], wanted: Int64[np.ndarray, "r s"]
) -> tuple[np.ndarray, np.ndarray]:
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return at, sorted_keys[at] == wanted


def _stream(sample: Sample, order: int) -> Int64[np.ndarray, "s"]:
    before = sample.before[len(sample.before) - min(order, len(sample.before)) :]
    start = np.full(order - len(before), BOS, np.int64)
    return np.concatenate([start, before, sample.predicted]).astype(np.int64)
