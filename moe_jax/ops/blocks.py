"""A function of rows, taken a block of rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax._types import Array

__all__ = ["in_blocks"]


def in_blocks(function: Callable[..., Any], inputs: tuple, size: int) -> Any:
    """Apply a function of rows to at most `size` rows at a time, in blocks of one length.

    Args:
      function: takes the leaves of `inputs` and gives arrays of as many rows.
      inputs: arguments of the function, trees of arrays with the rows in front.
      size: the most rows at once, at least 1.

    Returns:
      What the function gives for all rows.

    Example:
      >>> in_blocks(lambda x: 2 * x, (jnp.arange(5),), 2).tolist()
      [0, 2, 4, 6, 8]
    """
    rows = jax.tree.leaves(inputs)[0].shape[0]
    if not rows:  # which few functions, and no kernel, can take
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
        shapes = jax.eval_shape(function, *one)
        return jax.tree.map(lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype), shapes)
    if rows <= size:
        return function(*inputs)
    count = -(-rows // size)
    size = -(-rows // count)

    def split(x: Array) -> Array:
        pad = ((0, count * size - rows),) + ((0, 0),) * (x.ndim - 1)
        return jnp.pad(x, pad).reshape(count, size, *x.shape[1:])

    found = jax.lax.map(lambda part: function(*part), jax.tree.map(split, inputs))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], found)
