import random

import pytest

from moe_jax.data import Corpus, load_corpus
from moe_jax.data.text import is_held_out_name


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Forty text files of 1 to 400 bytes, some in subfolders."""
    root = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for i in range(40):
        path = root / ("sub" if i % 3 else ".") / f"{i:02d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"{i}".encode() + bytes(rng.choices(b"abc \n", k=i * 10)))
    return root


@pytest.fixture(scope="session")
def corpus(folder) -> Corpus:
    return load_corpus(folder, held_out_one_in=4)


@pytest.fixture(scope="session")
def stdlib() -> Corpus:
    return load_corpus()


@pytest.fixture
def train_and_held_out(tmp_path):
    """Writes files under names that fall into each split; returns the folder."""

    def write(train, held_out):
        names = [f"{i}.txt" for i in range(2000)]
        pools = {h: [n for n in names if is_held_out_name(n) == h] for h in (False, True)}
        for is_held_out, contents in ((False, train), (True, held_out)):
            for name, content in zip(pools[is_held_out], contents, strict=False):
                (tmp_path / name).write_bytes(content)
        return tmp_path

    return write
