"""Checked numpy columns of the nodes and edges of foreign graphs."""

import base64
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from moe_jax.graph import FOREVER, KnowledgeGraph
from moe_jax.graph.state import with_keys
from moe_jax.ops import normalize

__all__ = [
    "EDGE_FIELDS",
    "NODE_FIELDS",
    "assign_nodes",
    "assign_slots",
    "columns",
    "pack",
    "vectors",
]

# What an attribute is where it is absent; whole numbers are int32 and others float32.
NODE_FIELDS = {
    "kind": 0,
    "expert_id": -1,
    "confidence": 0.0,
    "hits": 1,
    "created": 0,
    "updated": 0,
    "source_document": -1,
    "source_offset": -1,
    "symbol": -1,
    "reads": 0,
}
EDGE_FIELDS = {"weight": 1.0, "kind": 0, "time": 0, "start": 0, "end": FOREVER}
_UNIT = 1e-6  # how far from 1 the length of a vector is that counts as normalised


def pack(vector: list[float]) -> str:
    """Float32 numbers as text, to the bit: base64 of their little-endian bytes."""
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()


def columns(
    what: str, items: list[tuple[Any, dict[str, Any]]], fields: dict[str, Any]
) -> dict[str, np.ndarray]:
    """One array for each field, from (label, attributes) pairs; ValueError for a bad number."""
    table = {}
    for name, default in fields.items():
        dtype = np.float32 if isinstance(default, float) else np.int32
        values = []
        for label, data in items:
            value = data.get(name, default)
            if not _is_number(value, dtype):
                number = "finite number" if dtype == np.float32 else "whole number"
                raise ValueError(
                    f"{name} of {what} {label!r} must be a {number} of 32 bits, got {value!r}"
                )
            values.append(value)
        table[name] = np.array(values, dtype)
    return table


