"""Checks of what comes with a batch of sequences."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Int

__all__ = ["checked_mask", "checked_source"]


def checked_mask(is_valid: ArrayLike | None, shape: tuple[int, ...]) -> Bool[Array, "B S"] | None:
    """The mask as bool; a shape that merely broadcasts would multiply the losses.

    Args:
        is_valid: bool or integers, or None.
        shape: (B, S).

    Returns:
        bool [B, S], or None.

    Raises:
        ValueError: is_valid has another shape or a float dtype.

    Example:
        >>> checked_mask(jnp.array([[1, 0]]), (1, 2)).tolist()
        [[True, False]]
    """
    if is_valid is None:
        return None
    is_valid = jnp.asarray(is_valid)
    if is_valid.shape != tuple(shape) or jnp.issubdtype(is_valid.dtype, jnp.inexact):
        raise ValueError(
            f"is_valid must be bool of shape [B, S] = {tuple(shape)}, "
            f"got {is_valid.dtype} of shape {is_valid.shape}"
        )
    return is_valid.astype(bool)


def checked_source(source: ArrayLike | None, batch: int) -> Int[Array, "B 2"] | None:
    """Documents and offsets, one pair for each sequence.

    Args:
        source: [B, 2] integers, or None.
        batch: B.

    Returns:
        [B, 2], or None.

    Raises:
        ValueError: source has another shape or is not of integers.

    Example:
        >>> checked_source(jnp.array([[3, 0]]), 1).shape
        (1, 2)
    """
    if source is None:
        return None
    source = jnp.asarray(source)
    if source.shape != (batch, 2) or not jnp.issubdtype(source.dtype, jnp.integer):
        raise ValueError(
            f"source must be integers of shape [B, 2] = ({batch}, 2), "
            f"got {source.dtype} of shape {source.shape}"
        )
    return source
