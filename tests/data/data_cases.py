"""Small corpora and what must hold for every batch."""

import numpy as np

from moe_jax.data import BOS, Corpus


def make_corpus(sizes, held_out=1):
    """Random bytes, the last `held_out` documents held out."""
    rng = np.random.default_rng(0)
    count = len(sizes)
    return Corpus(
        names=tuple(map(str, range(count))),
        paths=tuple(map(str, range(count))),
        digests=tuple(map(str, range(count))),
        data=rng.integers(0, 256, sum(sizes)).astype(np.uint8),
        starts=np.cumsum([0, *sizes], dtype=np.int64),
        is_held_out=np.arange(count) >= count - held_out,
    )


def check_provenance(corpus, batch):
    """Every target and input is the byte that `source` says, padding and context aside."""
    for row in range(len(batch.tokens)):
        document, offset = batch.source[row]
        num_real = int(batch.is_input[row].sum())
        if document < 0:
            assert num_real == 0
            continue
        content = corpus.document(document)
        np.testing.assert_array_equal(
            batch.targets[row, :num_real], content[offset : offset + num_real]
        )
        before = BOS if offset == 0 else content[offset - 1]
        assert batch.tokens[row, 0] == before
        np.testing.assert_array_equal(
            batch.tokens[row, 1:num_real], content[offset : offset + num_real - 1]
        )
        assert not batch.targets[row, num_real:].any()
        assert not batch.tokens[row, num_real:].any()


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
