"""Eight virtual CPU devices, strict rank promotion and annotations checked at run time."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Many tests compile the same programs; parallel workers inherit this folder and share it.
    _cache = tempfile.mkdtemp(prefix="moe_jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("moe_jax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")


# Single long tests come first, so that no worker is left alone with one at the end. Files whose
# numbers are loose come last and are compiled without most optimisations: what they hold are
# texts, files and rounded numbers, while tests of numbers run what users run.
FIRST = ("test_a_killed_process", "test_notebook", "test_checkpoint_kill")
LOOSE = (
    "test_graph_local.py",
    "test_graph_probe_kernels.py",
    "test_reads.py",
    "test_stream_eval.py",
    "test_cli.py",
    "test_examples.py",
)


def place(item):
    if item.path.name in LOOSE:
        return 2 + LOOSE.index(item.path.name)
    return 0 if any(name in item.nodeid for name in FIRST) else 1


@pytest.fixture(scope="module", autouse=True)
def optimisations(request):
    """Compiles a loose file's programs fast; no other file may then meet one of these programs."""
    is_loose = request.path.name in LOOSE
    if jax.config.read("jax_disable_most_optimizations") and not is_loose:
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", is_loose)


def pytest_collection_modifyitems(items):
    items.sort(key=place)
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