def vectors(
    nodes: Mapping[Any, dict[str, Any]],
    keys: Mapping[Any, Any] | ArrayLike | None,
    dim: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """(keys, values), float32 [nodes, D]: keys of unit length, values by default the keys.

    Raises:
      ValueError: a vector is missing or malformed, or the width is not known.
    """
    if dim is not None and dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if keys is not None and not isinstance(keys, Mapping):
        keys = np.asarray(keys, np.float32)
        if keys.ndim != 2 or len(keys) != len(nodes):
            raise ValueError(f"keys must have shape [{len(nodes)}, D], got {keys.shape}")
        keys = dict(zip(nodes, keys, strict=True))
    own = {label: data["key"] for label, data in nodes.items() if "key" in data}
    own |= {label: key for label, key in (keys or {}).items() if label in nodes}
    for label in nodes:
        if label not in own:
            raise ValueError(f"keys must hold a vector for node {label!r}, which has none itself")
        own[label] = _vector("key", label, own[label], dim)
        dim = len(own[label])
    if dim is None:
        raise ValueError("dim must be given for a graph without nodes, got None")
    key = np.array([own[label] for label in nodes], np.float32).reshape(-1, dim)
    is_unit = np.abs(np.linalg.norm(key.astype(np.float64), axis=1) - 1.0) <= _UNIT
    unit = key if is_unit.all() else np.where(is_unit[:, None], key, np.asarray(normalize(key)))
    for label, row in zip(nodes, unit, strict=True):
        if not row.any():
            raise ValueError(f"key of node {label!r} must have a direction, got {own[label]}")
    value = unit.copy()
    for row, (label, data) in enumerate(nodes.items()):
        if "value" in data:
            value[row] = _vector("value", label, data["value"], dim)
    return unit, value


def assign_nodes(labels: list[Any], num_nodes: int, *, keeps_ids: bool) -> dict[Any, int]:
    """A slot for each label: in order, or the label itself where that is an id and ids are kept."""
    if len(labels) > num_nodes:
        raise ValueError(f"num_nodes must be at least {len(labels)}, the nodes, got {num_nodes}")
    slots = {}
    if keeps_ids:
        slots = {label: label for label in labels if _is_id(label, num_nodes)}
    taken = set(slots.values())
    free = (slot for slot in range(num_nodes) if slot not in taken)
    return {label: slots[label] if label in slots else next(free) for label in labels}


def assign_slots(
    source: np.ndarray, weight: np.ndarray, wanted: list[Any], num_edge_slots: int
) -> np.ndarray:
    """The slot of each edge at its source, M where it is dropped for stronger ones.

    An edge gets the slot it wants if that exists and no earlier edge took it, else the lowest
    that nobody wants.
    """
    slots = np.full(len(source), num_edge_slots)
    by_strength = np.lexsort((-weight, source))
    starts = np.searchsorted(source[by_strength], source[by_strength])
    kept = by_strength[np.arange(len(source)) - starts < num_edge_slots]
    taken: dict[int, set[int]] = {}
    late = []
    for edge in np.sort(kept).tolist():
        of_node = taken.setdefault(int(source[edge]), set())
        if _is_id(wanted[edge], num_edge_slots) and wanted[edge] not in of_node:
            slots[edge] = wanted[edge]
            of_node.add(wanted[edge])
        else:
            late.append(edge)
    for edge in late:
        of_node = taken[int(source[edge])]
        slots[edge] = next(slot for slot in range(num_edge_slots) if slot not in of_node)
        of_node.add(int(slots[edge]))
    return slots


def filled(
    graph: KnowledgeGraph, at: np.ndarray, nodes: dict[str, np.ndarray], counters: dict[str, int]
) -> KnowledgeGraph:
    """An empty graph with nodes in the slots `at`, and with these counters."""
    host = {name: np.array(field) for name, field in graph._asdict().items()}
    for name, column in nodes.items():
        if not name.startswith("source_"):
            host[name][at] = column
    host["source"][at, 0], host["source"][at, 1] = nodes["source_document"], nodes["source_offset"]
    host["is_live"][at] = True
    for name, count in counters.items():
        host[name][...] = count
    graph = KnowledgeGraph(**{name: jnp.array(field) for name, field in host.items()})
    return _with_codes(graph)


@jax.jit
def _with_codes(graph: KnowledgeGraph) -> KnowledgeGraph:
    return with_keys(graph, jnp.arange(graph.num_nodes), graph.key)


def linked(
    graph: KnowledgeGraph, ends: np.ndarray, slot: np.ndarray, edges: dict[str, np.ndarray]
) -> KnowledgeGraph:
    """The graph with these edges in these slots of their sources; those in slot M are left out."""
    is_kept = slot < graph.num_edge_slots
    at = ends[is_kept, 0], slot[is_kept]
    fields = {}
    for name, column in {**edges, "target": ends[:, 1]}.items():
        field = np.array(getattr(graph, f"edge_{name}"))
        field[at] = column[is_kept]
        fields[f"edge_{name}"] = jnp.array(field)
    return graph._replace(**fields)


def _vector(name: str, label: Any, value: Any, dim: int | None) -> np.ndarray:
    try:
        if isinstance(value, str):
            value = np.frombuffer(base64.b64decode(value, validate=True), "<f4")
        vector = np.asarray(value, np.float64)
        with np.errstate(over="ignore"):
            vector = vector.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} of node {label!r} must be a list of numbers, or float32 bytes in base64"
        ) from error
    if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
        raise ValueError(f"{name} of node {label!r} must be a list of finite numbers, got {value}")
    if dim is not None and len(vector) != dim:
        raise ValueError(f"{name} of node {label!r} must have width {dim}, got {len(vector)}")
    return vector


def _is_number(value: Any, dtype: type) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        return False
    if dtype == np.float32:
        return abs(value) <= float(np.finfo(np.float32).max)
    return value == int(value) and -(2**31) <= value < 2**31


def _is_id(value: Any, size: int) -> bool:
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_whole and 0 <= value < size
