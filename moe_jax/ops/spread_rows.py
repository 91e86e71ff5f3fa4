"""Rows of an array copied to several places each."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Float, Int
from moe_jax.ops._hardware import launch, triton_or_xla
from moe_jax.ops._hardware import triton as plgpu

__all__ = ["spread_rows"]

_ENTRIES = 4096  # that a program copies at a time
_LEAST_BYTES = 2**23  # of `x`, for which a launch of two kernels pays
_ROWS = 64


def spread_rows(
    x: Float[Array, "I D"],
    place: Int[Array, "I K"],
    source: Int[Array, "J"],
    scale: Float[Array, "I K"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "J D"]:
    """Copies each row of `x` to its K places, times a factor each; it has no gradient of its own.

    The kernel reads every row once, writes it wherever it goes, and clears the places that nothing
    goes to; XLA gathers, and reads rows as often as they are written.

    Args:
        x: [I, D].
        place: [I, K] int32, all different; J and more for none.
        source: [J] int32, its inverse: i * K + k of what goes to a place, I * K for nothing.
        scale: [I, K] float32; None for ones.
        implementation: "xla", everywhere; "pallas", kernels for NVIDIA GPUs (128 divides D); None
            for the kernels where they pay: on Hopper, with 16 bits and 8 MiB of `x` or more.

    Returns:
        [J, D] in the dtype of `x`, zero where nothing goes; products are taken in float32.

    Raises:
        ValueError: `implementation` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> x, place = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[2], [0]])
        >>> spread_rows(x, place, jnp.array([1, 2, 0])).tolist()
        [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    """
    fits = x.size * x.dtype.itemsize >= _LEAST_BYTES and x.shape[1] % 128 == 0
    implementation = triton_or_xla(implementation, x, fits=fits)
    if implementation == "xla":
        out = x.at[source // place.shape[1]].get(mode="fill", fill_value=0)
        if scale is None:
            return out
        own = scale.reshape(-1).at[source].get(mode="fill", fill_value=0)
        return (out.astype(jnp.float32) * own[:, None]).astype(x.dtype)
    columns = math.gcd(x.shape[1], _ENTRIES)
    rows = _ENTRIES // columns
    run = functools.partial(launch, num_warps=4, interpret=implementation == "interpret")
    out = run(
        functools.partial(_spread_kernel, rows=rows, columns=columns, is_scaled=scale is not None),
        (x.shape[1] // columns, -(-x.shape[0] // rows)),
        (x, place, place if scale is None else scale),
        jax.ShapeDtypeStruct((source.shape[0], x.shape[1]), x.dtype),
    )
    return run(
        functools.partial(_clear_kernel, num_choices=place.size),
        (-(-source.shape[0] // _ROWS),),
        (out, source),
        jax.ShapeDtypeStruct(out.shape, out.dtype),
        aliases={0: 0},
    )


def _spread_kernel(x_ref, place_ref, scale_ref, out_ref, *, rows, columns, is_scaled):
    num_rows, num_places = place_ref.shape
    row, is_row = _own_rows(pl.program_id(1), rows, num_rows)
    across = (pl.program_id(0) * columns + jnp.arange(columns))[None, :]
    x = plgpu.load(x_ref.at[row[:, None], across])
    for k in range(num_places):
        place = jnp.where(is_row, plgpu.load(place_ref.at[row, k]), out_ref.shape[0])
        own = x
        if is_scaled:
            scale = plgpu.load(scale_ref.at[row, k])[:, None]
            own = (x.astype(jnp.float32) * scale).astype(x.dtype)
        goes = jnp.broadcast_to((place < out_ref.shape[0])[:, None], x.shape)
        plgpu.store(out_ref.at[place[:, None], across], own, mask=goes)


def _clear_kernel(_, source_ref, out_ref, *, num_choices):
    """Writes zeros where nothing went."""
    num_rows, dim = out_ref.shape
    row, is_row = _own_rows(pl.program_id(0), _ROWS, num_rows)
    is_empty = is_row & (plgpu.load(source_ref.at[row]) >= num_choices)
    to = jnp.where(is_empty, row, num_rows)[:, None]
    columns = math.gcd(dim, 128)
    zeros = jnp.zeros((_ROWS, columns), out_ref.dtype)
    mask = jnp.broadcast_to(is_empty[:, None], zeros.shape)

    def clear(i, carry):
        across = (i * columns + jnp.arange(columns))[None, :]
        plgpu.store(out_ref.at[to, across], zeros, mask=mask)
        return carry

    # Most programs have nothing to clear.
    jax.lax.fori_loop(0, jnp.max(jnp.where(is_empty, dim // columns, 0)), clear, None)


def _own_rows(program: Array, count: int, num_rows: int) -> tuple[Array, Array]:
    """The rows of a program, and which of them there are."""
    row = program * count + jnp.arange(count)
    return jnp.minimum(row, num_rows - 1), row < num_rows
