"""What one expert does where the rows of all E experts lie in one array.

An expert is written for itself alone: its parameters are one expert's. `ExpertBank` runs it under
`vmap` over the parameters, on rows that are not mapped. These functions are where the two meet:
their rule for `vmap` sees the parameters of all experts, and its result is not mapped either.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from moe_jax._types import Array, Dtype, Float, Int
from moe_jax.ops.group_layer_norm import group_layer_norm, group_layer_norm_branch
from moe_jax.ops.grouped import Groups, grouped_matmul, to_rows

__all__ = ["Rows", "linear", "norm", "norm_branch", "spread"]


class Rows(NamedTuple):
    """Whose each row is.

    Attributes:
        groups: the experts' rows among R; group e is expert e's.
        sequence: [R] int32, the row of the batch that the token comes from. Those of an expert
            do not fall from one row to the next.
    """

    groups: Groups
    sequence: Int[Array, "R"]


def linear(
    x: Float[Array, "R I"],
    kernel: Float[Array, "I J"],
    bias: Float[Array, "J"] | None,
    groups: Groups,
    activation: str | None = None,
    residual: Float[Array, "R _"] | None = None,
) -> Float[Array, "R _"]:
    """Every row times its own expert's matrix, plus its bias.

    Args:
        x: [R, I], the rows of all experts.
        kernel: [I, J], one expert's, mapped over by the bank's `vmap`.
        bias: [J], likewise; None for none.
        groups: the experts' rows.
        activation: of the sums, as `moe_jax.ops.grouped.grouped_matmul` takes it.
        residual: added to the result; None for none.

    Returns:
        [R, J], or [R, J / 2] for "swiglu".
    """

    def of_all(
        rows: tuple[Array, Array | None], kernel: Array, bias: Array | None, groups: Groups
    ) -> Array:
        how = {"bias": bias, "activation": activation, "residual": rows[1]}
        return grouped_matmul(rows[0], kernel, groups, **how)

    return _by_expert(of_all, (x, residual), (kernel, bias), groups)


def norm(
    x: Float[Array, "R D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    groups: Groups,
    dtype: Dtype,
    activation: str | None = None,
) -> Float[Array, "R D"]:
    """Layer normalisation of every row, with its own expert's scale and bias.

    Args:
        x: [R, D], the rows of all experts.
        scale: [D], one expert's, mapped over by the bank's `vmap`.
        bias: [D], likewise.
        groups: the experts' rows.
        dtype: of the result.
        activation: of the result, as `moe_jax.ops.group_layer_norm.group_layer_norm` takes it.

    Returns:
        [R, D].
    """
    of_all = functools.partial(group_layer_norm, dtype=dtype, activation=activation)
    return _by_expert(of_all, x, (scale, bias), groups)


def norm_branch(
    x: Float[Array, "R D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"],
    groups: Groups,
    dtype: Dtype,
    activation: str | None = None,
) -> tuple[Float[Array, "R D"], Float[Array, "R D"]]:
    """`x` and its `norm`; see `moe_jax.ops.group_layer_norm.group_layer_norm_branch`."""
    of_all = functools.partial(group_layer_norm_branch, dtype=dtype, activation=activation)
    return _by_expert(of_all, x, (scale, bias), groups)


def spread(
    x: Float[Array, "R _"], values: Float[Array, "*J"], groups: Groups
) -> Float[Array, "R *J"]:
    """Every row's own expert's parameter.

    Args:
        x: [R, ...], the rows of all experts; it is only checked that they share it.
        values: [...], one expert's, mapped over by the bank's `vmap`.
        groups: the experts' rows.

    Returns:
        [R, ...]; that of some expert in padding.
    """
    return _by_expert(lambda _, values, groups: to_rows(values, groups), x, (values,), groups)


def _by_expert(of_all: Callable, x: Any, own: tuple[Array | None, ...], groups: Groups) -> Any:
    """Calls `of_all(x, *parameters of all experts, groups)`, given one expert's or all."""

    @custom_vmap
    def run(x: Any, own: tuple[Array | None, ...], groups: Groups) -> Any:
        # Outside the bank one expert's parameters serve all rows.
        return of_all(x, *(_of_all(groups.num_groups, a) for a in own), groups)

    @run.def_vmap
    def _(size: int, is_mapped: Any, x: Any, own: tuple[Array | None, ...], groups: Groups):
        if any(jax.tree.leaves((is_mapped[0], is_mapped[2]))):
            raise ValueError("rows of experts must be shared by all experts, and not mapped over")
        mapped = (
            a if is_own else _of_all(size, a) for a, is_own in zip(own, is_mapped[1], strict=True)
        )
        out = of_all(x, *mapped, groups)
        return out, jax.tree.map(lambda _: False, out)

    return run(x, own, groups)


def _of_all(size: int, parameter: Array | None) -> Array | None:
    """The same parameter for every expert."""
    if parameter is None:
        return None
    return jnp.broadcast_to(parameter[None], (size, *parameter.shape))
