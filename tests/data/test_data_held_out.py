import numpy as np
import pytest
from data_cases import check_provenance, make_corpus, same

from moe_jax.data import held_out_batches, held_out_bytes

CASES = [(16, 0, 300), (16, 5, 300), (16, 15, 50), (64, 32, 10**9), (1, 0, 10), (500, 0, 0)]


@pytest.mark.parametrize(("seq_len", "context", "min_bytes"), CASES)
def test_sample_counts_the_same_bytes_for_models_and_baselines(corpus, seq_len, context, min_bytes):
    size = {"seq_len": seq_len, "context": context, "min_bytes": min_bytes}
    batches = held_out_batches(corpus, batch_size=5, **size)
    samples = held_out_bytes(corpus, **size)
    rows = [(b, r) for b in batches for r in range(5) if b.source[r, 0] >= 0]
    assert len(rows) == len(samples)
    used = np.zeros(len(corpus.data), int)
    for (batch, row), sample in zip(rows, samples, strict=True):
        is_valid = batch.is_valid[row]
        document, offset = batch.source[row]
        first = int(is_valid.argmax())
        start = offset + first
        np.testing.assert_array_equal(batch.targets[row, is_valid], sample.predicted)
        np.testing.assert_array_equal(corpus.document(document)[:start], sample.before)
        assert first == min(context, len(sample.before))
        used[corpus.starts[document] + start + np.arange(len(sample.predicted))] += 1
    for batch in batches:
        assert batch.tokens.shape == (5, seq_len)
        check_provenance(corpus, batch)
    held_out = np.repeat(corpus.is_held_out, corpus.sizes)
    assert used.max() == 1
    assert not used[~held_out].any()
    assert used.sum() >= min(min_bytes, corpus.num_bytes(held_out=True))
    documents = {int(b.source[r, 0]) for b, r in rows}
    assert documents == set(corpus.ids(held_out=True).tolist())


def test_sample_is_always_the_same_and_stops_when_it_has_enough(stdlib):
    batches = held_out_batches(stdlib, batch_size=16, seq_len=256)
    again = held_out_batches(stdlib, batch_size=16, seq_len=256)
    assert all(same(a, b) for a, b in zip(batches, again, strict=True))
    total = sum(int(b.is_valid.sum()) for b in batches)
    assert 65536 <= total < 65536 + 256
    windows = np.concatenate([b.source for b in batches])
    assert len(np.unique(windows[:, 1])) > 100


def test_the_batch_size_does_not_change_the_sample(corpus):
    def real_rows(batch_size):
        batches = held_out_batches(corpus, batch_size=batch_size, seq_len=16, min_bytes=200)
        rows = [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]
        return [a[rows[3][:, 0] >= 0] for a in rows]

    assert same(real_rows(1), real_rows(7))


def test_without_context_all_inputs_count():
    corpus = make_corpus([4, 50])
    for batch in held_out_batches(corpus, batch_size=4, seq_len=8):
        np.testing.assert_array_equal(batch.is_input, batch.is_valid)
    batch = held_out_batches(corpus, batch_size=50, seq_len=8, context=7)[0]
    assert batch.is_valid.sum() == 50
    assert batch.is_input.sum() == sum(range(1, 9)) + 8 * 42


def test_bad_arguments_are_named(corpus):
    with pytest.raises(ValueError, match=r"context must be in \[0, seq_len=8\), got 8"):
        held_out_bytes(corpus, seq_len=8, context=8)
    with pytest.raises(ValueError, match="context"):
        held_out_batches(corpus, batch_size=1, seq_len=8, context=-1)
    with pytest.raises(ValueError, match="batch_size"):
        held_out_batches(corpus, batch_size=0, seq_len=8)
