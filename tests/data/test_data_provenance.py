import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data import (
    corpus_from_manifest,
    load_corpus,
    load_manifest,
    locate,
    manifest,
    save_manifest,
)


@pytest.fixture
def written(train_and_held_out):
    return load_corpus(train_and_held_out([b"one\r\ntwo\n\nfour", b"\n"], [b"held out\n"]))


def test_locate_finds_the_line_of_every_byte(corpus):
    described = manifest(corpus)
    for document in (0, 7, len(corpus.names) - 1):
        content = corpus.document(document).tobytes()
        lines = content.split(b"\n")
        for offset in range(len(content)):
            found = locate(corpus, document, offset)
            number = content[:offset].count(b"\n") + 1
            assert found == (corpus.names[document], number, lines[number - 1].decode(), None)
        assert locate(described, document, 5) == locate(corpus, document, 5)


def test_locate_accepts_any_offset_and_any_id(written):
    document = next(i for i in range(3) if written.sizes[i] > 10)
    assert locate(written, document, -5)[1:3] == (1, "one")
    assert locate(written, document, 10**9)[1:3] == (4, "four")
    assert locate(written, np.int32(document), jnp.asarray(6))[1:3] == (2, "two")
    for nowhere in (-1, 3, 10**9):
        for source in (written, manifest(written)):
            assert locate(source, nowhere, 0).problem == f"there is no document {nowhere}"


def test_long_and_unprintable_lines_are_made_fit_to_show(train_and_held_out):
    line = b"a" * 500 + b"HERE" + b"b" * 500 + b"\x1b[31m\xff"
    corpus = load_corpus(train_and_held_out([line], [b"x"]))
    document = int(np.argmax(corpus.sizes))
    middle = locate(corpus, document, 502, width=40).text
    assert len(middle) == 40
    assert "HERE" in middle
    end = locate(corpus, document, 10**6).text
    assert len(end) == 160
    assert end.endswith("b\ufffd[31m\ufffd")


def test_manifest_survives_json(written, tmp_path):
    path = tmp_path / "out" / "corpus.json"
    path.parent.mkdir()
    save_manifest(written, path)
    assert load_manifest(path) == manifest(written)
    assert [p.name for p in path.parent.iterdir()] == ["corpus.json"]
    again = corpus_from_manifest(load_manifest(path))
    assert again.digest == written.digest == manifest(written)["digest"]
    np.testing.assert_array_equal(again.data, written.data)
    np.testing.assert_array_equal(again.starts, written.starts)
    np.testing.assert_array_equal(again.is_held_out, written.is_held_out)


def test_changed_and_missing_files_are_said_to_be(written):
    described = manifest(written)
    paths = [entry["path"] for entry in described["files"]]
    with open(paths[0], "ab") as stream:
        stream.write(b"more")
    other = Path(paths[1])
    other.write_bytes(bytes(b ^ 1 for b in other.read_bytes()))
    os.remove(paths[2])
    problems = [locate(described, i, 0).problem for i in range(3)]
    assert "changed" in problems[0]
    assert "same size" in problems[1]
    assert "gone" in problems[2]
    with pytest.raises(ValueError, match="3 of 3 files differ"):
        corpus_from_manifest(described)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1, "files": [{}]}'])
def test_what_is_no_manifest_is_refused(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.json"):
        load_manifest(path)


def test_manifest_of_another_format_is_refused(written, tmp_path):
    path = tmp_path / "new.json"
    path.write_text(json.dumps(manifest(written) | {"format": 2}))
    with pytest.raises(ValueError, match="format 1"):
        load_manifest(path)
