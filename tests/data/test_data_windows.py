import jax
import numpy as np
import pytest
from data_cases import check_provenance, make_corpus, same
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.data import training_batches


def test_batches_have_the_promised_shapes_and_types(corpus):
    batch = training_batches(corpus, batch_size=3, seq_len=16, seed=0)[0]
    assert [(a.shape, a.dtype.name) for a in batch] == [
        ((3, 16), "int32"),
        ((3, 16), "int32"),
        ((3, 16), "bool"),
        ((3, 2), "int32"),
    ]


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    def make(seed):
        return training_batches(corpus, batch_size=4, seq_len=16, seed=seed)

    forward, backward = make(7), make(7)
    later = [backward[s] for s in (10**7, 50, 3, 0)][::-1]
    assert all(same(forward[s], b) for s, b in zip((0, 3, 50, 10**7), later, strict=True))
    assert same(forward[np.int64(3)], forward[3])
    assert not same(forward[0], forward[1])
    assert not same(make(8)[0], forward[0])
    with pytest.raises(IndexError, match="-1"):
        forward[-1]


def epoch_of(batches, epoch):
    """All (document, offset) of one epoch, in order; the batch size must be 1."""
    n = batches.num_windows
    return [tuple(batches[s].source[0].tolist()) for s in range(epoch * n, (epoch + 1) * n)]


def test_epochs_differ_in_order_and_in_alignment(corpus):
    batches = training_batches(corpus, batch_size=1, seq_len=16, seed=0)
    first, second = epoch_of(batches, 0), epoch_of(batches, 1)
    assert first != second
    assert set(first) != set(second)
    documents = [[d for d, _ in epoch] for epoch in (first, second)]
    assert documents[0] != documents[1]
    assert sorted(documents[0]) == sorted(documents[1])


def test_the_next_seed_is_no_shifted_copy(corpus):
    one = training_batches(corpus, batch_size=1, seq_len=16, seed=0)
    two = training_batches(corpus, batch_size=1, seq_len=16, seed=1)
    order = [[d for d, _ in epoch] for epoch in (epoch_of(one, 1), epoch_of(two, 0))]
    assert order[0] != order[1]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    seq_len=st.integers(1, 24),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_training_byte_in_distinct_windows(sizes, seq_len, seed, epoch):
    corpus = make_corpus([*sizes, 5])
    batches = training_batches(corpus, batch_size=1, seq_len=seq_len, seed=seed)
    sources, seen = [], np.zeros(len(corpus.data), int)
    for step in range(epoch * batches.num_windows, (epoch + 1) * batches.num_windows):
        batch = batches[step]
        check_provenance(corpus, batch)
        document, offset = batch.source[0].tolist()
        sources.append((document, offset))
        count = int(batch.is_valid.sum())
        assert count == min(seq_len, sizes[document])
        seen[corpus.starts[document] + offset + np.arange(count)] += 1
    assert len(set(sources)) == len(sources)
    is_train = np.arange(len(corpus.data)) < sum(sizes)
    assert (seen[is_train] >= 1).all()
    assert not seen[~is_train].any()
    assert seen.sum() <= sum(n + (3 * seq_len // 2 if n > seq_len else 0) for n in sizes)


def test_a_document_of_whole_windows_is_laid_out_anew_too():
    batches = training_batches(make_corpus([64, 5]), batch_size=1, seq_len=16, seed=0)
    layouts = {tuple(sorted(epoch_of(batches, epoch))) for epoch in range(20)}
    assert len(layouts) > 4


def test_a_batch_may_span_epochs():
    corpus = make_corpus([3, 5])
    batches = training_batches(corpus, batch_size=7, seq_len=4, seed=0)
    assert batches.num_windows == 1
    assert (batches[5].source == [0, 0]).all()
    assert batches[5].is_valid.tolist() == [[True, True, True, False]] * 7


def test_is_input_works_inside_jit():
    corpus = make_corpus([9, 5])
    batch = training_batches(corpus, batch_size=2, seq_len=12, seed=0)[0]
    is_input = jax.jit(lambda b: b.is_input)(jax.tree.map(jax.numpy.asarray, batch))
    np.testing.assert_array_equal(is_input, batch.is_input)


def test_random_bytes_of_the_standard_library_come_from_where_they_say(stdlib):
    batches = training_batches(stdlib, batch_size=16, seq_len=256, seed=3)
    for step in (0, 1, 10**6):
        check_provenance(stdlib, batches[step])
        assert not stdlib.is_held_out[batches[step].source[:, 0]].any()


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("seq_len", 0), ("seed", -1), ("seq_len", -3)]
)
def test_bad_arguments_are_named(corpus, name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least .*, got {value}"):
        training_batches(corpus, **{"batch_size": 2, "seq_len": 8, "seed": 0, name: value})
