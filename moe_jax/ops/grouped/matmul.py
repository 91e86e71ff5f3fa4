"""Each group of rows times its own matrix: one API, a reference, and what runs fast where."""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moe_jax._types import Array, Float, Int
from moe_jax.ops.activations import ACTIVATIONS, activate, pull_back
from moe_jax.ops.grouped import _hopper, _portable
from moe_jax.ops.grouped.groups import Groups, group_of_rows, is_row, make_groups
from moe_jax.ops.grouped.values import row_sums, to_rows

SUMS = "grouped_matmul"
"""By this name a policy of `jax.checkpoint` keeps the products that the gradient needs."""


def grouped_matmul(
    x: Float[Array, "R _"],
    w: Float[Array, "_ _ J"],
    groups: Groups | Int[Array, "_"],
    *,
    bias: Float[Array, "_ J"] | None = None,
    activation: str | None = None,
    residual: Float[Array, "_ _"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R _"]:
    """Multiplies the rows of group e by w[e]; differentiable in all but the groups.

    With `Groups` the rows are laid out as `make_groups` says, and are used where they lie. Padding
    in a group's last block must be finite, blocks of no group may hold anything, and what comes out
    in either must not be used. With sizes alone the groups follow each other, the rows after the
    last may hold anything and come out zero, and laying rows out and back costs a copy each way.

    Sums are taken in float32. The same input gives the same bits every time.

    Args:
        x: [R, I] rows.
        w: [E, I, J] of the same dtype, a matrix for each group.
        groups: the layout of the R rows, or the sizes [E] int32 of consecutive groups, whose sum
            is at most R.
        bias: [E, J], one for each group, added to the products; None for none.
        activation: "gelu" or "gelu_tanh", taken of the sums; "swiglu", which takes the first half
            of a row as gates of the other, silu(gate) * up; None for none.
        residual: [R, J], or [R, J / 2] for "swiglu", added to the result; None for none. Its rows
            lie as those of `x` do, and its dtype is that of `x`.
        implementation: "xla", everywhere; "mosaic", kernels for NVIDIA Hopper (16-bit, I and J
            multiples of 128, jax 0.11); None for the kernels where they can run.

    Returns:
        [R, J] in the dtype of `x`, or [R, J / 2] for "swiglu".

    Raises:
        ValueError: shapes or dtypes do not fit, or "mosaic" is asked for and cannot run.

    Example:
        >>> import jax.numpy as jnp
        >>> x, w = jnp.ones((4, 2)), jnp.array([1.0, 2.0])[:, None, None] * jnp.ones((2, 2, 3))
        >>> grouped_matmul(x, w, jnp.array([1, 2]))[:, 0].tolist()
        [2.0, 4.0, 4.0, 0.0]
    """
    _check(x, w, groups)
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    shape = (x.shape[0], w.shape[2] // (1 + (activation == "swiglu")))
    if residual is not None and (residual.shape, residual.dtype) != (shape, x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} {shape}, got {residual.dtype} {residual.shape}"
        )
    has_kernels = _hopper.takes(x, w.shape)
    implementation = implementation or ("mosaic" if has_kernels else "xla")
    if implementation not in ("xla", "mosaic"):
        raise ValueError(f'implementation must be "xla", "mosaic" or None, got {implementation!r}')
    if implementation == "mosaic" and not has_kernels:
        raise ValueError(
            'implementation="mosaic" wants an NVIDIA Hopper GPU, jax 0.11, a 16-bit dtype and '
            f"widths that 128 divides, got {x.dtype}, w {w.shape} and {jax.default_backend()}"
        )
    if isinstance(groups, Groups):
        return _linear(x, w, bias, residual, groups, implementation, activation)
    layout = make_groups(groups, x.shape[0])
    laid_out, back = _places(groups, layout, x.shape[0])
    x, residual = (None if a is None else _take(a, laid_out) for a in (x, residual))
    return _take(_linear(x, w, bias, residual, layout, implementation, activation), back)


def _take(x: Float[Array, "R J"], row: Int[Array, "P"]) -> Float[Array, "P J"]:
    return x.at[row].get(mode="fill", fill_value=0, unique_indices=True)


def _check(x: Array, w: Array, groups: Groups | Array) -> None:
    is_layout = isinstance(groups, Groups)
    num_groups = groups.num_groups if is_layout else groups.shape[0]
    if w.shape[0] != num_groups:
        raise ValueError(f"w must have a matrix for each of {num_groups} groups, got {w.shape}")
    if x.shape[1] != w.shape[1]:
        raise ValueError(f"x {x.shape} and w {w.shape} must agree in the width of a row")
    if x.dtype != w.dtype:
        raise ValueError(f"x and w must have the same dtype, got {x.dtype} and {w.dtype}")
    if is_layout and x.shape[0] != groups.num_rows:
        raise ValueError(f"x must have the layout's {groups.num_rows} rows, got {x.shape[0]}")


def _places(
    size: Int[Array, "E"], layout: Groups, num_rows: int
) -> tuple[Int[Array, "P"], Int[Array, "R"]]:
    """Where the layout's rows come from among consecutive ones, and where those go."""
    begin = (jnp.cumsum(size) - size).astype(jnp.int32)
    row = jnp.arange(layout.num_rows, dtype=jnp.int32)
    group = jnp.minimum(group_of_rows(layout), layout.num_groups - 1)
    # Every index out of range is another one, as unique indices promise.
    come_from = jnp.where(is_row(layout), row - layout.start[group] + begin[group], num_rows + row)
    row = jnp.arange(num_rows, dtype=jnp.int32)
    group = jnp.searchsorted(begin + size, row, side="right").astype(jnp.int32)
    shift = jnp.append(layout.start - begin, layout.num_rows)[group]
    return come_from, row + shift


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _linear(
    x: Float[Array, "R I"],
    w: Float[Array, "E I J"],
    bias: Float[Array, "E J"] | None,
    residual: Float[Array, "R _"] | None,
    groups: Groups,
    implementation: str,
    activation: str | None,
) -> Float[Array, "R _"]:
    if implementation == "mosaic":
        if _hopper.fuses(activation, bias, residual, w.shape[2]):
            how = {"bias": bias, "activation": activation, "residual": residual}
            return _hopper.rows_by_matrices(x, w, groups, **how)
        out = _hopper.rows_by_matrices(x, w, groups, bias=bias)
    else:
        out = _portable.rows_by_matrices(x, w, groups)
        out = out if bias is None else out + to_rows(bias, groups)
    return _plus(activate(out, activation), residual)


def _plus(out: Array, residual: Array | None) -> Array:
    return out if residual is None else out + residual


def _linear_fwd(x, w, bias, residual, groups, implementation, activation):
    # An activation comes between, and its gradient needs the sums alone.
    fused, after = (None, residual) if activation else (residual, None)
    sums = checkpoint_name(_linear(x, w, bias, fused, groups, implementation, None), SUMS)
    has_residual = None if residual is None else ()  # no number, or it would be traced
    saved = x, w, bias, has_residual, groups, sums if activation else None
    return _plus(activate(sums, activation), after), saved


def _linear_bwd(implementation, activation, saved, grad):
    x, w, bias, has_residual, groups, sums = saved
    grad_residual = None if has_residual is None else grad
    if activation:
        grad = pull_back(sums, grad, activation)
    grad_bias = None if bias is None else row_sums(grad, groups).astype(bias.dtype)
    if implementation == "mosaic":
        grad_x = _hopper.rows_by_matrices(grad, w, groups, transpose=True)
        return grad_x, _hopper.rows_by_rows(x, grad, groups), grad_bias, grad_residual, None
    grad_x = _portable.rows_by_matrices(grad, jnp.swapaxes(w, 1, 2), groups)
    return grad_x, _portable.rows_by_rows(x, grad, groups), grad_bias, grad_residual, None


_linear.defvjp(_linear_fwd, _linear_bwd)
