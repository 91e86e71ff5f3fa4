"""Tokens to expert buffers and back, by gathers in both directions.

A choice and its slot are paired one to one, so the transpose of each gather is again a gather:
the gradients below never scatter-add, which keeps them fast and bit-reproducible on a GPU.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.spread_rows import spread_rows
from moe_jax.routing.plan import RoutingPlan


class DispatchIndex(NamedTuple):
    """The pairing of choices and slots in both directions, per routing group.

    Attributes:
        choice_of_slot: [B, E, C] int32, s * K + k of the choice that sits in a slot; S * K where
            the slot is empty.
        slot_of_choice: [B, S, K] int32, e * C + c of the slot that a choice got; E * C where it
            was dropped.
    """

    choice_of_slot: Int[Array, "B E C"]
    slot_of_choice: Int[Array, "B S K"]


class ExpertInputs(NamedTuple):
    """The experts' buffers.

    Attributes:
        x: [E, B, C, D] tokens; zero where a slot is empty.
        is_valid: [E, B, C] bool, False where a slot is empty.
        position: [E, B, C] int32, position in the sequence; S where a slot is empty.
    """

    x: Float[Array, "E B C D"]
    is_valid: Bool[Array, "E B C"]
    position: Int[Array, "E B C"]


def dispatch_index(plan: RoutingPlan, num_experts: int, capacity: int) -> DispatchIndex:
    """Pairs the plan's choices with slots.

    Args:
        plan: the routing plan.
        num_experts: E.
        capacity: C.

    Returns:
        The pairing.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.routing import make_plan, topk
        >>> plan = make_plan(topk(jnp.zeros((1, 4, 2)), 1), num_experts=2, capacity=8)
        >>> dispatch_index(plan, 2, 8).slot_of_choice[0, :, 0]
        Array([0, 1, 2, 3], dtype=int32)
    """
    batch, length, num_choices = plan.expert.shape
    num_slots = num_experts * capacity
    nowhere = length * num_choices
    slot = jnp.where(plan.is_kept, plan.expert * capacity + plan.slot, num_slots)
    choice = jnp.arange(nowhere, dtype=jnp.int32)

    def invert(slots: Int[Array, "I"]) -> Int[Array, "J"]:
        empty = jnp.full((num_slots,), nowhere, jnp.int32)
        return empty.at[slots].set(choice, mode="drop", unique_indices=False)

    choice_of_slot = jax.vmap(invert)(slot.reshape(batch, -1))
    return DispatchIndex(
        choice_of_slot=choice_of_slot.reshape(batch, num_experts, capacity),
        slot_of_choice=slot.astype(jnp.int32),
    )


def dispatch(x: Float[Array, "B S D"], index: DispatchIndex) -> ExpertInputs:
    """Gathers each expert's tokens.

    Args:
        x: [B, S, D] tokens.
        index: the pairing, from `dispatch_index`.

    Returns:
        The experts' buffers.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.routing import make_plan, topk
        >>> plan = make_plan(topk(jnp.zeros((1, 4, 2)), 1), num_experts=2, capacity=8)
        >>> dispatch(jnp.ones((1, 4, 3)), dispatch_index(plan, 2, 8)).x.shape
        (2, 1, 8, 3)
    """
    num_choices = index.slot_of_choice.shape[-1]
    length = x.shape[1]
    position = jnp.swapaxes(index.choice_of_slot, 0, 1) // num_choices
    return ExpertInputs(x=_gather_tokens(x, index), is_valid=position < length, position=position)


def combine(
    outputs: Float[Array, "E B C O"], weight: Float[Array, "B S K"], index: DispatchIndex
) -> Float[Array, "B S O"]:
    """Sums each token's kept expert outputs, weighted; a dropped choice adds zero.

    Args:
        outputs: [E, B, C, O], what the experts made of their buffers.
        weight: [B, S, K] float32.
        index: the pairing that filled the buffers.

    Returns:
        [B, S, O] in the outputs' dtype; the sum itself is taken in float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.routing import make_plan, topk
        >>> plan = make_plan(topk(jnp.zeros((1, 4, 2)), 1), num_experts=2, capacity=8)
        >>> combine(jnp.ones((2, 1, 8, 3)), plan.weight, dispatch_index(plan, 2, 8)).shape
        (1, 4, 3)
    """
    return _combine(outputs, weight, index)


def gather_choices(
    outputs: Float[Array, "E B S O"], expert: Int[Array, "B S K"]
) -> Float[Array, "B S K O"]:
    """Picks every token's chosen experts where each expert ran on the whole sequence.

    Args:
        outputs: [E, B, S, O].
        expert: [B, S, K] expert ids.

    Returns:
        [B, S, K, O].

    Example:
        >>> import jax.numpy as jnp
        >>> gather_choices(jnp.ones((4, 1, 2, 3)), jnp.zeros((1, 2, 1), int)).shape
        (1, 2, 1, 3)
    """
    by_token = jnp.moveaxis(outputs, 0, 2)
    return jnp.take_along_axis(by_token, expert[..., None], axis=2)


def _rows(x: Float[Array, "B I D"], row: Int[Array, "B J"]) -> Float[Array, "B J D"]:
    """Rows of each group; a row out of range reads zero."""
    return jax.vmap(lambda x, row: x.at[row].get(mode="fill", fill_value=0))(x, row)


@jax.custom_vjp
def _gather_tokens(x: Float[Array, "B S D"], index: DispatchIndex) -> Float[Array, "E B C D"]:
    return _tokens_of_slots(x, index)


def _tokens_of_slots(
    x: Float[Array, "B S D"], index: DispatchIndex, weight: Float[Array, "B S K"] | None = None
) -> Float[Array, "E B C D"]:
    """Each slot's token, times its choice's weight."""
    batch, num_experts, capacity = index.choice_of_slot.shape
    source = index.choice_of_slot.reshape(batch, -1)
    if batch == 1:
        one = None if weight is None else weight[0]
        rows = spread_rows(x[0], index.slot_of_choice[0], source[0], one)
    else:
        # Groups may be sharded, and the kernels are for one device.
        spread = jax.vmap(functools.partial(spread_rows, implementation="xla"))
        rows = spread(x, index.slot_of_choice, source, weight)
    return jnp.swapaxes(rows.reshape(batch, num_experts, capacity, -1), 0, 1)


def _gather_tokens_fwd(x, index):
    return _gather_tokens(x, index), index


def _gather_tokens_bwd(index, grad):
    per_choice = _gather_choices_of(grad, index)
    return jnp.sum(per_choice, axis=2, dtype=jnp.float32).astype(grad.dtype), None


def _gather_choices_of(
    outputs: Float[Array, "E B C O"], index: DispatchIndex
) -> Float[Array, "B S K O"]:
    batch, length, num_choices = index.slot_of_choice.shape
    flat = jnp.swapaxes(outputs, 0, 1).reshape(batch, -1, outputs.shape[-1])
    rows = _rows(flat, index.slot_of_choice.reshape(batch, -1))
    return rows.reshape(batch, length, num_choices, -1)


@jax.custom_vjp
def _combine(
    outputs: Float[Array, "E B C O"], weight: Float[Array, "B S K"], index: DispatchIndex
) -> Float[Array, "B S O"]:
    chosen = _gather_choices_of(outputs, index)
    total = jnp.einsum("bsk,bsko->bso", weight, chosen, preferred_element_type=jnp.float32)
    return total.astype(outputs.dtype)


def _combine_fwd(outputs, weight, index):
    return _combine(outputs, weight, index), (outputs, weight, index)


def _combine_bwd(residuals, grad):
    outputs, weight, index = residuals
    chosen = _gather_choices_of(outputs, index)
    grad_weight = jnp.einsum("bso,bsko->bsk", grad, chosen, preferred_element_type=jnp.float32)
    grad_outputs = _tokens_of_slots(grad.astype(outputs.dtype), index, weight)
    return grad_outputs, grad_weight.astype(weight.dtype), None


_gather_tokens.defvjp(_gather_tokens_fwd, _gather_tokens_bwd)
_combine.defvjp(_combine_fwd, _combine_bwd)
