"""Losses of a language model at each position."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float
from moe_jax.data import Batch
from moe_jax.lm import LanguageModelOutput


def cross_entropy(out: LanguageModelOutput, batch: Batch) -> Float[Array, "B S"]:
    """Cross entropy of each valid target in nats, zero elsewhere."""
    log_share = jax.nn.log_softmax(out.logits, axis=-1)
    picked = jnp.take_along_axis(log_share, batch.targets[..., None], axis=-1)[..., 0]
    return jnp.where(batch.is_valid, -picked, 0.0)


def confidence_loss(
    confidence: Float[Array, "B S"], nats: Float[Array, "B S"], is_valid: Bool[Array, "B S"]
) -> Float[Array, ""]:
    """Binary cross entropy between confidence and the probability given to the right token."""
    right = jnp.exp(-jax.lax.stop_gradient(nats))
    sure = jnp.clip(confidence, 1e-6, 1 - 1e-6)
    each = -(right * jnp.log(sure) + (1 - right) * jnp.log1p(-sure))
    return jnp.sum(jnp.where(is_valid, each, 0.0)) / jnp.maximum(jnp.sum(is_valid), 1)
