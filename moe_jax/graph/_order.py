"""In which order an eviction policy gives up nodes."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int

__all__ = ["POLICIES", "policy_keys", "saturating_add"]

POLICIES = ("reject", "oldest", "least_used", "lowest_confidence")
_INT32_MAX = 2**31 - 1


def policy_keys(
    policy: str,
    *,
    confidence: Float[Array, "I"],
    hits: Int[Array, "I"],
    reads: Int[Array, "I"],
    created: Int[Array, "I"],
    updated: Int[Array, "I"],
) -> tuple[Int[Array, "I"], Int[Array, "I"]]:
    """Two integers per node; the node with the smallest pair, then the lowest slot, goes first.

    Args:
      policy: "oldest", "least_used" or "lowest_confidence".
      confidence: float32 [I], a field of nodes, as the others.
      hits: int32 [I].
      reads: int32 [I].
      created: int32 [I].
      updated: int32 [I].

    Returns:
      (first [I], second [I]), both int32.
    """
    if policy == "oldest":
        return created, jnp.zeros_like(created)
    if policy == "least_used":
        return saturating_add(hits, reads), updated
    # Floats order as their bits do, negative ones backwards; both zeros and every NaN as one.
    bits = jax.lax.bitcast_convert_type(confidence, jnp.int32)
    bits = jnp.where(bits < 0, bits ^ _INT32_MAX, bits)
    bits = jnp.where(confidence == 0.0, 0, bits)
    return jnp.where(jnp.isnan(confidence), _INT32_MAX, bits), updated


def saturating_add(x: Int[Array, "*X"], more: Int[Array, "*I"]) -> Int[Array, "*I"]:
    """The sum of an int32 and a non-negative int32, stopping at the largest one."""
    return x + jnp.minimum(more, _INT32_MAX - jnp.maximum(x, 0))


def first_to_go(
    first: Int[Array, "N"], second: Int[Array, "N"], is_live: Bool[Array, "N"]
) -> Int[Array, ""]:
    """The slot of the live node that the policy gives up next; 0 where none is live."""
    is_best = is_live & (first == jnp.min(jnp.where(is_live, first, _INT32_MAX)))
    is_best &= second == jnp.min(jnp.where(is_best, second, _INT32_MAX))
    return jnp.argmax(is_best).astype(jnp.int32)
