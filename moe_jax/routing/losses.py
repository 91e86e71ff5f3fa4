"""Losses that keep the experts evenly used, and statistics of how evenly they are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.routing.plan import RoutingPlan


class RoutingStats(NamedTuple):
    """How a batch was routed.

    Attributes:
        load: [E] float32, share of all choices that each expert received, before dropping.
        max_over_mean: largest load over the mean load; 1 is perfect balance, E the worst.
        dropped_fraction: share of the valid tokens' choices that found no slot.
        entropy: mean entropy of the router's softmax, in nats.
    """

    load: Float[Array, "E"]
    max_over_mean: Float[Array, ""]
    dropped_fraction: Float[Array, ""]
    entropy: Float[Array, ""]


def switch_balance_loss(
    logits: Float[Array, "B S E"],
    expert: Int[Array, "B S K"],
    is_valid: Bool[Array, "B S"] | None = None,
) -> Float[Array, ""]:
    """E * sum_e f_e * P_e: Fedus et al. 2022, equations 4 to 6; GShard's loss for K = 2.

    f_e is the share of choices sent to expert e, P_e its mean router probability. 1 at perfect
    balance.

    Args:
        logits: [B, S, E] router logits.
        expert: [B, S, K] chosen experts.
        is_valid: [B, S], False for padding.

    Returns:
        A scalar float32; gradients flow through P alone.

    Example:
        >>> import jax.numpy as jnp
        >>> logits = jnp.zeros((1, 2, 2))
        >>> float(switch_balance_loss(logits, jnp.array([[[0], [1]]])))
        1.0
    """
    probability = _masked_mean(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), is_valid)
    share = _load(expert, logits.shape[-1], is_valid)
    return logits.shape[-1] * jnp.sum(jax.lax.stop_gradient(share) * probability)


def usage_mse_loss(
    logits: Float[Array, "B S E"], is_valid: Bool[Array, "B S"] | None = None
) -> Float[Array, ""]:
    """mean_e (P_e - 1/E)^2 with P the mean router probability: the original's loss.

    Args:
        logits: [B, S, E] router logits.
        is_valid: [B, S], False for padding.

    Returns:
        A scalar float32, 0 at perfect balance.

    Example:
        >>> import jax.numpy as jnp
        >>> float(usage_mse_loss(jnp.zeros((1, 2, 4))))
        0.0
    """
    probability = _masked_mean(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), is_valid)
    return jnp.mean(jnp.square(probability - 1.0 / logits.shape[-1]))


def router_z_loss(
    logits: Float[Array, "B S E"], is_valid: Bool[Array, "B S"] | None = None
) -> Float[Array, ""]:
    """Mean of logsumexp(logits)^2: Zoph et al. 2022, equation 5; keeps logits small.

    Args:
        logits: [B, S, E] router logits.
        is_valid: [B, S], False for padding.

    Returns:
        A scalar float32.

    Example:
        >>> import jax.numpy as jnp
        >>> round(float(router_z_loss(jnp.zeros((1, 1, 2)))), 4)
        0.4805
    """
    z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1, keepdims=True)
    return _masked_mean(jnp.square(z), is_valid)[0]


def routing_stats(
    logits: Float[Array, "B S E"],
    plan: RoutingPlan,
    is_valid: Bool[Array, "B S"] | None = None,
) -> RoutingStats:
    """Measures the balance and the drops of one routing.

    Args:
        logits: [B, S, E] router logits.
        plan: the plan made from them.
        is_valid: [B, S], False for padding.

    Returns:
        The statistics, all float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.routing import make_plan, topk
        >>> logits = jnp.eye(2)[None]
        >>> plan = make_plan(topk(logits, 1), num_experts=2, capacity=8)
        >>> float(routing_stats(logits, plan).max_over_mean)
        1.0
    """
    num_experts = logits.shape[-1]
    load = _load(plan.expert, num_experts, is_valid)
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    entropy = -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1, keepdims=True)
    return RoutingStats(
        load=load,
        max_over_mean=jnp.max(load * num_experts),
        dropped_fraction=_share(~plan.is_kept[..., None], is_valid)[0],
        entropy=_masked_mean(entropy, is_valid)[0],
    )


def _masked_mean(
    x: Float[Array, "B S E"], is_valid: Bool[Array, "B S"] | None
) -> Float[Array, "E"]:
    """Mean over valid tokens; zero where there are none."""
    if is_valid is None:
        return jnp.mean(x, axis=(0, 1))
    total = jnp.sum(jnp.where(is_valid[..., None], x, 0.0), axis=(0, 1))
    return total / jnp.maximum(jnp.sum(is_valid), 1)


def _load(
    expert: Int[Array, "B S K"], num_experts: int, is_valid: Bool[Array, "B S"] | None
) -> Float[Array, "E"]:
    return _share(expert[..., None] == jnp.arange(num_experts)[None, None, None], is_valid)


def _share(is_it: Bool[Array, "B S K J"], is_valid: Bool[Array, "B S"] | None) -> Float[Array, "J"]:
    """Which part of the valid tokens' choices it is; zero where there are none."""
    batch, length, num_choices, _ = is_it.shape
    total = batch * length
    if is_valid is not None:
        is_it &= is_valid[..., None, None]
        total = jnp.maximum(jnp.sum(is_valid), 1)
    # Counted in one go, and not by token first: each step is a launch.
    return jnp.sum(is_it, axis=(0, 1, 2)) / (num_choices * jnp.asarray(total, jnp.float32))
