"""Checks and conversions of arguments, shared by the functions on a knowledge graph."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Dtype, Int
from moe_jax.graph.state import KnowledgeGraph

__all__ = [
    "array",
    "check_choice",
    "ids",
    "is_live_at",
    "per_row",
    "scalar",
    "vectors",
    "whole_number",
]


def vectors(name: str, value: ArrayLike, dim: int) -> Array:
    """The argument as a float32 [rows, dim] array; ValueError where it has another shape."""
    if not (isinstance(value, jax.Array) and value.dtype == jnp.float32):  # it takes the host long
        value = jnp.asarray(value, jnp.float32)
    if value.ndim != 2 or value.shape[-1] != dim:
        raise ValueError(
            f"{name} must have shape [rows, {dim}], {dim} being the width of the graph's keys, "
            f"got {value.shape}"
        )
    return value


def per_row(
    name: str,
    value: ArrayLike | None,
    rows: int,
    default: ArrayLike,
    dtype: Dtype,
    tail: tuple[int, ...] = (),
) -> Array:
    """The argument as a [rows, *tail] array; one value without a row axis is used for all rows."""
    shape = (rows, *tail)
    if value is None:
        return jnp.full(shape, default, dtype)
    value = array(name, value, dtype)
    if value.shape == tail:
        value = jnp.broadcast_to(value[None], shape)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    return value


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def ids(name: str, value: ArrayLike) -> Int[Array, "R"]:
    """The argument as an int32 [R] array; ValueError where it is not a list of integers."""
    if not hasattr(value, "dtype"):
        value = np.asarray(value if np.size(value) else np.zeros(0, np.int32))
    shape, dtype = value.shape, value.dtype
    if len(shape) != 1 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"{name} must be a list of integers, got shape {shape} and dtype {dtype}")
    return array(name, value, jnp.int32)


def cosine_threshold(threshold: ArrayLike) -> Array | None:
    """A least cosine; None, which spares a transfer, for a number that all reach."""
    if isinstance(threshold, int | float) and threshold <= -1:
        return None
    return scalar("threshold", threshold, jnp.float32)


def reachable(threshold: Array) -> Array:
    """A threshold of 1 or -1 as what equal and opposite vectors reach, rounding included."""
    return jnp.where(threshold <= -1.0, -jnp.inf, jnp.minimum(threshold, 1.0 - 1e-5))


def scalar(name: str, value: ArrayLike, dtype: Dtype) -> Array:
    """The argument as a scalar array; ValueError where it has an axis."""
    if np.shape(value) != ():
        raise ValueError(f"{name} must be a scalar, got shape {np.shape(value)}")
    return array(name, value, dtype)


def whole_number(name: str, value: int, low: int, high: int, what: str = "") -> int:
    """The argument as an int; ValueError unless it is a whole number in [low, high]."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}{what}, got {value!r}")
    return int(value)


def array(name: str, value: ArrayLike, dtype: Dtype) -> Array:
    """The argument as an array; ValueError where integers would wrap or fractions be cut off."""
    if jnp.issubdtype(dtype, jnp.integer) and not isinstance(value, jax.Array):
        given = np.asarray(value)
        if not given.size:
            return jnp.zeros(given.shape, dtype)
        if jnp.issubdtype(given.dtype, jnp.floating):
            raise ValueError(f"{name} must be of integers, got dtype {given.dtype}")
        bounds = jnp.iinfo(dtype)
        if given.min() < bounds.min or given.max() > bounds.max:
            wrong = given.max() if given.max() > bounds.max else given.min()
            raise ValueError(f"{name} must fit {jnp.dtype(dtype).name}, got {wrong}")
    value = jnp.asarray(value)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} must be of integers, got dtype {value.dtype}")
    return value.astype(dtype)


def is_live_at(graph: KnowledgeGraph, node_id: Int[Array, "*R"]) -> Bool[Array, "*R"]:
    """Whether each id is in range and its node live."""
    is_inside = (node_id >= 0) & (node_id < graph.num_nodes)
    return is_inside & graph.is_live[jnp.clip(node_id, 0, graph.num_nodes - 1)]
