"""Eight virtual CPU devices, strict rank promotion and annotations checked at run time."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

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


# Single long tests come first, so that no worker is left alone with one at the end.
FIRST = ("test_a_killed_process", "test_notebook", "test_checkpoint_kill")
# Compiling is most of the work. Where tests hold bits across programs, shapes and devices, they run
# what users run. The others hold texts, files, counts and numbers within a tolerance: their
# programs are compiled without LLVM's optimisations, and come last.
EXACT = ("graph", "ops")
LOOSE = tuple(
    f"test_graph_{name}.py"
    for name in ("bad_input", "cluster", "health", "local", "pagerank", "parity", "probe_kernels",
                 "remove", "traverse")
)  # fmt: skip


def is_loose(path):
    return path.parent.name not in EXACT or path.name in LOOSE


def place(item):
    if any(name in item.nodeid for name in FIRST):
        return 0
    return 1 + is_loose(item.path)


# Every compiled program keeps a few memory mappings, of which Linux gives a process 65,530; the one
# that asks for more dies of it. No single file needs half as many.
MANY_MAPPINGS = 25_000
MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def mappings():
    """Forgets the compiled programs of earlier files before there are too many."""
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MANY_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module", autouse=True)
def optimisations(request):
    """Sets the effort of compiling; an exact file never meets a loose file's programs."""
    loose = is_loose(request.path) and jax.default_backend() == "cpu"
    if jax.config.read("jax_disable_most_optimizations") and not loose:
        jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", loose)


@pytest.fixture(autouse=True)
def full_products(request):
    """Multiplies float32 in float32 on a GPU, too, but in the tests that are about GPUs."""
    if jax.default_backend() == "gpu" and "gpu" not in request.keywords:
        with jax.default_matmul_precision("float32"):
            yield
    else:
        yield


@pytest.fixture
def eight_devices():
    """Skips where there are fewer; a CPU has as many virtual ones."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")


def pytest_collection_modifyitems(items):
    items.sort(key=place)
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
