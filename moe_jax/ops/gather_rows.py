"""Rows of an array by their numbers, in an order that keeps what is read in the cache."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Float, Int
from moe_jax.ops._hardware import launch, triton_or_xla
from moe_jax.ops._hardware import triton as plgpu

__all__ = ["gather_rows"]

_ROWS = 32
_CACHED_BYTES = 2**24  # of `x` that are read at a time: a third of the L2 cache


def gather_rows(
    x: Float[Array, "I D"],
    row: Int[Array, "J"],
    scale: Float[Array, "J"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "J D"]:
    """Takes rows of `x`, times a factor each; it has no gradient of its own.

    Where each row is taken several times, what limits is how often it comes from memory. The kernel
    takes some columns of all rows before the next columns, few enough that they stay in the L2
    cache, so that memory is read once.

    Args:
        x: [I, D].
        row: [J] int32; a row out of range reads zero.
        scale: [J] float32; None for ones.
        implementation: "xla", everywhere; "pallas", a kernel for NVIDIA GPUs (128 divides D, 32
            divides J); None for the kernel where it pays: on Hopper, with 16 bits and an `x` too
            large for the cache.

    Returns:
        [J, D] in the dtype of `x`; products are taken in float32.

    Raises:
        ValueError: `implementation` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> gather_rows(x, jnp.array([1, 2]), jnp.array([0.5, 1.0])).tolist()
        [[1.5, 2.0], [0.0, 0.0]]
    """
    is_large = x.size * x.dtype.itemsize > _CACHED_BYTES
    fits = is_large and x.shape[1] % 128 == 0 and row.shape[0] % _ROWS == 0
    implementation = triton_or_xla(implementation, x, fits=fits)
    if implementation == "xla":
        out = x.at[row].get(mode="fill", fill_value=0)
        if scale is None:
            return out
        return (out.astype(jnp.float32) * scale[:, None]).astype(x.dtype)
    columns = _columns(x)
    return launch(
        functools.partial(_gather_kernel, columns=columns, is_scaled=scale is not None),
        # Programs start in the order of the first axis: all rows, then the next columns.
        (row.shape[0] // _ROWS, x.shape[1] // columns),
        (x, row, row if scale is None else scale),
        jax.ShapeDtypeStruct((row.shape[0], x.shape[1]), x.dtype),
        num_warps=4,
        interpret=implementation == "interpret",
    )


def _columns(x: Float[Array, "I D"]) -> int:
    """As many as fit the cache, at least 128 and at most 1024."""
    columns = 128
    while (
        columns < 1024
        and x.shape[1] % (2 * columns) == 0
        and x.shape[0] * x.dtype.itemsize * 2 * columns <= _CACHED_BYTES
    ):
        columns *= 2
    return columns


def _gather_kernel(x_ref, row_ref, scale_ref, out_ref, *, columns, is_scaled):
    own = pl.ds(pl.program_id(0) * _ROWS, _ROWS)
    across = pl.program_id(1) * columns + jnp.arange(columns)
    row = row_ref[own]
    is_there = (row >= 0) & (row < x_ref.shape[0])
    at = jnp.where(is_there, row, 0)
    mask = jnp.broadcast_to(is_there[:, None], (_ROWS, columns))
    out = plgpu.load(x_ref.at[at[:, None], across[None, :]], mask=mask, other=0.0)
    if is_scaled:
        out = (out.astype(jnp.float32) * scale_ref[own][:, None]).astype(out_ref.dtype)
    out_ref[own, pl.ds(pl.program_id(1) * columns, columns)] = out
