"""What one expert does where the rows of all E experts lie in one array.

An expert is written for itself alone: its parameters are one expert's. `ExpertBank` runs it under
`vmap` over the parameters, on rows that are not mapped. These functions are where the two meet:
their rule for `vmap` sees the parameters of all experts, and its result is not mapped either.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from moe_jax._types import Array, Float, Int
from moe_jax.ops.grouped import Groups, grouped_matmul, to_rows

__all__ = ["Rows", "matmul", "spread"]


class Rows(NamedTuple):
    """Whose each row is.

    Attributes:
        groups: the experts' rows among R; group e is expert e's.
        sequence: [R] int32, the row of the batch that the token comes from. Those of an expert
            do not fall from one row to the next.
    """

    groups: Groups
    sequence: Int[Array, "R"]


@custom_vmap
def matmul(x: Float[Array, "R I"], w: Float[Array, "I J"], groups: Groups) -> Float[Array, "R J"]:
    """Every row times its own expert's matrix.

    Args:
        x: [R, I], the rows of all experts.
        w: [I, J], one expert's, mapped over by the bank's `vmap`.
        groups: the experts' rows.

    Returns:
        [R, J].
    """
    return x @ w


@matmul.def_vmap
def _(axis_size: int, is_mapped: Any, x: Array, w: Array, groups: Groups) -> tuple[Array, bool]:
    w = _of_all(axis_size, is_mapped, w)
    return grouped_matmul(x, w, groups), False


@custom_vmap
def spread(
    x: Float[Array, "R ..."], values: Float[Array, "*J"], groups: Groups
) -> Float[Array, "R *J"]:
    """Every row's own expert's parameter.

    Args:
        x: anything that has R rows, of which only the number is used.
        values: [...], one expert's, mapped over by the bank's `vmap`.
        groups: the experts' rows.

    Returns:
        [R, ...]; that of some expert in padding.
    """
    return jnp.broadcast_to(values[None], (x.shape[0], *values.shape))


@spread.def_vmap
def _(axis_size: int, is_mapped: Any, x: Array, values: Array, groups: Groups) -> tuple:
    values = _of_all(axis_size, is_mapped, values)
    return to_rows(values, groups), False


def _of_all(axis_size: int, is_mapped: Any, parameter: Array) -> Array:
    rows_mapped, mapped, groups_mapped = is_mapped
    if any(jax.tree.leaves((rows_mapped, groups_mapped))):
        raise ValueError("rows of experts must be shared by all experts, and not mapped over")
    if mapped:
        return parameter
    return jnp.broadcast_to(parameter[None], (axis_size, *parameter.shape))
