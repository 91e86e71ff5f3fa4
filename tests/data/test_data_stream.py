import numpy as np
import pytest
from data_cases import check_provenance, make_corpus

from moe_jax.data.stream import stream_batches


@pytest.mark.parametrize(("context", "limit"), [(0, None), (5, None), (7, 20), (3, 1)])
def test_every_byte_counts_once_in_order_with_its_context(context, limit):
    sizes, S = (1, 8, 9, 40, 3, 25), 8
    corpus, documents = make_corpus(sizes), [3, 0, 5, 1, 4]
    batches = stream_batches(corpus, documents, batch_size=2, seq_len=S, context=context,
                             max_document_bytes=limit)  # fmt: skip
    seen = {}
    for batch in batches:
        check_provenance(corpus, batch)
        assert batch.is_valid.sum(axis=1).max() <= S - context
        for row in range(2):
            document, offset = batch.source[row]
            at = (offset + np.flatnonzero(batch.is_valid[row])).tolist()
            seen.setdefault((row, int(document)), []).extend(at)
            if at:
                assert at == list(range(at[0], at[-1] + 1))
                assert at[0] - offset == min(at[0], context)
    seen = {key: at for key, at in seen.items() if key[1] >= 0}
    assert sorted(document for _, document in seen) == sorted(documents)
    for (_, document), at in seen.items():
        assert at == list(range(min(sizes[document], limit or 99)))


def test_documents_go_to_the_emptiest_row_and_stay_in_order():
    corpus = make_corpus((30, 10, 10, 5, 5))
    batches = stream_batches(corpus, range(5), batch_size=2, seq_len=5)
    rows = np.array([batch.source[:, 0] for batch in batches]).T
    assert rows.tolist() == [[0] * 6, [1, 1, 2, 2, 3, 4]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"context": 8}, r"context must be in \[0, seq_len=8\), got 8"),
        ({"max_document_bytes": 0}, "max_document_bytes"),
        ({"documents": []}, "documents must hold at least one"),
    ],
)
def test_wrong_calls_are_refused(changes, message):
    arguments = {"documents": [0], "batch_size": 1, "seq_len": 8} | changes
    with pytest.raises(ValueError, match=message):
        stream_batches(make_corpus((5, 5)), **arguments)
