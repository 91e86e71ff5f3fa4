"""The filters that every search of a graph knows."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Dtype
from moe_jax.graph._arguments import per_row, scalar
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["FILTERS", "Filter", "given_filters", "shared_mask"]


class Filter(NamedTuple):
    """One filter: a node passes if `compare(field of the node, value wanted)`.

    Attributes:
      field: of `KnowledgeGraph`.
      dtype: of the value wanted.
      compare: for arrays of numpy and jax alike.
    """

    field: str
    dtype: Dtype
    compare: Callable


FILTERS = {
    "expert_id": Filter("expert_id", jnp.int32, operator.eq),
    "kind": Filter("kind", jnp.int32, operator.eq),
    "as_of": Filter("created", jnp.int32, operator.le),
    "min_confidence": Filter("confidence", jnp.float32, operator.ge),
}
"""By the name of the argument."""


def given_filters(
    graph: KnowledgeGraph, rows: int, values: tuple[ArrayLike | None, ...]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The filters that are not None, and the fields that they read, by name.

    Args:
      graph: whose nodes are filtered.
      rows: Q.
      values: in the order of `FILTERS`, each a scalar, [Q], or None.
    """
    wanted, fields = {}, {}
    for (name, own), value in zip(FILTERS.items(), values, strict=True):
        if value is not None:
            # One value for all queries stays one: its mask is shared, which the fast pass wants.
            is_one = jnp.ndim(value) == 0
            wanted[name] = (
                scalar(name, value, own.dtype) if is_one else
                per_row(name, value, rows, 0, own.dtype)
            )  # fmt: skip
            fields[name] = getattr(graph, own.field)
    return wanted, fields


def shared_mask(mask: Array, wanted: dict[str, Array], fields: dict[str, Array]) -> Array:
    """The mask [N] and the filters that are the same for all queries."""
    for name, value in wanted.items():
        if value.ndim == 0:
            mask &= FILTERS[name].compare(fields[name], value)
    return mask
