"""What changed in a graph: found, gathered and written back on the device."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import UInt32

from moe_jax._types import Array, Int
from moe_jax.graph import KnowledgeGraph
from moe_jax.graph.digest import digest_of_rows, row_digest
from moe_jax.ops.first_true import first_true

_LEAST_ROWS = 256


class Fingerprint(NamedTuple):
    """Hashes of a graph, small enough to keep one on the device.

    Attributes:
        rows: uint32 [N, 2], the `row_digest`.
        digest: uint32 [4], the `digest`.
    """

    rows: UInt32[Array, "N 2"]
    digest: UInt32[Array, "4"]


class Delta(NamedTuple):
    """The slots that changed, and the counters.

    Attributes:
        ids: int32 [R], slots, ascending; N in the padding.
        graph: the graph's fields at those slots, zeros in the padding, and all its counters.
    """

    ids: Int[Array, "R"]
    graph: KnowledgeGraph


@jax.jit
def fingerprint(graph: KnowledgeGraph) -> Fingerprint:
    """Hashes a graph.

    Args:
        graph: the graph.

    Returns:
        A `Fingerprint`.
    """
    rows = row_digest(graph)
    return Fingerprint(rows, digest_of_rows(graph, rows))


@jax.jit
def count_changed(now: UInt32[Array, "N 2"], before: UInt32[Array, "N 2"]) -> Int[Array, ""]:
    """How many rows have another hash than before.

    Args:
        now: uint32 [N, 2].
        before: uint32 [N, 2].

    Returns:
        int32.
    """
    return jnp.sum(jnp.any(now != before, axis=1), dtype=jnp.int32)


def delta_rows(changed: int, num_nodes: int) -> int | None:
    """The size of a delta, a power of two so that few programs are compiled.

    Args:
        changed: rows that changed.
        num_nodes: N.

    Returns:
        R, or None where a delta would save less than half.

    Example:
        >>> delta_rows(300, 100_000), delta_rows(50_000, 100_000), delta_rows(1, 64)
        (512, None, None)
    """
    rows = max(_LEAST_ROWS, 1 << (changed - 1).bit_length())
    return rows if 2 * rows <= num_nodes else None


@functools.partial(jax.jit, static_argnames="size")
def gather(
    graph: KnowledgeGraph,
    now: UInt32[Array, "N 2"],
    before: UInt32[Array, "N 2"],
    *,
    size: int,
) -> Delta:
    """Takes the rows that changed.

    Args:
        graph: the graph.
        now: uint32 [N, 2], its row hashes.
        before: uint32 [N, 2], those of the base.
        size: R, at least as many as changed.

    Returns:
        A `Delta`.
    """
    is_changed = jnp.any(now != before, axis=1)
    ids = first_true(is_changed, size)

    def take(leaf: Array) -> Array:
        return leaf.at[ids].get(mode="fill", fill_value=0) if leaf.ndim else leaf

    return Delta(ids, jax.tree.map(take, graph))


def scatter(graph: KnowledgeGraph, delta: Delta) -> KnowledgeGraph:
    """Writes a delta back over its base.

    Args:
        graph: the base.
        delta: from `gather`.

    Returns:
        The graph that the delta was taken from.
    """

    def put(leaf: Array, new: Array) -> Array:
        return leaf.at[delta.ids].set(new, mode="drop") if leaf.ndim else new

    return jax.tree.map(put, graph, delta.graph)


def delta_like(like: KnowledgeGraph, rows: int) -> Delta:
    """The shapes of a delta of a graph, whole on every device of the graph's mesh.

    Args:
        like: the graph, or `jax.ShapeDtypeStruct`s with shardings.
        rows: R.

    Returns:
        A `Delta` of `jax.ShapeDtypeStruct`s.
    """
    on = like.key.sharding
    if isinstance(on, jax.sharding.NamedSharding):
        on = jax.sharding.NamedSharding(on.mesh, jax.sharding.PartitionSpec())

    def shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        size = (rows, *leaf.shape[1:]) if leaf.shape else ()
        return jax.ShapeDtypeStruct(size, leaf.dtype, sharding=on)

    ids = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=on)
    return Delta(ids, jax.tree.map(shape, like))
