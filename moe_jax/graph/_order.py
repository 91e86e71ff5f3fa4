"""In which order an eviction policy gives up nodes."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int, UInt32
from moe_jax.ops.first_true import first_true

__all__ = [
    "POLICIES",
    "first_to_go",
    "halves",
    "joined",
    "lowest",
    "policy_keys",
    "saturating_add",
]

POLICIES = ("oldest", "least_used", "lowest_confidence")
_INT32_MAX = 2**31 - 1


def policy_keys(
    policy: Int[Array, ""],
    *,
    confidence: Float[Array, "I"],
    hits: Int[Array, "I"],
    reads: Int[Array, "I"],
    created: Int[Array, "I"],
    updated: Int[Array, "I"],
) -> tuple[Int[Array, "I"], Int[Array, "I"]]:
    """Two integers per node; the node with the smallest pair, then the lowest slot, goes first.

    Args:
      policy: its place in `POLICIES`; a number, so that one compiled program serves them all.
      confidence: float32 [I], a field of nodes, as the others.
      hits: int32 [I].
      reads: int32 [I].
      created: int32 [I].
      updated: int32 [I].

    Returns:
      (first [I], second [I]), both int32.
    """
    # Floats order as their bits do, negative ones backwards; both zeros and every NaN as one.
    bits = jax.lax.bitcast_convert_type(confidence, jnp.int32)
    bits = jnp.where(bits < 0, bits ^ _INT32_MAX, bits)
    bits = jnp.where(confidence == 0.0, 0, bits)
    bits = jnp.where(jnp.isnan(confidence), _INT32_MAX, bits)
    first = jax.lax.select_n(policy, created, saturating_add(hits, reads), bits)
    return first, jnp.where(policy == 0, 0, updated)


def saturating_add(x: Int[Array, "*X"], more: Int[Array, "*I"]) -> Int[Array, "..."]:
    """The sum of an int32 and a non-negative int32, stopping at the largest one."""
    return x + jnp.minimum(more, _INT32_MAX - jnp.maximum(x, 0))


def halves(x: Int[Array, "*X"]) -> tuple[UInt32[Array, "*X"], UInt32[Array, "*X"]]:
    """The upper and the lower 16 bits of non-negative int32, for sums that must not wrap."""
    x = x.astype(jnp.uint32)
    return x >> 16, x & 0xFFFF


def joined(high: UInt32[Array, "*X"], low: UInt32[Array, "*X"]) -> Int[Array, "*X"]:
    """What sums of up to 65,536 `halves` stand for, stopping at the largest int32."""
    high = high + (low >> 16)
    whole = (high << 16 | low & 0xFFFF).astype(jnp.int32)
    return jnp.where(high < 2**15, whole, _INT32_MAX)


def first_to_go(
    first: Int[Array, "N"], second: Int[Array, "N"], is_live: Bool[Array, "N"]
) -> Int[Array, ""]:
    """The slot of the live node that the policy gives up next; 0 where none is live."""
    is_best = is_live & (first == jnp.min(jnp.where(is_live, first, _INT32_MAX)))
    is_best &= second == jnp.min(jnp.where(is_best, second, _INT32_MAX))
    return jnp.argmax(is_best).astype(jnp.int32)


def lowest(
    first: Int[Array, "N"], second: Int[Array, "N"], is_live: Bool[Array, "N"], k: int
) -> Int[Array, "k"]:
    """The k live slots with the smallest (first, second, slot), in that order, N where fewer.

    The k-th smallest pair is found bit by bit, by counting, so that only k entries are sorted.
    """
    wanted = jnp.minimum(k, jnp.sum(is_live, dtype=jnp.int32))
    is_chosen = jnp.zeros_like(is_live)
    is_open = is_live
    for x in (first, second):
        last = _nth_smallest(x, is_open, wanted)
        is_below = is_open & (x < last)
        is_chosen |= is_below
        is_open &= x == last
        wanted = wanted - jnp.sum(is_below, dtype=jnp.int32)
    is_chosen |= is_open & (jnp.cumsum(is_open, dtype=jnp.int32) <= wanted)
    slot = first_true(is_chosen, k)
    keys = (x.at[slot].get(mode="fill", fill_value=_INT32_MAX) for x in (first, second))
    return jax.lax.sort((*keys, slot), num_keys=2, is_stable=True)[2]


def _nth_smallest(
    x: Int[Array, "N"], is_candidate: Bool[Array, "N"], n: Int[Array, ""]
) -> Int[Array, ""]:
    """The n-th smallest candidate, n from 1; the least int32 where n is 0."""
    sign = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) ^ sign

    def add_bit(i: Array, found: Array) -> Array:
        more = found | (sign >> i.astype(jnp.uint32))
        return jnp.where(jnp.sum(is_candidate & (bits < more), dtype=jnp.int32) < n, more, found)

    found = jax.lax.fori_loop(0, 32, add_bit, jnp.uint32(0))
    return jax.lax.bitcast_convert_type(found ^ sign, jnp.int32)
