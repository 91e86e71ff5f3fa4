"""What the first device is, where it decides which kernel runs, and how kernels are launched."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import pallas as pl

from moe_jax._types import Array

try:
    from jax.experimental.pallas import triton
except ImportError:  # jax means to drop it one day
    triton = None

__all__ = [
    "compute_capability", "is_hopper", "launch", "num_multiprocessors", "runs_triton", "triton",
    "triton_or_xla",
]  # fmt: skip


@functools.cache
def compute_capability() -> tuple[int, int]:
    """Of the first NVIDIA GPU, such as (9, 0) for Hopper; (0, 0) where there is none."""
    name = ""
    if jax.default_backend() == "gpu":
        name = str(getattr(jax.devices()[0], "compute_capability", ""))
    major, _, minor = name.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)


def is_hopper() -> bool:
    """Whether programs run on an NVIDIA GPU of compute capability 9."""
    return compute_capability()[0] == 9


def runs_triton() -> bool:
    """Whether kernels of Pallas's Triton backend run: while jax has it, on A100, Hopper and later.

    Triton takes no GPU before Ampere, and those of workstations have less shared memory than the
    kernels here ask for.
    """
    capability = compute_capability()
    return triton is not None and (capability == (8, 0) or capability[0] in (9, 10))


@functools.cache
def num_multiprocessors() -> int:
    """Of the first GPU; of an H100 where there is none."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 132


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


def launch(
    kernel: Callable | functools.partial,
    grid: tuple[int, ...],
    inputs: tuple[Array, ...],
    outputs: Any,
    *,
    num_warps: int,
    num_stages: int | None = 3,
    aliases: Mapping[int, int] = MappingProxyType({}),
    interpret: bool,
) -> Any:
    """Run a kernel, named `_name_kernel`, on whole arrays, of which a program loads what it wants.

    Args:
      kernel: takes a reference to each input, then to each output.
      grid: how many programs along each axis.
      inputs: arrays.
      outputs: a tree of shapes and dtypes.
      num_warps: of a program.
      num_stages: of a program's loops.
      aliases: which input's memory becomes which output's.
      interpret: run it as ordinary operations, on any device, to test it.

    Returns:
      Arrays like `outputs`.

    Raises:
      RuntimeError: jax has no Triton backend.
    """
    if triton is None:
        raise RuntimeError(
            "this jax has no Pallas kernels by Triton; choose another implementation"
        )

    def whole(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape))

    name = getattr(kernel, "func", kernel).__name__
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[whole(x) for x in inputs],
        out_specs=jax.tree.map(whole, outputs),
        out_shape=outputs,
        compiler_params=triton.CompilerParams(num_warps=num_warps, num_stages=num_stages),
        input_output_aliases=dict(aliases),
        interpret=interpret,
        name=name.strip("_").removesuffix("_kernel"),
    )(*inputs)
