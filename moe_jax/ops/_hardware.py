"""What the first device is, where it decides which kernel runs."""

import functools

import jax

try:
    from jax.experimental.pallas import triton
except ImportError:  # jax means to drop it one day
    triton = None

__all__ = ["is_hopper", "runs_triton", "triton"]


def runs_triton() -> bool:
    """Whether kernels of Pallas's Triton backend run: on a GPU, and while jax has that backend."""
    return triton is not None and jax.default_backend() == "gpu"


@functools.cache
def is_hopper() -> bool:
    """Whether programs run on an NVIDIA GPU of compute capability 9."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
