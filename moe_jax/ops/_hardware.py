"""What the first device is, where it decides which kernel runs."""

import functools

import jax

__all__ = ["is_hopper"]


@functools.cache
def is_hopper() -> bool:
    """Whether programs run on an NVIDIA GPU of compute capability 9."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")
