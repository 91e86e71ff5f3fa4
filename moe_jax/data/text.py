"""A byte-level corpus of text files, split by file into training and held-out documents."""

import hashlib
import operator
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int64, UInt8

__all__ = ["Corpus", "Skipped", "file_digest", "is_held_out_name", "load_corpus"]

_PathLike = str | os.PathLike[str]

_STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
_BINARY_PROBE_BYTES = 8192
# Byte offsets travel as int32, and node sources in the graph are int32 too.
_MAX_BYTES_LIMIT = 2**31 - 1


class Skipped(NamedTuple):
    """How many files `load_corpus` left out, by reason.

    Attributes:
      empty: Files of zero bytes.
      binary: Files with a NUL byte in their first 8 KiB.
      unreadable: Files that could not be opened, and things that are no regular file.
      duplicate: Files whose content another file already brought; a copy in both splits would
        make the held-out bytes known.

    Example:
      >>> Skipped(binary=2)
      Skipped(empty=0, binary=2, unreadable=0, duplicate=0)
    """

    empty: int = 0
    binary: int = 0
    unreadable: int = 0
    duplicate: int = 0


@dataclass(frozen=True, eq=False)
class Corpus:
    """The bytes of all documents, end to end, and where each came from.

    Attributes:
      names: Display name of each of the F documents, unique, relative to its root.
      paths: Absolute path of each document on this machine.
      digests: Content digest of each document, see `file_digest`.
      data: The bytes of all documents, uint8 [total].
      starts: Where each document starts in `data`, and the total last, int64 [F+1].
      is_held_out: Whether a document is kept from training, bool [F].
      skipped: The files that were left out, by reason.

    Example:
      >>> corpus = Corpus(
      ...     names=("a", "b"), paths=("/a", "/b"), digests=("0", "1"),
      ...     data=np.frombuffer(b"xyz", np.uint8), starts=np.array([0, 1, 3]),
      ...     is_held_out=np.array([False, True]),
      ... )
      >>> corpus.document(1).tobytes(), corpus.num_bytes(held_out=True)
      (b'yz', 2)
    """

    names: tuple[str, ...]
    paths: tuple[str, ...]
    digests: tuple[str, ...]
    data: UInt8[np.ndarray, "total"]
    starts: Int64[np.ndarray, "F1"]
    is_held_out: Bool[np.ndarray, "F"]
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def sizes(self) -> Int64[np.ndarray, "F"]:
        """Bytes in each document, int64 [F]."""
        return np.diff(self.starts)

    @property
    def digest(self) -> str:
        """One digest over all names, contents and the split: equal means the same corpus."""
        rows = zip(self.names, self.digests, self.is_held_out, strict=True)
        return file_digest("\n".join(f"{n}\0{d}\0{int(h)}" for n, d, h in rows).encode())

    def document(self, document: SupportsIndex) -> UInt8[np.ndarray, "n"]:
        """The bytes of one document, uint8 [n], as a view."""
        index = operator.index(document)
        return self.data[self.starts[index] : self.starts[index + 1]]

    def ids(self, *, held_out: bool) -> Int64[np.ndarray, "n"]:
        """Ids of the documents of one split, ascending, int64 [n]."""
        return np.flatnonzero(self.is_held_out == held_out)

    def split(self, *, held_out: bool) -> list[np.ndarray]:
        """The documents of one split, each uint8 [n], as views."""
        return [self.document(i) for i in self.ids(held_out=held_out)]

    def num_bytes(self, *, held_out: bool) -> int:
        """Bytes in one split."""
        return int(self.sizes[self.is_held_out == held_out].sum())


def file_digest(content: bytes) -> str:
    """A short content digest (blake2b, 64 bits, hexadecimal).

    Example:
      >>> file_digest(b"moe")
      'f2b5eacdae00997c'
    """
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def is_held_out_name(name: str, one_in: int = 10) -> bool:
    """Whether the file of this relative name is held out.

    It depends on the name alone, so a split is the same on every machine and does not change
    when files are added or the order of paths does.

    Args:
      name: Relative name with forward slashes.
      one_in: On average one file in this many is held out.

    Returns:
      True for a held-out file.

    Example:
      >>> [is_held_out_name(f"{i}.txt") for i in range(4)]
      [False, False, False, False]
    """
    return _name_hash(name) % one_in == 0


def _name_hash(name: str) -> int:
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class _Found(NamedTuple):
    relative: str
    root: str
    path: str


