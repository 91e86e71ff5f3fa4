"""What the first device is, where it decides which kernel runs."""

import functools

import jax

from moe_jax._types import Array

try:
    from jax.experimental.pallas import triton
except ImportError:  # jax means to drop it one day
    triton = None

__all__ = ["is_hopper", "runs_triton", "triton", "triton_or_xla"]


def runs_triton() -> bool:
    """Whether kernels of Pallas's Triton backend run: on a GPU, and while jax has that backend."""
    return triton is not None and jax.default_backend() == "gpu"


@functools.cache
def is_hopper() -> bool:
    """Whether programs run on an NVIDIA GPU of compute capability 9."""
    if jax.default_backend() != "gpu":
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")


def triton_or_xla(implementation: str | None, x: Array, *, fits: bool) -> str:
    """What computes a function of `x`: what was asked for, else a kernel where it pays.

    Args:
        implementation: "xla", "pallas", "interpret", or None for the kernel on Hopper with 16 bits.
        x: any of the function's arrays.
        fits: whether the kernel takes it, and is worth it.

    Raises:
        ValueError: `implementation` is unknown.
    """
    if implementation not in (None, "xla", "pallas", "interpret"):
        raise ValueError(f'implementation must be "xla" or "pallas", got {implementation!r}')
    pays = fits and x.dtype.itemsize == 2 and runs_triton() and is_hopper()
    return implementation or ("pallas" if pays else "xla")
