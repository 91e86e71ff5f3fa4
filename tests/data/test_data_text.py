import os
import random
import sys

import numpy as np
import pytest

from moe_jax.data import load_corpus
from moe_jax.data.text import is_held_out_name


def test_split_is_the_same_on_every_machine():
    names = [f"{i}.txt" for i in range(60)]
    assert [n for n in names if is_held_out_name(n)] == [
        f"{i}.txt" for i in (9, 10, 13, 14, 15, 19, 32, 37, 43, 45, 49, 50, 59)
    ]
    share = np.mean([is_held_out_name(f"a/{i}") for i in range(5000)])
    assert 0.08 < share < 0.12


def test_corpus_holds_every_byte_in_order_of_name(folder, corpus):
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    assert corpus.names == tuple(files)
    for i, name in enumerate(files):
        assert corpus.document(i).tobytes() == (folder / name).read_bytes()
        assert corpus.is_held_out[i] == is_held_out_name(name, 4)
    assert corpus.starts[-1] == len(corpus.data) == corpus.sizes.sum()
    assert sum(corpus.num_bytes(held_out=h) for h in (False, True)) == len(corpus.data)
    both = np.concatenate([corpus.ids(held_out=h) for h in (False, True)])
    assert sorted(both) == list(range(len(files)))


def test_split_does_not_depend_on_how_files_are_given(folder, corpus):
    files = [p for p in folder.rglob("*.txt") if p.parent == folder]
    random.Random(1).shuffle(files)
    one_by_one = load_corpus(files, held_out_one_in=4)
    split = dict(zip(corpus.names, corpus.is_held_out, strict=True))
    assert one_by_one.names == tuple(sorted(p.name for p in files))
    assert [split[n] for n in one_by_one.names] == one_by_one.is_held_out.tolist()
    assert load_corpus(files[::-1], held_out_one_in=4).digest == one_by_one.digest


def test_skipped_files_are_counted(train_and_held_out):
    root = train_and_held_out([b"one", b"two"], [b"three"])
    (root / "empty.txt").touch()
    (root / "binary.txt").write_bytes(b"x" * 8000 + b"\0")
    (root / "late_nul.txt").write_bytes(b"y" * 9000 + b"\0")
    (root / "copy.txt").write_bytes(b"one")
    (root / "dangling.txt").symlink_to(root / "nowhere")
    os.mkfifo(root / "pipe.txt")
    for hidden in (".git", "sub/.cache", "__pycache__"):
        (root / hidden).mkdir(parents=True)
        (root / hidden / "file.txt").write_bytes(b"hidden")
    (root / ".env").write_bytes(b"secret")
    corpus = load_corpus(root)
    assert corpus.skipped._asdict() == {"empty": 1, "binary": 1, "unreadable": 2, "duplicate": 1}
    assert len(corpus.names) == 4
    assert b"secret" not in corpus.data.tobytes()
    assert b"hidden" not in corpus.data.tobytes()


def test_a_file_given_twice_is_in_one_split_only(train_and_held_out):
    root = train_and_held_out([b"one", b"two"], [b"three"])
    corpus = load_corpus([root, *root.iterdir()])
    assert len(corpus.names) == corpus.skipped.duplicate == 3


def test_names_are_unique_when_roots_share_relative_names(tmp_path, train_and_held_out):
    for i, root in enumerate(["a", "b", "deep/a", "other/a"]):
        (tmp_path / root).mkdir(parents=True)
        (tmp_path / root / "same.txt").write_bytes(b"%d" % i)
    texts = train_and_held_out([b"x"], [b"y"])
    files = [p for p in texts.iterdir() if p.is_file()]
    roots = [tmp_path / r for r in ("a", "b", "deep/a", "other/a")]
    corpus = load_corpus([*roots, *files])
    assert len(set(corpus.names)) == len(corpus.names) == 6
    assert {"same.txt", "b/same.txt", "a/same.txt", "a/same.txt~2"} <= set(corpus.names)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are arbitrary bytes on Linux only")
def test_names_that_are_not_utf8_can_be_printed(train_and_held_out):
    root = train_and_held_out([b"one"], [b"two"])
    with open(os.fsencode(root) + b"/\xff.txt", "wb") as stream:
        stream.write(b"three")
    corpus = load_corpus(root)
    assert "\\xff.txt" in corpus.names
    "".join(corpus.names).encode("utf-8")


def test_bad_input_is_named(tmp_path, train_and_held_out):
    with pytest.raises(FileNotFoundError, match="not_there"):
        load_corpus(tmp_path / "not_there")
    with pytest.raises(ValueError, match=r"0 files found .* which leaves 0 to learn from"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="0 files found"):
        load_corpus([])
    root = train_and_held_out([b"one", b"two"], [])
    train_and_held_out([], [b"three"])
    with pytest.raises(ValueError, match="max_bytes=10"):
        load_corpus(root, max_bytes=10)
    assert len(load_corpus(root, max_bytes=11).data) == 11
    with pytest.raises(ValueError, match="max_bytes"):
        load_corpus(root, max_bytes=2**31)
    with pytest.raises(ValueError, match="held_out_one_in"):
        load_corpus(root, held_out_one_in=1)


def test_standard_library_is_the_default(stdlib):
    assert stdlib.num_bytes(held_out=True) >= 65536
    assert stdlib.num_bytes(held_out=False) > 4 * stdlib.num_bytes(held_out=True)
    assert "json/decoder.py" in stdlib.names
    folders = {part for name in stdlib.names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    assert all(name.endswith(".py") for name in stdlib.names)
    assert load_corpus().digest == stdlib.digest


@pytest.mark.parametrize("count", [2, 3, 7])
def test_of_a_few_files_one_is_held_out(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    assert not any(is_held_out_name(f"{i}.txt") for i in range(count))
    corpora = [load_corpus(tmp_path), load_corpus(sorted(tmp_path.iterdir())[::-1])]
    for corpus in corpora:
        assert corpus.is_held_out.sum() == 1
    assert corpora[0].digest == corpora[1].digest


def test_one_file_cannot_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"which leaves 1 to .* must be at least two"):
        load_corpus(tmp_path)
