"""Modules import only their own level of the design and the levels below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moe_jax

ROOT = Path(moe_jax.__file__).parent
LEVELS = [
    {"_files", "_matrices", "_types", "config"},
    {"ops", "routing", "graph", "quantization"},
    {"experts", "reports", "supervisor", "constellation", "librarian", "memory", "gnn"},
    {"system", "lm"},
    {"checkpoint", "training", "data", "interop", "monitoring", "sharding", "console"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem[:2] != "__")


def part_of(path):
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_at_load(path):
    """Full names of what a file imports when it is loaded; functions' bodies are left out."""
    pending = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))


def test_every_part_has_a_level():
    assert {part_of(path) for path in FILES} <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
    own = LEVEL[part_of(path)]
    for name in imports_at_load(path):
        parts = name.split(".")
        if parts[0] == "moe_jax":
            assert parts[1] in LEVEL, f"{path} imports {name}, which the package only gathers"
            assert LEVEL[parts[1]] <= own, f"{path} imports {name}, which is above it"
        if parts[0] in ("flax", "optax", "orbax"):
            assert own > LEVEL["graph"], f"{path} imports {name}, but is pure"


def test_the_walk_sees_what_it_forbids(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "from moe_jax.system import MoESystem\n"
        "import flax.linen as nn\n"
        "if True:\n    from moe_jax import lm\n"
        "class C:\n    import optax\n"
        "def f():\n    import torch\n"
    )
    assert set(imports_at_load(file)) == {
        "moe_jax.system.MoESystem",
        "flax.linen",
        "moe_jax.lm",
        "optax",
    }


def test_importing_the_package_leaves_heavy_libraries_out():
    heavy = ("torch", "faiss", "networkx", "matplotlib", "grain", "transformers", "datasets")
    code = f"import sys, moe_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_nothing_breaks_without_triton():
    """Pallas's Triton backend is announced to go."""
    script = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import jax, jax.numpy as jnp
from moe_jax.ops import encode, nearest
from moe_jax.ops._hardware import runs_triton
from moe_jax.ops.spread_rows import spread_rows
keys = jnp.eye(128, 64)
assert not runs_triton()
print(nearest(keys[:1], keys, jnp.ones(128, bool), k=1, code=encode(keys)).ids.tolist())
try:
    place, source = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    spread_rows(jnp.ones((1, 128)), place, source, implementation="pallas")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "[[0]]"
    assert "no Pallas kernels by Triton" in second