def load_corpus(
    paths: _PathLike | Sequence[_PathLike] | None = None,
    *,
    held_out_one_in: int = 10,
    max_bytes: int = 2**30,
) -> Corpus:
    """Reads text files into one byte-level corpus and splits it by file.

    Documents are ordered by relative name. Folders are searched recursively; hidden files and
    hidden folders in them are passed over. Empty, binary, unreadable and duplicate files are
    skipped and counted in `Corpus.skipped`.

    Args:
      paths: Files or folders. The default is the source of the Python standard library on this
        machine (`*.py`, without tests and installed packages).
      held_out_one_in: One file in this many is held out, by a hash of its relative name; at least
        one, and not all.
      max_bytes: The most bytes the corpus may hold.

    Returns:
      The corpus. Both its splits hold at least one document.

    Raises:
      FileNotFoundError: A path does not exist.
      ValueError: An argument is out of range, the files hold more than `max_bytes`, or no file
        is left for one of the splits.

    Example:
      >>> corpus = load_corpus()
      >>> corpus.num_bytes(held_out=True) >= 65536
      True
    """
    if held_out_one_in < 2:
        raise ValueError(f"held_out_one_in must be at least 2, got {held_out_one_in}")
    if not 1 <= max_bytes <= _MAX_BYTES_LIMIT:
        raise ValueError(f"max_bytes must be in [1, {_MAX_BYTES_LIMIT}], got {max_bytes}")
    if paths is None:
        roots, is_stdlib = [Path(sysconfig.get_path("stdlib"))], True
    else:
        given = [paths] if isinstance(paths, str | os.PathLike) else paths
        roots, is_stdlib = [Path(p) for p in given], False
    found = sorted(f for root in roots for f in _find(root, is_stdlib))
    kept, contents, skipped = _read_all(found, max_bytes)
    is_held_out = np.array([is_held_out_name(f.relative, held_out_one_in) for f in kept], bool)
    if len(kept) > 1 and is_held_out.all() == is_held_out.any():
        # So few files that the share holds out none or all: then one, chosen by the names alone.
        is_held_out[:] = False
        is_held_out[min(range(len(kept)), key=lambda i: _name_hash(kept[i].relative))] = True
    _check_split(is_held_out, len(found), skipped)
    return Corpus(
        names=_display_names(kept),
        paths=tuple(f.path for f in kept),
        digests=tuple(file_digest(c) for c in contents),
        data=np.frombuffer(b"".join(contents), np.uint8),
        starts=np.cumsum([0, *map(len, contents)], dtype=np.int64),
        is_held_out=is_held_out,
        skipped=skipped,
    )


def _find(root: Path, is_stdlib: bool) -> Iterator[_Found]:
    if not root.exists():
        raise FileNotFoundError(f"paths: {str(root)!r} does not exist")
    root = root.absolute()
    label = root.resolve().name
    if not root.is_dir():
        yield _Found(root.name, label, str(root))
        return
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            s
            for s in subfolders
            if not s.startswith(".")
            and s != "__pycache__"
            and not (is_stdlib and s in _STDLIB_EXCLUDED)
        ]
        for name in files:
            if name.startswith(".") or (is_stdlib and not name.endswith(".py")):
                continue
            path = Path(folder, name)
            yield _Found(path.relative_to(root).as_posix(), label, str(path))


def _read_all(found: list[_Found], max_bytes: int) -> tuple[list[_Found], list[bytes], Skipped]:
    kept: list[_Found] = []
    contents: list[bytes] = []
    seen: set[str] = set()
    counts = dict.fromkeys(Skipped._fields, 0)
    budget = max_bytes
    for file in found:
        content = _read(file.path, budget)
        reason = _reason_to_skip(content, seen)
        if reason:
            counts[reason] += 1
            continue
        budget -= len(content)
        if budget < 0:
            raise ValueError(
                f"paths: the text files hold more than max_bytes={max_bytes}, "
                f"reached at {file.path!r}; give fewer files or a larger max_bytes"
            )
        kept.append(file)
        contents.append(content)
    return kept, contents, Skipped(**counts)


def _read(path: str, budget: int) -> bytes | None:
    try:
        # Opening a FIFO would block, and a device may never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with open(path, "rb") as stream:
            head = stream.read(_BINARY_PROBE_BYTES)
            return head if b"\0" in head else head + stream.read(budget + 1)
    except OSError:
        return None


def _reason_to_skip(content: bytes | None, seen: set[str]) -> str | None:
    if content is None:
        return "unreadable"
    if not content:
        return "empty"
    if b"\0" in content[:_BINARY_PROBE_BYTES]:
        return "binary"
    digest = hashlib.sha256(content).hexdigest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return None


def _display_names(files: list[_Found]) -> tuple[str, ...]:
    used: dict[str, None] = {}
    for file in files:
        plain = os.fsencode(file.relative).decode("utf-8", "backslashreplace")
        name, attempt = plain, 1
        while name in used:
            name = f"{file.root}/{plain}" if attempt == 1 else f"{file.root}/{plain}~{attempt}"
            attempt += 1
        used[name] = None
    return tuple(used)


def _check_split(held: np.ndarray, num_found: int, skipped: Skipped) -> None:
    if held.any() and not held.all():
        return
    reasons = ", ".join(f"{n} {reason}" for reason, n in skipped._asdict().items())
    raise ValueError(
        f"paths: {num_found} files found ({reasons}), which leaves {held.size} to learn from; "
        "there must be at least two, since whole files are held out"
    )
