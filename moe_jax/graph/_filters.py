"""The filters that every search of a graph knows."""

import operator
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax._types import Dtype

__all__ = ["FILTERS", "Filter"]


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
