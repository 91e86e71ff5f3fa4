"""Layer normalisation of rows in groups, each with a scale and bias of its own."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Dtype, Float
from moe_jax.ops._hardware import launch, triton_or_xla
from moe_jax.ops.activations import activate, gelu_tanh, gelu_tanh_slope
from moe_jax.ops.grouped import BLOCK, Groups, block_sums, to_rows
from moe_jax.ops.layer_norm import layer_norm, moments, pull_back

__all__ = ["group_layer_norm", "group_layer_norm_branch"]

_WIDTHS = 256, 4096  # that fill a program's threads and fit their registers


def group_layer_norm(
    x: Float[Array, "R D"],
    scale: Float[Array, "E D"],
    bias: Float[Array, "E D"],
    groups: Groups,
    *,
    dtype: Dtype,
    activation: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """Like `layer_norm`, with the scale and bias of each row's group.

    Args:
        x: [R, D], rows in groups.
        scale: [E, D].
        bias: [E, D].
        groups: the layout of the R rows. Gradients of the result must be zero in padding; blocks of
            no group may hold anything, and so does the result there.
        dtype: of the result.
        activation: "gelu" or "gelu_tanh", taken of the result; None for none.
        implementation: "xla", everywhere; "pallas", kernels for NVIDIA GPUs that read and write
            everything once (D a power of two from 256 to 4096); None for the kernels on Hopper
            with 16 bits.

    Returns:
        [R, D].

    Raises:
        ValueError: `implementation` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.ops.grouped import make_groups
        >>> groups = make_groups(jnp.array([1, 1]), 2)
        >>> x, scale = jnp.array([[1.0, 3.0]]).repeat(128, 0), jnp.array([[1.0] * 2, [2.0] * 2])
        >>> out = group_layer_norm(x, scale, scale, groups, dtype=jnp.float32)
        >>> out[jnp.array([0, 64])].round(3).tolist()
        [[0.0, 2.0], [0.0, 4.0]]
    """
    how = _how(implementation, x, dtype, activation)
    if how is None:
        return _by_xla(x, scale, bias, groups, dtype, activation)
    out = _norm(x, scale, bias, groups, how)
    return activate(out, None if how.activation else activation)


def group_layer_norm_branch(
    x: Float[Array, "R D"],
    scale: Float[Array, "E D"],
    bias: Float[Array, "E D"],
    groups: Groups,
    *,
    dtype: Dtype,
    activation: str | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "R D"], Float[Array, "R D"]]:
    """`x` and its `group_layer_norm`, for a layer that is added to what it normalises.

    The kernel then adds the two gradients of `x` in the pass that makes the second.

    Args:
        x: [R, D], rows in groups.
        scale: [E, D].
        bias: [E, D].
        groups: as `group_layer_norm` takes it.
        dtype: of what is normalised.
        activation: as `group_layer_norm` takes it.
        implementation: likewise.

    Returns:
        `x`, and [R, D].

    Raises:
        ValueError: `implementation` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.ops.grouped import make_groups
        >>> x, one = jnp.array([[1.0, 3.0]]).repeat(64, 0), jnp.ones((1, 2))
        >>> x, unit = group_layer_norm_branch(
        ...     x, one, one, make_groups(jnp.array([1]), 1), dtype=jnp.float32
        ... )
        >>> (x + unit)[0].round(3).tolist()
        [1.0, 5.0]
    """
    how = _how(implementation, x, dtype, activation)
    if how is None:
        return x, _by_xla(x, scale, bias, groups, dtype, activation)
    x, out = _branch(x, scale, bias, groups, how)
    return x, activate(out, None if how.activation else activation)


def _by_xla(x, scale, bias, groups, dtype, activation):
    # In float32, or the gradient of each row would be rounded before their sum is.
    own = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (scale, bias))
    return activate(layer_norm(x, *(to_rows(a, groups) for a in own), dtype), activation)


class _How(NamedTuple):
    """What the kernels are told: dtype of the result, activation that they take, interpreted."""

    dtype: Dtype
    activation: str | None
    interpret: bool


def _how(implementation: str | None, x: Array, dtype: Dtype, activation: str | None) -> _How | None:
    """None for XLA."""
    width = x.shape[1]
    fits = width & (width - 1) == 0 and _WIDTHS[0] <= width <= _WIDTHS[1]
    implementation = triton_or_xla(implementation, x, fits=fits)
    if implementation == "xla":
        return None
    own = activation if activation == "gelu_tanh" else None
    return _How(dtype, own, implementation == "interpret")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _norm(x, scale, bias, groups, how):
    # One after the other, so that scale and bias are read less often, where there are enough.
    rows = 4 if x.shape[0] >= 2**14 else 1
    return launch(
        functools.partial(_norm_kernel, activation=how.activation, rows=rows),
        (x.shape[0] // rows,),
        (x, scale, bias, groups.block_group),
        jax.ShapeDtypeStruct(x.shape, how.dtype),
        num_warps=_num_warps(x),
        interpret=how.interpret,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _branch(x, scale, bias, groups, how):
    return x, _norm(x, scale, bias, groups, how)


def _gradients(how, residuals, grads):
    """Those of x, scale and bias, from that of the result and, if there is one, of x itself."""
    x, scale, bias, groups = residuals
    num_blocks, width = x.shape[0] // BLOCK, x.shape[1]
    grad_x, by_block = launch(
        functools.partial(_norm_backward_kernel, activation=how.activation),
        (num_blocks,),
        (x, scale, bias, groups.block_group, *grads),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((num_blocks, 2, width), jnp.float32),
        ),
        num_warps=_num_warps(x),
        interpret=how.interpret,
    )
    sums = block_sums(by_block, groups)
    return grad_x, sums[:, 0].astype(scale.dtype), sums[:, 1].astype(bias.dtype), None


def _num_warps(x: Float[Array, "R D"]) -> int:
    """More would wait longer for each other at every sum along a row."""
    return max(1, x.shape[1] // 1024)


_norm.defvjp(
    lambda *inputs: (_norm(*inputs), inputs[:4]),
    lambda how, residuals, grad: _gradients(how, residuals, (grad,)),
)
_branch.defvjp(
    lambda *inputs: (_branch(*inputs), inputs[:4]),
    lambda how, residuals, grads: _gradients(how, residuals, grads[::-1]),
)


def _norm_kernel(x_ref, scale_ref, bias_ref, group_ref, out_ref, *, activation, rows):
    first = pl.program_id(0) * rows
    scale, bias = _own(first // BLOCK, group_ref, scale_ref, bias_ref)

    def step(i, _):
        row = pl.ds(first + i, 1)
        mean, inverse = moments(x := x_ref[row, :].astype(jnp.float32))
        out = (x - mean) * (inverse * scale) + bias
        out_ref[row, :] = (gelu_tanh(out) if activation else out).astype(out_ref.dtype)

    jax.lax.fori_loop(*_range(first // BLOCK, group_ref, scale_ref, rows), step, None)


def _norm_backward_kernel(x_ref, scale_ref, bias_ref, group_ref, grad_ref, *refs, activation):
    *passed, grad_x_ref, sums_ref = refs
    block, width = pl.program_id(0), x_ref.shape[1]
    scale, bias = _own(block, group_ref, scale_ref, bias_ref)

    def step(i, sums):
        row = pl.ds(block * BLOCK + i, 1)
        mean, inverse = moments(x := x_ref[row, :].astype(jnp.float32))
        grad, unit = grad_ref[row, :].astype(jnp.float32), (x - mean) * inverse
        if activation:
            grad *= gelu_tanh_slope(unit * scale + bias)
        grad_x = pull_back(unit, inverse, grad * scale)
        for ref in passed:
            grad_x += ref[row, :].astype(jnp.float32)
        grad_x_ref[row, :] = grad_x.astype(grad_x_ref.dtype)
        return sums[0] + grad[0] * unit[0], sums[1] + grad[0]

    rows = _range(block, group_ref, scale_ref, BLOCK)
    sums = jax.lax.fori_loop(*rows, step, (jnp.zeros(width), jnp.zeros(width)))
    sums_ref[block, 0, :], sums_ref[block, 1, :] = sums


def _own(block, group_ref, *refs):
    """What the rows of a block share: of each reference to [E, D] its group's, [1, D] float32."""
    # Blocks after the last group have none, and nothing is done with them.
    group = jnp.minimum(group_ref[block], refs[0].shape[0] - 1)
    return (ref[group, :].astype(jnp.float32)[None, :] for ref in refs)


def _range(block, group_ref, like_ref, num_rows):
    """From 0 to `num_rows`, or to 0 where the block is of no group."""
    is_used = group_ref[block] < like_ref.shape[0]
    return jnp.int32(0), jnp.where(is_used, jnp.int32(num_rows), jnp.int32(0))
