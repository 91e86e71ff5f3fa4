"""Layer normalisation, with one scale and bias or with those of each row's group."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Dtype, Float
from moe_jax.ops._hardware import triton_or_xla
from moe_jax.ops._kernel_parts import launch
from moe_jax.ops.grouped import BLOCK, Groups, block_sums, to_rows

__all__ = ["EPS", "group_layer_norm", "group_layer_norm_branch", "layer_norm"]

EPS = 1e-5

_WIDTHS = 256, 4096  # that fill a program's threads and fit their registers


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "*#B D"],
    bias: Float[Array, "*#B D"],
    dtype: Dtype,
) -> Float[Array, "*B D"]:
    """Normalises the last axis, with statistics in float32 (Ba et al. 2016, equation 4).

    Args:
        x: [..., D].
        scale: [..., D], with as many axes as `x`, each of its size or 1.
        bias: like `scale`.
        dtype: of the result.

    Returns:
        [..., D].

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 2))
        >>> layer_norm(jnp.array([[1.0, 3.0]]), one, one, jnp.float32).round(3).tolist()
        [[0.0, 2.0]]
    """
    return _forward(x, scale, bias, dtype)[0]


def _forward(x, scale, bias, dtype):
    mean, inverse = _moments(x)
    out = (x.astype(jnp.float32) - mean) * (inverse * scale) + bias
    return out.astype(dtype), (x, scale, bias, mean, inverse)


def _backward(dtype, residuals, grad):
    del dtype
    # With the moments at hand everything but two sums along a row is elementwise, so that what
    # sums the gradients of scale and bias over rows fuses with what makes them.
    x, scale, bias, mean, inverse = residuals
    mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    grad = grad.astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * inverse
    grad_x = _pull_back(unit, inverse, grad * scale)
    return grad_x.astype(x.dtype), _unbroadcast(grad * unit, scale), _unbroadcast(grad, bias)


layer_norm.defvjp(_forward, _backward)


def group_layer_norm(
    x: Float[Array, "R D"],
    scale: Float[Array, "E D"],
    bias: Float[Array, "E D"],
    groups: Groups,
    *,
    dtype: Dtype,
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """Like `layer_norm`, with the scale and bias of each row's group.

    Args:
        x: [R, D], rows in groups.
        scale: [E, D].
        bias: [E, D].
        groups: the layout of the R rows. Gradients of the result must be zero in padding.
        dtype: of the result.
        implementation: "xla", everywhere; "pallas", a kernel for NVIDIA GPUs that reads what the
            gradient needs once (D a power of two from 256 to 4096); None for the kernel on
            Hopper with 16 bits.

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
    implementation = _choose(implementation, x)
    if implementation == "xla":
        return layer_norm(x, *_by_row(scale, bias, groups), dtype)
    return _of_groups(x, scale, bias, groups, dtype, implementation == "interpret")


