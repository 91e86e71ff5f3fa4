"""Every example in a docstring runs and prints what it says."""

import ast
import doctest
import importlib
from pathlib import Path

import jax.numpy as jnp
import pytest

import moe_jax

ROOT = Path(moe_jax.__file__).parent
OPTIONAL = {"moe_jax.quantization.quantize": "qwix"}  # an example, and what it needs
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples():
    """Each docstring that holds an example, as a doctest without names yet."""
    parser = doctest.DocTestParser()
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                name = f"{module}.{getattr(node, 'name', '')}"
                if ">>>" in text:
                    yield pytest.param(
                        module, parser.get_doctest(text, {}, name, str(path), 0), id=name
                    )


@pytest.mark.parametrize(("module", "example"), list(examples()))
def test_example(module, example):
    if example.name in OPTIONAL:
        pytest.importorskip(OPTIONAL[example.name])
    # Examples of a package may use its public names.
    package = importlib.import_module(module.rpartition(".")[0] or module)
    example.globs = {"jnp": jnp, **vars(package), **vars(importlib.import_module(module))}
    output = []
    doctest.DocTestRunner(optionflags=FLAGS).run(example, out=output.append)
    assert not output, "".join(output)
