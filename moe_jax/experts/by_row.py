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

__all__ = ["Rows", "linear", "spread"]


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
) -> Float[Array, "R _"]:
    """Every row times its own expert's matrix, plus its bias.

    Args:
        x: [R, I], the rows of all experts.
        kernel: [I, J], one expert's, mapped over by the bank's `vmap`.
        bias: [J], likewise; None for none.
        groups: the experts' rows.
        activation: of the sums, as `moe_jax.ops.grouped.grouped_matmul` takes it.

    Returns:
        [R, J], or [R, J / 2] for "swiglu".
    """

    def of_all(x: Array, kernel: Array, bias: Array | None, groups: Groups) -> Array:
        return grouped_matmul(x, kernel, groups, bias=bias, activation=activation)

    @custom_vmap
    def run(x: Array, kernel: Array, bias: Array | None, groups: Groups) -> Array:
        # Outside the bank one expert's parameters serve all rows.
        shared = (_of_all(groups.num_groups, a) for a in (kernel, bias))
        return of_all(x, *shared, groups)

    @run.def_vmap
    def _(size: int, is_mapped: Any, x: Array, kernel: Array, bias: Array | None, groups: Groups):
        _check_shared(is_mapped)
        own = (
            a if mapped else _of_all(size, a)
            for a, mapped in zip((kernel, bias), is_mapped[1:3], strict=True)
        )
        return of_all(x, *own, groups), False

    return run(x, kernel, bias, groups)


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
def _(size: int, is_mapped: Any, x: Array, values: Array, groups: Groups) -> tuple:
    _check_shared(is_mapped)
    return to_rows(values if is_mapped[1] else _of_all(size, values), groups), False


def _check_shared(is_mapped: Any) -> None:
    if is_mapped[0] or any(jax.tree.leaves(is_mapped[-1])):
        raise ValueError("rows of experts must be shared by all experts, and not mapped over")


def _of_all(size: int, parameter: Array | None) -> Array | None:
    """The same parameter for every expert."""
    if parameter is None:
        return None
    return jnp.broadcast_to(parameter[None], (size, *parameter.shape))
