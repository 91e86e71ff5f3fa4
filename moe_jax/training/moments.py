"""An optimizer's state in 16 bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax._types import Array, Int, Variables
from moe_jax.ops.rounding import stochastic_round

__all__ = ["StoredState", "store_in_bfloat16"]


class StoredState(NamedTuple):
    """The state of `store_in_bfloat16`.

    Attributes:
        count: [] int32, updates done.
        inner: the optimizer's state, large float32 arrays in bfloat16.
    """

    count: Int[Array, ""]
    inner: Any


def store_in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps an optimizer's moments in bfloat16, and computes in float32.

    For AdamW this is 8 bytes a parameter less to hold and to move in every step, 20 in place of 28
    with 16-bit copies of matrices. Moments are rounded stochastically, without which the second
    would stand still: it moves by a thousandth of itself, and bfloat16 has eight bits. What is
    given up is precision of single moments, a 256th; their means are kept.

    Args:
        optimizer: any; its state's float32 arrays of two or more axes are stored in 16 bits.

    Returns:
        An optax transformation.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> optimizer = store_in_bfloat16(optax.adam(0.1))
        >>> state = optimizer.init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
        >>> state.inner[0].nu["w"].dtype, state.inner[0].nu["b"].dtype
        (dtype(bfloat16), dtype('float32'))
    """

    def store(state: Any, count: Int[Array, ""]) -> StoredState:
        leaves, tree = jax.tree.flatten(state)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
        stored = [
            stochastic_round(leaf, key) if _is_large(leaf, jnp.float32) else leaf
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        return StoredState(count, jax.tree.unflatten(tree, stored))

    def init(params: Variables) -> StoredState:
        return store(optimizer.init(params), jnp.zeros((), jnp.int32))

    def update(
        updates: Variables, state: StoredState, params: Variables | None = None
    ) -> tuple[Variables, StoredState]:
        wide = jax.tree.map(
            lambda a: a.astype(jnp.float32) if _is_large(a, jnp.bfloat16) else a, state.inner
        )
        updates, inner = optimizer.update(updates, wide, params)
        return updates, store(inner, state.count + 1)

    return optax.GradientTransformation(init, update)


def _is_large(leaf: Any, dtype: Any) -> bool:
    return getattr(leaf, "dtype", None) == dtype and leaf.ndim >= 2
