"""Which kernels which device gets."""

import importlib
import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax.ops import _hardware, encode

DEVICES = {
    "7.5": (False, False),  # T4
    "8.0": (True, False),  # A100
    "8.6": (False, False),
    "8.9": (False, False),  # L4
    "9.0": (True, True),  # H100
    "10.0": (True, False),  # B200
    "12.0": (False, False),
    "gfx942": (False, False),
    None: (False, False),
}


@pytest.fixture
def device(monkeypatch):
    """Makes a first device of the given compute capability."""

    def pretend(capability):
        gpu = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if capability else "cpu")
        monkeypatch.setattr(jax, "devices", lambda: [gpu])
        _hardware.compute_capability.cache_clear()

    yield pretend
    monkeypatch.undo()
    _hardware.compute_capability.cache_clear()


@pytest.mark.skipif(_hardware.triton is None, reason="this jax has no Triton backend")
@pytest.mark.parametrize("capability", DEVICES)
def test_kernels_run_where_they_fit(device, capability):
    device(capability)
    assert (_hardware.runs_triton(), _hardware.is_hopper()) == DEVICES[capability]


@pytest.mark.skipif(_hardware.triton is None, reason="this jax has no Triton backend")
@pytest.mark.parametrize(("capability", "how"), [("7.5", "matmul"), ("9.0", "kernels")])
def test_other_gpus_search_by_matmul(device, capability, how):
    nearest = importlib.import_module("moe_jax.ops.search.nearest")
    keys = jnp.eye(256, 128)
    among = nearest._Among(keys, jnp.ones((1, 256), bool), 4, jnp.float32(-1), "quick")
    code = encode(keys)
    device(capability)
    assert nearest._resolve(None, 2, among, code) == how
