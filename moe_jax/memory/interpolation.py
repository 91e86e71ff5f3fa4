"""Interpolation of the model's next-symbol distribution with what followed alike contexts.

kNN-LM: Khandelwal et al. 2020, "Generalization through memorization", equations 2 and 3.
Continuous cache: Grave et al. 2017, "Improving neural language models with a continuous cache",
equations 3 and 4: the same with the stream itself as memory.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int

__all__ = [
    "Evidence",
    "MemoryInterpolation",
    "gather_evidence",
    "memory_distribution",
    "memory_weights",
]

_NOTHING = -1e9


class Evidence(NamedTuple):
    """All that an interpolation needs to know of a position, without its whole distribution.

    Attributes:
        scores: [..., K] cosines of the hits.
        symbols: [..., K] the symbols that followed them.
        is_valid: [..., K] False where there is no hit.
        model_at_hits: [..., K] the model's log probability of the hits' symbols.
        model_at_target: [...] the model's log probability of the target.
        entropy: [...] of the model's distribution, nats.
        highest: [...] the model's largest log probability.
        target: [...] the symbol that came.
    """

    scores: Float[Array, "*B K"]
    symbols: Int[Array, "*B K"]
    is_valid: Bool[Array, "*B K"]
    model_at_hits: Float[Array, "*B K"]
    model_at_target: Float[Array, "*B"]
    entropy: Float[Array, "*B"]
    highest: Float[Array, "*B"]
    target: Int[Array, "*B"]


def gather_evidence(
    log_model: Float[Array, "*B V"],
    scores: Float[Array, "*B K"],
    symbols: Int[Array, "*B K"],
    is_valid: Bool[Array, "*B K"],
    target: Int[Array, "*B"],
) -> Evidence:
    """Looks up in the model's distribution what an interpolation needs.

    Args:
        log_model: [..., V] log probabilities.
        scores: [..., K] cosines of the hits.
        symbols: [..., K] the symbols that followed them; those below 0 or from V count as no hit.
        is_valid: [..., K] which hits are real.
        target: [...] the symbol that came, below V.

    Returns:
        The evidence.

    Example:
        >>> import jax.numpy as jnp
        >>> log_model = jnp.log(jnp.array([0.25, 0.75]))
        >>> symbols, ones = jnp.array([1]), jnp.ones(1)
        >>> found = gather_evidence(log_model, ones, symbols, ones > 0, jnp.array(1))
        >>> round(float(jnp.exp(found.model_at_hits[0])), 2)
        0.75
    """
    is_valid = is_valid & (symbols >= 0) & (symbols < log_model.shape[-1])
    symbols = jnp.where(is_valid, symbols, 0)
    return Evidence(
        scores=jnp.where(is_valid, scores, 0.0),
        symbols=symbols,
        is_valid=is_valid,
        model_at_hits=jnp.take_along_axis(log_model, symbols, axis=-1),
        model_at_target=jnp.take_along_axis(log_model, target[..., None], axis=-1)[..., 0],
        entropy=-jnp.sum(jnp.exp(log_model) * jnp.maximum(log_model, _NOTHING), axis=-1),
        highest=jnp.max(log_model, axis=-1),
        target=target,
    )


def memory_weights(
    scores: Float[Array, "*B K"], is_valid: Bool[Array, "*B K"], sharpness: Float[Array, ""]
) -> Float[Array, "*B K"]:
    """The share of each hit: softmax of sharpness times cosine; all zero without hits.

    Args:
        scores: [..., K] cosines.
        is_valid: [..., K] which hits are real.
        sharpness: the inverse temperature, a scalar.

    Returns:
        [..., K], each row summing to one, or zero.

    Example:
        >>> import jax.numpy as jnp
        >>> valid = jnp.array([True, True, False])
        >>> memory_weights(jnp.array([0.5, 0.5, 0.9]), valid, jnp.float32(3.0)).tolist()
        [0.5, 0.5, 0.0]
    """
    share = jax.nn.softmax(jnp.where(is_valid, sharpness * scores, _NOTHING), axis=-1)
    return jnp.where(is_valid, share, 0.0)


def memory_distribution(
    weights: Float[Array, "*B K"], symbols: Int[Array, "*B K"], vocab_size: int
) -> Float[Array, "*B V"]:
    """The hits' weights summed by symbol: Khandelwal et al. 2020, equation 2.

    Args:
        weights: [..., K] from `memory_weights`.
        symbols: [..., K] the symbols that followed the hits.
        vocab_size: V.

    Returns:
        [..., V] probabilities.

    Example:
        >>> import jax.numpy as jnp
        >>> memory_distribution(jnp.array([0.5, 0.3, 0.2]), jnp.array([1, 0, 1]), 3).tolist()
        [0.30000001192092896, 0.699999988079071, 0.0]
    """
    # A sum over hits, not a scatter: scatters of floats add in no fixed order on GPUs.
    return jnp.sum(weights[..., None] * jax.nn.one_hot(symbols, vocab_size), axis=-2)


class MemoryInterpolation(nn.Module):
    """Mixes the model's distribution with the memory's: (1 - share) p_model + share p_memory.

    Khandelwal et al. 2020, equation 3, with a share for each position: the sigmoid of a linear
    function of what can be seen before the symbol comes (the best cosine, its square, the model's
    entropy and certainty, the mass of the memory's favourite, and how much the model agrees). A
    handful of scalars, to be fitted on text that is neither trained on nor reported. A position
    without hits keeps the model's distribution to the bit. Float32.

    Attributes:
        is_constant: one share for all positions with hits, as in the papers.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> log_model = jnp.log(jnp.array([[0.25, 0.75]]))
        >>> hits = jnp.array([[0.9]]), jnp.array([[1]]), jnp.array([[True]])
        >>> init = jax.jit(MemoryInterpolation().init_with_output)
        >>> mixed, _ = init(jax.random.key(0), log_model, *hits)
        >>> float(jnp.exp(mixed[0, 1])) > 0.75
        True
    """

    is_constant: bool = False

    def setup(self) -> None:
        """Makes the scalars."""
        self.log_sharpness = self.param("log_sharpness", nn.initializers.constant(3.0), ())
        self.bias = self.param("bias", nn.initializers.constant(-2.0), ())
        if not self.is_constant:
            self.slope = self.param("slope", nn.initializers.zeros, (_NUM_FEATURES,))

    def __call__(
        self,
        log_model: Float[Array, "*B V"],
        scores: Float[Array, "*B K"],
        symbols: Int[Array, "*B K"],
        is_valid: Bool[Array, "*B K"],
    ) -> Float[Array, "*B V"]:
        """Mixes whole distributions.

        Args:
            log_model: [..., V] the model's log probabilities.
            scores: [..., K] cosines of the hits.
            symbols: [..., K] the symbols that followed them.
            is_valid: [..., K] which hits are real.

        Returns:
            [..., V] log probabilities.
        """
        nothing = jnp.zeros(log_model.shape[:-1], jnp.int32)
        evidence = gather_evidence(log_model, scores, symbols, is_valid, nothing)
        weights = self._weights(evidence)
        memory = memory_distribution(weights, evidence.symbols, log_model.shape[-1])
        logit, has_hits = self._logit(evidence, weights), jnp.any(evidence.is_valid, axis=-1)
        return _mix(log_model, memory, logit[..., None], has_hits[..., None])

    def target_log_prob(self, evidence: Evidence) -> Float[Array, "*B"]:
        """The mixed log probability of the target alone: equals its entry of `__call__`.

        Args:
            evidence: of the positions.

        Returns:
            [...] log probabilities.
        """
        weights = self._weights(evidence)
        is_right = evidence.symbols == evidence.target[..., None]
        memory = jnp.sum(jnp.where(is_right, weights, 0.0), axis=-1)
        logit, has_hits = self._logit(evidence, weights), jnp.any(evidence.is_valid, axis=-1)
        return _mix(evidence.model_at_target, memory, logit, has_hits)

    def _weights(self, evidence: Evidence) -> Float[Array, "*B K"]:
        sharpness = jnp.exp(self.log_sharpness)
        weights = memory_weights(evidence.scores, evidence.is_valid, sharpness)
        # On GPUs XLA would make the softmax again for every pair of hits, compiling for minutes.
        return jax.lax.optimization_barrier(weights)

    def _logit(self, evidence: Evidence, weights: Float[Array, "*B K"]) -> Float[Array, "*B"]:
        if self.is_constant:
            return jnp.broadcast_to(self.bias, evidence.entropy.shape)
        return _features(evidence, weights) @ self.slope + self.bias


_NUM_FEATURES = 7


def _features(evidence: Evidence, weights: Float[Array, "*B K"]) -> Float[Array, "*B F"]:
    """What the share of the memory may depend on, none of it knowing the target."""
    symbols = evidence.symbols
    is_same = symbols[..., :, None] == symbols[..., None, :]
    # The mass of each hit's symbol: the memory's distribution at the symbols that it knows.
    mass = jnp.sum(jnp.where(is_same, weights[..., None, :], 0.0), axis=-1)
    mass = jnp.where(evidence.is_valid, mass, 0.0)
    model = jnp.where(evidence.is_valid, jnp.exp(evidence.model_at_hits), 0.0)
    favourite = jnp.argmax(mass, axis=-1)[..., None]
    best = jnp.max(jnp.where(evidence.is_valid, evidence.scores, -1.0), axis=-1)
    features = (
        best,
        best**2,
        evidence.entropy,
        jnp.exp(evidence.highest),
        jnp.max(mass, axis=-1),
        jnp.sum(weights * model, axis=-1),
        jnp.take_along_axis(model, favourite, axis=-1)[..., 0],
    )
    return jnp.stack(features, axis=-1)


def _mix(
    log_model: Float[Array, "*B"],
    memory: Float[Array, "*B"],
    logit: Float[Array, "*#B"],
    has_hits: Bool[Array, "*#B"],
) -> Float[Array, "*B"]:
    """The log of (1 - share) exp(log_model) + share memory; log_model without hits."""
    is_known = memory > 0
    # Twice where, so that no gradient passes the logarithm of zero.
    log_memory = jnp.where(is_known, jnp.log(jnp.where(is_known, memory, 1.0)), _NOTHING)
    mixed = jnp.logaddexp(
        log_model + jax.nn.log_sigmoid(-logit), log_memory + jax.nn.log_sigmoid(logit)
    )
    return jnp.where(has_hits, mixed, log_model)