def group_layer_norm_branch(
    x: Float[Array, "R D"],
    scale: Float[Array, "E D"],
    bias: Float[Array, "E D"],
    groups: Groups,
    *,
    dtype: Dtype,
    implementation: str | None = None,
) -> tuple[Float[Array, "R D"], Float[Array, "R D"]]:
    """`x` and its `group_layer_norm`, for a layer that is added to what it normalises.

    The kernel then adds the two gradients of `x` in the pass that makes the second.

    Args:
        x: [R, D], rows in groups.
        scale: [E, D].
        bias: [E, D].
        groups: the layout of the R rows.
        dtype: of what is normalised.
        implementation: as `group_layer_norm` takes it.

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
    implementation = _choose(implementation, x)
    if implementation == "xla":
        return x, layer_norm(x, *_by_row(scale, bias, groups), dtype)
    return _branch(x, scale, bias, groups, dtype, implementation == "interpret")


def _choose(implementation: str | None, x: Array) -> str:
    width = x.shape[1]
    fits = width & (width - 1) == 0 and _WIDTHS[0] <= width <= _WIDTHS[1]
    return triton_or_xla(implementation, x, fits=fits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _of_groups(x, scale, bias, groups, dtype, interpret):
    del interpret
    return _forward(x, *_by_row(scale, bias, groups), dtype)[0]


def _of_groups_forward(x, scale, bias, groups, dtype, interpret):
    return _of_groups(x, scale, bias, groups, dtype, interpret), (x, scale, bias, groups)


def _of_groups_backward(dtype, interpret, residuals, grad):
    del dtype
    return _gradients(residuals, (grad,), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _branch(x, scale, bias, groups, dtype, interpret):
    return x, _of_groups(x, scale, bias, groups, dtype, interpret)


def _branch_forward(x, scale, bias, groups, dtype, interpret):
    return _branch(x, scale, bias, groups, dtype, interpret), (x, scale, bias, groups)


def _branch_backward(dtype, interpret, residuals, grads):
    del dtype
    return _gradients(residuals, grads[::-1], interpret)


def _gradients(residuals, grads, interpret):
    """Those of x, scale and bias, from that of the result and, if there is one, of x itself."""
    x, scale, bias, groups = residuals
    num_blocks, width = x.shape[0] // BLOCK, x.shape[1]
    grad_x, by_block = launch(
        _norm_backward_kernel,
        (num_blocks,),
        (x, scale, groups.block_group, *grads),
        (
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((num_blocks, 2, width), jnp.float32),
        ),
        num_warps=4,
        interpret=interpret,
    )
    sums = block_sums(by_block, groups)
    return grad_x, sums[:, 0].astype(scale.dtype), sums[:, 1].astype(bias.dtype), None


_branch.defvjp(_branch_forward, _branch_backward)
_of_groups.defvjp(_of_groups_forward, _of_groups_backward)


def _by_row(scale: Float[Array, "E D"], bias: Float[Array, "E D"], groups: Groups) -> list[Array]:
    # In float32, or the gradient of each row would be rounded before their sum is.
    return [
        to_rows(a.astype(jnp.promote_types(a.dtype, jnp.float32)), groups) for a in (scale, bias)
    ]


def _norm_backward_kernel(x_ref, scale_ref, group_ref, grad_ref, *refs):
    *passed, grad_x_ref, sums_ref = refs
    block, width = pl.program_id(0), x_ref.shape[1]
    # Blocks after the last group have none, and no gradient either.
    group = jnp.minimum(group_ref[block], scale_ref.shape[0] - 1)
    scale = scale_ref[group, :].astype(jnp.float32)[None, :]

    def step(i, sums):
        row = pl.ds(block * BLOCK + i, 1)
        mean, inverse = _moments(x := x_ref[row, :].astype(jnp.float32))
        grad, unit = grad_ref[row, :].astype(jnp.float32), (x - mean) * inverse
        grad_x = _pull_back(unit, inverse, grad * scale)
        for ref in passed:
            grad_x += ref[row, :].astype(jnp.float32)
        grad_x_ref[row, :] = grad_x.astype(grad_x_ref.dtype)
        return sums[0] + grad[0] * unit[0], sums[1] + grad[0]

    sums = jax.lax.fori_loop(0, BLOCK, step, (jnp.zeros(width), jnp.zeros(width)))
    sums_ref[block, 0, :], sums_ref[block, 1, :] = sums


def _moments(x: Float[Array, "*B D"]) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"]]:
    """Mean and inverse standard deviation of each row, float32."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + EPS)


def _pull_back(
    unit: Float[Array, "*B D"], inverse: Float[Array, "*B 1"], pull: Float[Array, "*B D"]
) -> Float[Array, "*B D"]:
    """The gradient of what was normalised, from that of `unit`."""
    along = jnp.mean(pull * unit, axis=-1, keepdims=True)
    return inverse * (pull - jnp.mean(pull, axis=-1, keepdims=True) - unit * along)


def _unbroadcast(grad: Float[Array, "*B D"], like: Float[Array, "*#B D"]) -> Float[Array, "*#B D"]:
    """Sums a gradient over the axes along which `like` was repeated."""
    repeated = tuple(i for i, size in enumerate(like.shape[:-1]) if size != grad.shape[i])
    return jnp.sum(grad, axis=repeated, keepdims=True).astype(like.dtype)
