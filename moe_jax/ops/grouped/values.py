"""One value per group, for every row of the group."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float
from moe_jax.ops.grouped.groups import BLOCK, Groups


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
    # A gather of blocks is small, and what repeats it is never stored.
    by_block = values.at[groups.block_group].get(mode="clip")
    return jnp.repeat(by_block, BLOCK, axis=0)


def row_sums(x: Float[Array, "R *J"], groups: Groups) -> Float[Array, "E *J"]:
    """Sums each group's rows in float32, in a fixed order.

    Padding in a group's last block must hold zeros; what lies after the last group may be anything.

    Args:
        x: [R, ...].
        groups: the layout of R rows.

    Returns:
        float32 [E, ...].

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.ops.grouped import is_row, make_groups
        >>> groups = make_groups(jnp.array([2, 1]), 3)
        >>> row_sums(is_row(groups).astype(jnp.float32), groups).tolist()
        [2.0, 1.0]
    """
    by_block = jnp.sum(x.reshape(-1, BLOCK, *x.shape[1:]), axis=1, dtype=jnp.float32)
    return block_sums(by_block, groups)


def block_sums(by_block: Float[Array, "I *J"], groups: Groups) -> Float[Array, "E *J"]:
    """Sums what each group's blocks hold, in a fixed order; blocks of no group may hold anything.

    Args:
        by_block: float32 [I, ...], one for each block of rows.
        groups: the layout of the rows.

    Returns:
        float32 [E, ...].

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.ops.grouped import make_groups
        >>> groups = make_groups(jnp.array([65, 1]), 66)
        >>> block_sums(jnp.arange(3.0), groups).tolist()
        [1.0, 2.0]
    """
    member = groups.block_group[None] == jnp.arange(groups.num_groups)[:, None]
    member = member.astype(jnp.float32)
    # Zero times what was never written may be no number.
    is_used = jnp.expand_dims(groups.block_group < groups.num_groups, range(1, by_block.ndim))
    by_block = jnp.where(is_used, by_block, 0.0)
    return jnp.tensordot(member, by_block, axes=1, precision=jax.lax.Precision.HIGHEST)


def _to_rows_fwd(values, groups):
    return to_rows(values, groups), (groups, values[:0])


def _to_rows_bwd(residuals, grad):
    groups, like = residuals
    return row_sums(grad, groups).astype(like.dtype), None


to_rows.defvjp(_to_rows_fwd, _to_rows_bwd)
