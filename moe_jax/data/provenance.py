"""Where a byte came from: manifests of a corpus, and the source line around an offset."""

import json
import operator
import os
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np

from moe_jax._files import replace_text
from moe_jax.data.text import Corpus, file_digest

__all__ = [
    "Manifest",
    "Snippet",
    "corpus_from_manifest",
    "load_manifest",
    "locate",
    "manifest",
    "save_manifest",
]

_FORMAT = 1
_ENTRY = {"name": str, "path": str, "size": int, "digest": str, "held_out": bool}

Manifest = dict[str, Any]


class Snippet(NamedTuple):
    """One line of a document, or why it cannot be shown.

    Attributes:
      name: Display name of the document.
      line_number: Counted from 1; 0 when there is no line to show.
      text: The line, decoded as UTF-8; where it is longer than asked for, the part around the
        offset. Empty when there is a problem.
      problem: What went wrong, in words, or None.

    Example:
      >>> Snippet("a.py", 3, "x = 1", None).line_number
      3
    """

    name: str
    line_number: int
    text: str
    problem: str | None = None


def manifest(corpus: Corpus) -> Manifest:
    """Describes a corpus without its bytes, as a value that JSON can hold.

    Args:
      corpus: The corpus.

    Returns:
      `format`, the `digest` of the whole corpus, and `files`: for each document, in order of
      id, its name, path, size in bytes, digest and whether it is held out.

    Example:
      >>> from moe_jax.data.text import load_corpus
      >>> sorted(manifest(load_corpus())["files"][0])
      ['digest', 'held_out', 'name', 'path', 'size']
    """
    columns = (
        corpus.names,
        corpus.paths,
        corpus.sizes.tolist(),
        corpus.digests,
        corpus.is_held_out.tolist(),
    )
    files = [dict(zip(_ENTRY, row, strict=True)) for row in zip(*columns, strict=True)]
    return {"format": _FORMAT, "digest": corpus.digest, "files": files}


def save_manifest(corpus: Corpus, path: str | os.PathLike[str]) -> None:
    """Writes `manifest(corpus)` to a JSON file, replacing it whole.

    Args:
      corpus: The corpus.
      path: The file to write.

    Example:
      >>> import tempfile
      >>> from moe_jax.data.text import load_corpus
      >>> corpus = load_corpus()
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_manifest(corpus, f"{folder}/corpus.json")
      ...     load_manifest(f"{folder}/corpus.json") == manifest(corpus)
      True
    """
    replace_text(Path(path), json.dumps(manifest(corpus), indent=1) + "\n")


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads a manifest that `save_manifest` wrote.

    Args:
      path: The JSON file.

    Returns:
      The manifest, see `manifest`.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: The file is no manifest of this format.

    Example:
      See `save_manifest`.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"path: {os.fspath(path)!r} is not JSON: {error}") from error
    if not _is_manifest(value):
        raise ValueError(
            f"path: {os.fspath(path)!r} must hold a corpus manifest of format {_FORMAT}"
        )
    return value


def _is_manifest(value: object) -> bool:
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        return False
    files = value.get("files")
    return (
        isinstance(files, list)
        and len(files) > 0
        and all(
            isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in _ENTRY.items())
            for entry in files
        )
    )


def corpus_from_manifest(described: Manifest) -> Corpus:
    """Reads the very corpus that a manifest describes: same ids, same bytes, same split.

    Args:
      described: What `manifest` returned or `load_manifest` read.

    Returns:
      The corpus, with nothing skipped.

    Raises:
      ValueError: A file is gone or has changed since.

    Example:
      >>> from moe_jax.data.text import load_corpus
      >>> corpus = load_corpus()
      >>> corpus_from_manifest(manifest(corpus)).digest == corpus.digest
      True
    """
    contents, problems = [], []
    for entry in described["files"]:
        content, problem = _read_unchanged(entry)
        contents.append(content)
        if problem:
            problems.append(problem)
    if problems:
        raise ValueError(
            f"described: {len(problems)} of {len(contents)} files differ; first: {problems[0]}"
        )
    names, paths, _, digests, held_out = zip(
        *([entry[k] for k in _ENTRY] for entry in described["files"]), strict=True
    )
    return Corpus(
        names=names,
        paths=paths,
        digests=digests,
        data=np.frombuffer(b"".join(contents), np.uint8),
        starts=np.cumsum([0, *map(len, contents)], dtype=np.int64),
        is_held_out=np.array(held_out, bool),
    )


def locate(
    source: Corpus | Manifest,
    document: SupportsIndex,
    offset: SupportsIndex,
    *,
    width: int = 160,
) -> Snippet:
    """The source line around a byte of a document.

    A corpus answers from memory. A manifest answers by reading the file again, and says so when
    the file is gone or no longer holds the same bytes. Nothing is raised for a bad id or offset,
    since both come out of a graph that may hold slots without a source.

    Args:
      source: A corpus, or a manifest of one.
      document: Document id.
      offset: Byte offset in the document; one outside it means its nearest end.
      width: The most characters of the line to return.

    Returns:
      The line, or the problem.

    Example:
      >>> from moe_jax.data.text import load_corpus
      >>> locate(load_corpus(), -1, 0).problem
      'there is no document -1'
    """
    document, offset = operator.index(document), operator.index(offset)
    is_corpus = isinstance(source, Corpus)
    count = len(source.names) if is_corpus else len(source["files"])
    if not 0 <= document < count:
        return Snippet("unknown", 0, "", f"there is no document {document}")
    if is_corpus:
        name, content, problem = source.names[document], source.document(document).tobytes(), None
    else:
        entry = source["files"][document]
        name = entry["name"]
        content, problem = _read_unchanged(entry)
    if problem:
        return Snippet(name, 0, "", problem)
    return Snippet(name, *_line_around(content, offset, width))


def _read_unchanged(entry: dict[str, Any]) -> tuple[bytes, str | None]:
    path, size = entry["path"], entry["size"]
    try:
        if not os.path.isfile(path):
            return b"", f"the file is gone: {path}"
        now = os.path.getsize(path)
        if now != size:
            return b"", f"the file has changed ({size} bytes then, {now} now): {path}"
        content = Path(path).read_bytes()
    except OSError as error:
        return b"", f"the file cannot be read ({error.strerror}): {path}"
    if file_digest(content) != entry["digest"]:
        return b"", f"the file has changed (same size, other content): {path}"
    return content, None


def _line_around(content: bytes, offset: int, width: int) -> tuple[int, str]:
    offset = min(max(offset, 0), max(len(content) - 1, 0))
    start = content.rfind(b"\n", 0, offset) + 1
    end = content.find(b"\n", offset)
    line = content[start : end if end >= 0 else len(content)]
    text = line.decode("utf-8", "replace").rstrip("\r")
    if len(text) > width:
        at = len(line[: offset - start].decode("utf-8", "replace"))
        first = min(max(at - width // 2, 0), len(text) - width)
        text = text[first : first + width]
    # A terminal must not obey what a document says.
    shown = "".join(c if c.isprintable() or c == "\t" else "\ufffd" for c in text)
    return content.count(b"\n", 0, start) + 1, shown
