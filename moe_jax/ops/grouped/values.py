"""One value per group, for every row of the group."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float
from moe_jax.ops.grouped.groups import BLOCK, Groups, group_of_rows


@jax.custom_vjp
def to_rows(values: Float[Array, "E *J"], groups: Groups) -> Float[Array, "R *J"]:
    """Gives every row its group's value; what padding gets must not be used.

    The gradient sums a group's rows in a fixed order, not by a scatter.

    Args:
        values: [E, ...], one for each group.
        groups: the layout of R rows.

    Returns:
        [R, ...].

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.ops.grouped import make_groups
        >>> groups = make_groups(jnp.array([2, 1]), 3)
        >>> to_rows(jnp.array([5.0, 7.0]), groups)[jnp.array([0, 1, 64])].tolist()
        [5.0, 5.0, 7.0]
    """
    return values.at[group_of_rows(groups)].get(mode="clip")


def _to_rows_fwd(values, groups):
    return to_rows(values, groups), (groups, values[:0])


def _to_rows_bwd(residuals, grad):
    groups, like = residuals
    by_block = grad.reshape(-1, BLOCK, *grad.shape[1:]).sum(axis=1, dtype=jnp.float32)
    member = groups.block_group[None] == jnp.arange(groups.num_groups)[:, None]
    sums = jnp.tensordot(
        member.astype(jnp.float32), by_block, axes=1, precision=jax.lax.Precision.HIGHEST
    )
    return sums.astype(like.dtype), None


to_rows.defvjp(_to_rows_fwd, _to_rows_bwd)
