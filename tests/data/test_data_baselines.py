import lzma
from collections import Counter

import numpy as np
import pytest

from moe_jax.data import ContextModel, Sample, baselines, held_out_bytes, xz_bits_per_byte


def array(text):
    return np.frombuffer(text, np.uint8)


class SlowModel:
    """Interpolated modified Kneser-Ney by dictionaries of (context, byte)."""

    def __init__(self, documents, order):
        top = Counter()
        for document in documents:
            symbols = (256,) * order + tuple(document)
            for i in range(order, len(symbols)):
                top[symbols[i - order : i], symbols[i]] += 1
        self.counts = [top]
        for _ in range(order):
            self.counts.insert(0, Counter((c[1:], b) for c, b in self.counts[0]))

    @staticmethod
    def discount(counts, value):
        n = {c: max(sum(v == c for v in counts.values()), 1) for c in (1, 2, 3, 4)}
        y = n[1] / (n[1] + 2 * n[2])
        c = min(value, 3)
        return min(max(c - (c + 1) * y * n[c + 1] / n[c], 0.05), c - 0.05)

    def probability(self, context, byte, order=None):
        order = len(self.counts) - 1 if order is None else order
        if order < 0:
            return 1 / 256
        context = ((256,) * order + tuple(context))[len(context) :]
        lower = self.probability(context[1:], byte, order - 1)
        counts = self.counts[order]
        mine = {b: v for (c, b), v in counts.items() if c == context}
        if not mine:
            return lower
        taken = {b: self.discount(counts, v) for b, v in mine.items()}
        own = mine[byte] - taken[byte] if byte in mine else 0
        return (own + sum(taken.values()) * lower) / sum(mine.values())


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_model_equals_the_slow_one(order):
    rng = np.random.default_rng(order)
    documents = [rng.integers(97, 101, n).astype(np.uint8) for n in (1, 2, 30, 60)]
    fast, slow = ContextModel.fit(documents, order=order), SlowModel(documents, order)
    text = rng.integers(97, 102, 25).astype(np.uint8)
    for split in (0, 1, 2, 10):
        wanted = [
            -np.log2(slow.probability(text[max(i - order, 0) : i].tolist(), int(text[i])))
            for i in range(split, len(text))
        ]
        np.testing.assert_allclose(fast.bits(Sample(text[:split], text[split:])), wanted)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("context", [b"", b"a", b"ab", b"abc", b"zz\xffq", b"xyzab"])
def test_probabilities_sum_to_one_and_none_is_zero(order, context):
    model = ContextModel.fit([array(b"abcabdabcabd" * 5), array(b"b")], order=order)
    distribution = model.distribution(context)
    assert distribution.min() > 0
    np.testing.assert_allclose(distribution.sum(), 1)


def test_contexts_do_not_cross_documents():
    apart = ContextModel.fit([array(b"aaaa"), array(b"bbbb")], order=1)
    joined = ContextModel.fit([array(b"aaaabbbb")], order=1)
    assert apart.distribution(b"a")[ord("b")] < joined.distribution(b"a")[ord("b")]
    assert apart.distribution(b"")[ord("b")] == apart.distribution(b"")[ord("a")]


def test_counting_in_chunks_changes_nothing(monkeypatch):
    documents = [array(b"the cat sat on the mat"), array(b"the end")]
    whole = ContextModel.fit(documents, order=2).distribution(b"th")
    monkeypatch.setattr(baselines, "_CHUNK", 5)
    np.testing.assert_array_equal(ContextModel.fit(documents, order=2).distribution(b"th"), whole)


def test_a_sample_costs_the_same_whole_or_in_parts():
    model = ContextModel.fit([array(b"to be or not to be" * 9)], order=2)
    text = array(b"not to be, or to be")
    parts = [Sample(text[:i], text[i : i + 4]) for i in range(0, len(text), 4)]
    whole = model.bits_per_byte([Sample(text[:0], text)])
    np.testing.assert_allclose(model.bits_per_byte(parts), whole)


def test_xz_is_given_the_predicted_bytes_only():
    noise = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    samples = [Sample(noise, array(b"a" * 300)), Sample(noise, array(b"b" * 500))]
    size = len(lzma.compress(b"a" * 300 + b"b" * 500, preset=9 | lzma.PRESET_EXTREME))
    assert xz_bits_per_byte(samples) == 8 * size / 800


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"order must be in \[0, 3\], got 4"):
        ContextModel.fit([array(b"abc")], order=4)
    for nothing in ([], [array(b"")]):
        with pytest.raises(ValueError, match="at least one byte"):
            ContextModel.fit(nothing, order=2)
    model = ContextModel.fit([array(b"abc")], order=2)
    assert np.isnan(model.bits_per_byte([]))
    assert np.isnan(model.bits_per_byte([Sample(array(b"a"), array(b""))]))
    assert np.isnan(xz_bits_per_byte([]))


def test_longer_contexts_do_better_on_the_standard_library(stdlib):
    samples = held_out_bytes(stdlib, seq_len=256)
    train = stdlib.split(held_out=False)
    zero, two = (ContextModel.fit(train, order=o).bits_per_byte(samples) for o in (0, 2))
    assert 4 < zero < 5.5
    assert 2 < two < 3
    assert xz_bits_per_byte(samples) < zero
