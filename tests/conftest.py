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
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("moe_jax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")


LONG = ("test_notebook", "test_a_killed_process", "test_checkpoint_kill", "test_cli")


def pytest_collection_modifyitems(items):
    # The longest first, so that no worker is left alone with one at the end.
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONG))
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
