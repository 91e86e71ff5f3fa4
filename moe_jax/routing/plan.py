"""The plan: which slot of which expert each choice gets, shared by all routers."""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.routing.choice import Choices


class RoutingPlan(NamedTuple):
    """Where each of a token's K choices goes.

    Attributes:
        expert: [B, S, K] int32, the chosen experts, best first.
        weight: [B, S, K] float32, normalised over K before anything is dropped.
        slot: [B, S, K] int32, place in that expert's buffer of the routing group, at or above
            the capacity when the choice was dropped; without buffers, place among the expert's
            rows.
        is_kept: [B, S, K] bool, False where the choice was dropped or the token is padding.
    """

    expert: Int[Array, "B S K"]
    weight: Float[Array, "B S K"]
    slot: Int[Array, "B S K"]
    is_kept: Bool[Array, "B S K"]


def expert_capacity(
    group_size: int, num_experts: int, num_choices: int, capacity_factor: float
) -> int:
    """Slots per expert and routing group: ceil(factor * K * S / E), up to a multiple of 8.

    Never more than the group has tokens (rounded up), since a token takes at most one slot of an
    expert.

    Args:
        group_size: S, tokens that share the slots.
        num_experts: E.
        num_choices: K.
        capacity_factor: 1.0 is just enough under perfect balance.

    Returns:
        C, a positive multiple of 8.

    Raises:
        ValueError: an argument is not positive.

    Example:
        >>> expert_capacity(128, num_experts=32, num_choices=3, capacity_factor=1.25)
        16
    """
    for name, value in (
        ("group_size", group_size),
        ("num_experts", num_experts),
        ("num_choices", num_choices),
        ("capacity_factor", capacity_factor),
    ):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    # The tolerance keeps 1.1 * 10 (11.000000000000002) from asking for a twelfth slot.
    wanted = math.ceil(capacity_factor * num_choices * group_size / num_experts - 1e-9)
    return _round_up(min(max(wanted, 1), group_size), 8)


def make_plan(
    choices: Choices,
    *,
    num_experts: int,
    capacity: int,
    priority: Literal["position", "choice", "probability"] = "choice",
    is_valid: Bool[Array, "B S"] | None = None,
) -> RoutingPlan:
    """Gives slots to choices, in order of priority, until an expert's capacity is spent.

    Each row of the batch is one routing group. By "position" a token's choices come before any
    later token's, which alone is causal; by "choice" all first choices come before all second
    ones (GShard, Lepikhin et al. 2021); by "probability" tokens come in falling order of their
    best probability among all experts (batch-prioritised routing, Riquelme et al. 2021, section 4).

    Args:
        choices: of the router.
        num_experts: E.
        capacity: C, slots per expert and group.
        priority: the order in which slots are given.
        is_valid: [B, S]; False for padding, which takes no slot. None for no padding.

    Returns:
        The plan.

    Raises:
        ValueError: `priority` is unknown or `capacity` is not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.routing import topk
        >>> plan = make_plan(topk(jnp.zeros((1, 9, 2)), 1), num_experts=2, capacity=8)
        >>> int(plan.is_kept.sum())
        8
    """
    if capacity <= 0:
        raise ValueError(f"capacity must be positive, got {capacity}")
    expert, weight, probability = choices
    probability = weight if probability is None else probability
    if is_valid is None:
        is_valid = jnp.ones(expert.shape[:2], bool)
    takes_slot = jnp.broadcast_to(is_valid[..., None], expert.shape)
    match priority:
        case "position":
            slot = _ranks(expert, takes_slot, num_experts)
        case "choice":
            slot = _by_choice(expert, takes_slot, num_experts)
        case "probability":
            order = jnp.argsort(
                -jnp.where(is_valid, jnp.max(probability, -1), 0.0), axis=-1, stable=True
            )
            back = jnp.argsort(order, axis=-1)[..., None]
            order = order[..., None]
            ranked = _by_choice(
                jnp.take_along_axis(expert, order, axis=1),
                jnp.take_along_axis(takes_slot, order, axis=1),
                num_experts,
            )
            slot = jnp.take_along_axis(ranked, back, axis=1)
        case _:
            raise ValueError(
                f'priority must be "position", "choice" or "probability", got {priority!r}'
            )
    return RoutingPlan(
        expert=expert, weight=weight, slot=slot, is_kept=takes_slot & (slot < capacity)
    )


def _by_choice(
    expert: Int[Array, "B S K"], takes_slot: Bool[Array, "B S K"], num_experts: int
) -> Int[Array, "B S K"]:
    ranked = _ranks(jnp.swapaxes(expert, 1, 2), jnp.swapaxes(takes_slot, 1, 2), num_experts)
    return jnp.swapaxes(ranked, 1, 2)


def _ranks(
    expert: Int[Array, "B I J"], takes_slot: Bool[Array, "B I J"], num_experts: int
) -> Int[Array, "B I J"]:
    """How many earlier entries of the row, in row-major order, took a slot of the same expert."""
    flat = expert.reshape(expert.shape[0], -1)
    is_of = flat[..., None] == jnp.arange(num_experts)[None, None]
    is_of &= takes_slot.reshape(flat.shape)[..., None]
    before = jnp.cumsum(is_of, axis=1, dtype=jnp.int32)
    rank = jnp.take_along_axis(before, flat[..., None], axis=2)[..., 0] - 1
    # Padding has no rank of its own; zero keeps it in range, and is_kept keeps it out.
    return jnp.maximum(rank, 0).reshape(expert.shape)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
