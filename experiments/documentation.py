"""The documentation inside installed packages, as a corpus."""

import ast
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from moe_jax.data import Corpus, load_corpus


def documentation(folder: Path, max_bytes: int) -> Corpus:
    """The documentation inside installed packages as a corpus, one file for each file of theirs.

    Docstrings of modules, and reStructuredText, Markdown and package descriptions. Licences are
    left out, as their copies in many packages would be found by heart.
    """
    root, left = Path(sysconfig.get_path("purelib")), max_bytes
    paths = [Path(at, name) for at, _, names in os.walk(root) for name in names]
    paths = [(p.relative_to(root).as_posix(), p) for p in paths]
    paths.sort(key=lambda pair: hashlib.blake2b(pair[0].encode()).digest())
    for name, path in paths:
        text = _documentation_of(name.lower(), path)
        if len(text) < 1024:
            continue
        if left < len(text):
            break
        left -= len(text)
        target = folder / (name + ".doc")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)
    return load_corpus([folder])


def _documentation_of(name: str, path: Path) -> bytes:
    if any(word in name for word in ("license", "copying", "notice", "test", "moe_jax")):
        return b""
    try:
        if name.endswith((".rst", ".md")):
            return path.read_bytes()
        if name.endswith("dist-info/metadata"):
            return path.read_bytes().partition(b"\n\n")[2]
        if name.endswith(".py"):
            return "\n\n\n".join(_docstrings(path.read_text())).encode()
    except (OSError, ValueError, SyntaxError, RecursionError):
        pass
    return b""


def _docstrings(source: str) -> Iterator[str]:
    if '"""' not in source:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{getattr(node, 'name', '')}\n{text}"
