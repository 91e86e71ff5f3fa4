"""Hashes of a graph's state, by integer arithmetic alone: the same bits on every machine.

Every 32-bit word of a row is mixed with its field and column by a bijection, and the mixed words
are added modulo 2**32. Sums of integers do not depend on their order, so neither sharding nor
hardware changes the result; and as long as one word of a row changes, the row's hash changes for
certain. The mixers are the finalisers of MurmurHash3 (Appleby 2011) and of Wellons' "lowbias32"
(2018). Nothing here resists an adversary.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from moe_jax._types import Array
from moe_jax.graph.state import KnowledgeGraph

__all__ = ["as_hex", "digest", "digest_hex", "digest_of_rows", "row_digest"]

_GOLDEN = np.uint32(0x9E3779B9)
_MIXERS = (((16, 0x85EBCA6B), (13, 0xC2B2AE35), 16), ((16, 0x7FEB352D), (15, 0x846CA68B), 16))
_LANES = 4


@jax.jit
def row_digest(graph: KnowledgeGraph) -> UInt32[Array, "N 2"]:
    """A 64-bit hash of every node slot: all its fields and edges, to the bit.

    Zeros of either sign differ, and so do NaNs of different bits. Equal rows in two slots have
    equal hashes.

    Args:
      graph: the graph.

    Returns:
      uint32 [N, 2].

    Example:
      >>> graph = KnowledgeGraph.create(4, 2)
      >>> after, _ = insert(graph, jnp.array([[1.0, 0.0]]))
      >>> (row_digest(after) != row_digest(graph)).any(axis=1).tolist()
      [True, False, False, False]
    """
    total = jnp.zeros((graph.num_nodes, 2), jnp.uint32)
    for name, leaf in zip(KnowledgeGraph._fields, graph, strict=True):
        if leaf.ndim == 0:
            continue
        words = _words(leaf).reshape(graph.num_nodes, -1)
        salt = (jnp.arange(words.shape[1], dtype=jnp.uint32) * _GOLDEN + _seed(name))[None]
        total = total + _sum_rows(_mix(words ^ salt, 0), _mix(words ^ salt, 1))
    return total


@jax.jit
def digest(graph: KnowledgeGraph) -> UInt32[Array, "4"]:
    """A 128-bit hash of the whole state: every slot in its place, the counters and the sizes.

    Equal states have equal digests, however they are sharded and wherever they are computed. A
    stream that is replayed from a checkpoint must end in the digest of the unbroken one.

    Args:
      graph: the graph.

    Returns:
      uint32 [4], on the device.

    Example:
      >>> graph = KnowledgeGraph.create(4, 2)
      >>> after, _ = insert(graph, jnp.array([[1.0, 0.0]]))
      >>> bool((digest(graph) == digest(after)).any())
      False
    """
    return digest_of_rows(graph, row_digest(graph))


def digest_of_rows(graph: KnowledgeGraph, rows: UInt32[Array, "N 2"]) -> UInt32[Array, "4"]:
    """The digest of a graph whose `row_digest` is known already.

    Args:
      graph: the graph.
      rows: uint32 [N, 2], its `row_digest`.

    Returns:
      uint32 [4].
    """
    place = jnp.arange(graph.num_nodes, dtype=jnp.uint32) * _GOLDEN
    single = {
        n: _words(x) for n, x in zip(KnowledgeGraph._fields, graph, strict=True) if not x.ndim
    }
    sizes = {"N": graph.num_nodes, "D": graph.dim, "M": graph.num_edge_slots}
    single |= {name: jnp.uint32(size) for name, size in sizes.items()}
    lanes = []
    for lane in range(_LANES):
        salt = _seed(f"lane {lane}")
        first = _mix(rows[:, 0] ^ (place + salt), 0)
        lane_sum = jnp.sum(_mix(first + rows[:, 1] * (salt | np.uint32(1)), 1), dtype=jnp.uint32)
        for name, word in single.items():
            lane_sum = lane_sum + _mix(word ^ (_seed(name) ^ salt), lane % 2)
        lanes.append(lane_sum)
    return jnp.stack(lanes)


def digest_hex(graph: KnowledgeGraph) -> str:
    """The digest as 32 hexadecimal digits, to print and to compare by eye; reads the device.

    Args:
      graph: the graph.

    Returns:
      32 characters.

    Example:
      >>> len(digest_hex(KnowledgeGraph.create(4, 2)))
      32
    """
    return as_hex(digest(graph))


def as_hex(words: UInt32[Array, "4"] | np.ndarray) -> str:
    """Writes a digest as 32 hexadecimal digits.

    Args:
      words: uint32 [4], from `digest`.

    Returns:
      32 characters.

    Example:
      >>> as_hex(jnp.arange(4, dtype=jnp.uint32))
      '00000000000000010000000200000003'
    """
    return "".join(f"{int(word):08x}" for word in np.asarray(words))


def _sum_rows(a: UInt32[Array, "N W"], b: UInt32[Array, "N W"]) -> UInt32[Array, "N 2"]:
    """The sums of both along rows, in one reduction: XLA then stores neither operand on CPUs."""
    zero = jnp.uint32(0)
    sums = jax.lax.reduce((a, b), (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]), (1,))
    return jnp.stack(sums, axis=1)


def _words(x: Array) -> UInt32[Array, "..."]:
    """The bits of an array as uint32, one or (64-bit types) two words an entry."""
    size = jnp.dtype(x.dtype).itemsize
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if size >= 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."], which: int) -> UInt32[Array, "..."]:
    """A bijection of uint32 in which every bit of x reaches every bit of the result."""
    *rounds, last = _MIXERS[which]
    for shift, factor in rounds:
        x = (x ^ (x >> shift)) * np.uint32(factor)
    return x ^ (x >> last)


def _seed(name: str) -> np.uint32:
    """A field's own constant, which does not change when fields are added or moved."""
    return np.uint32(zlib.crc32(name.encode()))
