"""Routers: from logits to the K experts of each token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float, Int, PRNGKey


class Choices(NamedTuple):
    """The experts that a router chose.

    Attributes:
        expert: [B, S, K] int32, best first.
        weight: [B, S, K] float32, at least 0, summing to 1 over K.
        probability: [B, S, K] float32, a softmax over all experts at the chosen ones; None where
            the router gives no such thing.
    """

    expert: Int[Array, "B S K"]
    weight: Float[Array, "B S K"]
    probability: Float[Array, "B S K"] | None = None


def topk(logits: Float[Array, "B S E"], k: int, bias: Float[Array, "E"] | None = None) -> Choices:
    """Chooses the k largest logits, weighted by a softmax over those k.

    Equal to a softmax over all experts, cut to the k largest and normalised again. Ties go to the
    lower expert id.

    Args:
        logits: [B, S, E], any float dtype; taken as float32.
        k: experts per token, 1 to E.
        bias: [E], added to decide who is chosen but not to weigh the chosen, as in loss-free
            balancing (Wang et al. 2024, equation 3).

    Returns:
        The choices of each token, best first by biased logit.

    Raises:
        ValueError: k is not in [1, E].

    Example:
        >>> import jax.numpy as jnp
        >>> topk(jnp.array([[[0.0, 2.0, 1.0]]]), k=2).expert
        Array([[[1, 2]]], dtype=int32)
    """
    num_experts = logits.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must lie in [1, E={num_experts}], got {k}")
    logits = logits.astype(jnp.float32)
    rank = jax.lax.stop_gradient(logits if bias is None else logits + bias[None, None])
    # top_k puts -0.0 below 0.0, which would decide a tie by a sign that means nothing.
    _, expert = jax.lax.top_k(jnp.where(rank == 0, 0.0, rank), k)
    best = jnp.take_along_axis(logits, expert, axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return Choices(
        expert=expert.astype(jnp.int32),
        weight=jax.nn.softmax(best, axis=-1),
        probability=jax.lax.stop_gradient(jnp.exp(best - total)),
    )


def noisy_topk(
    logits: Float[Array, "B S E"],
    noise_logits: Float[Array, "B S E"],
    k: int,
    key: PRNGKey | None,
    bias: Float[Array, "E"] | None = None,
) -> Choices:
    """Chooses by noisy logits: Shazeer et al. 2017, equations 3 to 5.

    Args:
        logits: [B, S, E] clean logits.
        noise_logits: [B, S, E]; the noise of each logit has scale softplus(noise_logits).
        k: experts per token, 1 to E.
        key: of the noise; None for none, as outside training.
        bias: [E], as in `topk`.

    Returns:
        The choices of each token.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> logits = jnp.zeros((1, 4, 8))
        >>> noisy_topk(logits, logits, 2, jax.random.key(0)).expert.shape
        (1, 4, 2)
    """
    logits = logits.astype(jnp.float32)
    if key is not None:
        scale = jax.nn.softplus(noise_logits.astype(jnp.float32))
        logits = logits + scale * jax.random.normal(key, logits.shape)
    return topk(logits, k, bias)


def dense(logits: Float[Array, "B S E"]) -> Choices:
    """Sends every token to every expert, weighted by a softmax over all: the soft upper bound.

    Args:
        logits: [B, S, E].

    Returns:
        The choices, K = E, by falling weight.

    Example:
        >>> import jax.numpy as jnp
        >>> dense(jnp.zeros((1, 1, 2))).weight
        Array([[[0.5, 0.5]]], dtype=float32)
    """
    return topk(logits, logits.shape[-1])


def balanced_bias(
    bias: Float[Array, "*L E"], load: Float[Array, "*L E"], rate: float
) -> Float[Array, "*L E"]:
    """One step of loss-free balancing: raises the bias of idle experts, lowers that of busy ones.

    Wang et al. 2024, algorithm 1, with an error that is proportional near balance and clipped
    far from it in place of its sign, so that it settles.

    Args:
        bias: [..., E] before.
        load: [..., E] share of choices that each expert received; sums to 1.
        rate: largest change.

    Returns:
        The bias after.

    Example:
        >>> import jax.numpy as jnp
        >>> balanced_bias(jnp.zeros(2), jnp.array([0.75, 0.25]), rate=0.1).tolist()
        [-0.05000000074505806, 0.05000000074505806]
    """
    error = 1.0 - load * load.shape[-1]
    return bias + rate * jnp.clip(error, -1.0, 1.0)
