"""Checks and conversions of arguments, shared by the functions on a knowledge graph."""

import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Dtype, Int
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["check_choice", "ids", "is_live_at", "per_row", "vectors"]


def vectors(name: str, value: ArrayLike, dim: int) -> Array:
    """The argument as a float32 [rows, dim] array; ValueError where it has another shape."""
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
    value = jnp.asarray(value)
    if value.shape == tail:
        value = jnp.broadcast_to(value[None], shape)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {value.shape}")
    return value.astype(dtype)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def ids(name: str, value: ArrayLike) -> Int[Array, "R"]:
    """The argument as an int32 [R] array; ValueError where it is not a list of integers."""
    value = jnp.asarray(value)
    if value.ndim != 1 or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be a list of integers, got shape {value.shape} and dtype {value.dtype}"
        )
    return value.astype(jnp.int32)


def is_live_at(graph: KnowledgeGraph, node_id: Int[Array, "*R"]) -> Bool[Array, "*R"]:
    """Whether each id is in range and its node live."""
    is_inside = (node_id >= 0) & (node_id < graph.num_nodes)
    return is_inside & graph.is_live[jnp.clip(node_id, 0, graph.num_nodes - 1)]
