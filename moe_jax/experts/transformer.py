"""The standard expert: an encoder, one transformer layer, a decoder and a confidence head."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Dtype, Float, Int
from moe_jax.experts.base import (
    ConfidenceHead,
    Dense,
    Dropout,
    ExpertOutput,
    LayerNorm,
    SelfAttention,
    dot_general,
    promote_dtype,
)
from moe_jax.experts.by_row import Rows
from moe_jax.ops.activations import activate


class TransformerExpert(nn.Module):
    """The original's expert.

    Encoder Linear(D, H) -> LayerNorm -> GELU -> Dropout; processor, a pre-norm transformer
    encoder layer with feed-forward width 4H; decoder Linear(H, H) -> GELU -> Dropout ->
    Linear(H, O). The confidence is read from the processor's result.

    Attributes:
        hidden_dim: H.
        output_dim: O.
        num_heads: attention heads; divides H.
        causal: tokens attend to their own and earlier positions only.
        dropout: rate, after the encoder, attention, both feed-forward layers and in the decoder.
        approximate_gelu: tanh GELU in place of the exact one.
        dtype: of the arithmetic; parameters, norms' statistics and softmaxes are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, valid = jnp.ones((8, 4)), jnp.ones(8, bool)
        >>> init = jax.jit(TransformerExpert(16, 4, num_heads=2).init_with_output)
        >>> out, _ = init(jax.random.key(0), x, valid, jnp.arange(8))
        >>> out.output.shape
        (8, 4)
    """

    hidden_dim: int
    output_dim: int
    num_heads: int = 8
    causal: bool = False
    dropout: float = 0.0
    approximate_gelu: bool = False
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Lays out the layers."""
        dense = functools.partial(Dense, dtype=self.dtype, dot_general=dot_general)
        self.encoder = dense(self.hidden_dim)
        self.encoder_norm = LayerNorm(activation=self._activation, dtype=self.dtype)
        self.attention_norm = LayerNorm(dtype=self.dtype)
        self.attention = SelfAttention(self.num_heads, causal=self.causal, dtype=self.dtype)
        self.feed_forward_norm = LayerNorm(dtype=self.dtype)
        self.feed_forward_up = dense(4 * self.hidden_dim, activation=self._activation)
        self.feed_forward_down = dense(self.hidden_dim)
        self.decoder_hidden = dense(self.hidden_dim, activation=self._activation)
        self.decoder_out = dense(self.output_dim)
        self.confidence = ConfidenceHead()
        self.drop = Dropout(self.dropout)

    def __call__(
        self,
        x: Float[Array, "*B C D"],
        is_valid: Bool[Array, "*B C"],
        position: Int[Array, "*B C"],
        is_training: bool = False,
        rows: Rows | None = None,
    ) -> ExpertOutput:
        """Encodes, processes and decodes; see the class."""
        hidden = self.process(x, is_valid, position, is_training, rows)
        return self.decode(hidden, is_training, rows)

    def process(
        self,
        x: Float[Array, "*B C D"],
        is_valid: Bool[Array, "*B C"],
        position: Int[Array, "*B C"],
        is_training: bool = False,
        rows: Rows | None = None,
    ) -> Float[Array, "*B C H"]:
        """Encoder and transformer layer."""
        hidden = self.encoder_norm(self.encoder(x, rows), rows)
        # Held as it is, or the compiler would make it again for each of its two readers.
        hidden = jax.lax.optimization_barrier(self.drop(hidden, is_training))
        hidden, unit = self.attention_norm.branch(hidden, rows)
        attend = functools.partial(self.attention, unit, is_valid, position, rows)
        hidden = self._add(hidden, attend, is_training)
        hidden, unit = self.feed_forward_norm.branch(hidden, rows)
        inner = self.drop(self.feed_forward_up(unit, rows), is_training)
        return self._add(
            hidden, functools.partial(self.feed_forward_down, inner, rows), is_training
        )

    def _add(
        self, hidden: Float[Array, "*B C H"], layer: Callable, is_training: bool
    ) -> Float[Array, "*B C H"]:
        """Adds a layer, which does so itself, and for less, where nothing is dropped of it."""
        if is_training and self.dropout:
            return hidden + self.drop(layer(), is_training)
        return layer(residual=hidden)

    def decode(
        self, hidden: Float[Array, "*B C H"], is_training: bool = False, rows: Rows | None = None
    ) -> ExpertOutput:
        """Decoder and confidence head."""
        inner = self.decoder_hidden(hidden, rows)
        inner = self.drop(inner, is_training)
        output = self.decoder_out(inner, rows)
        return ExpertOutput(output=output, confidence=self.confidence(hidden, rows))

    @property
    def _activation(self) -> str:
        return "gelu_tanh" if self.approximate_gelu else "gelu"


class SpecializedExpert(TransformerExpert):
    """A `TransformerExpert` whose processed tokens pass through sub-specialists.

    Each sub-specialist is Linear(H, H) -> GELU; a softmax router over the processed token mixes
    them. The confidence of the mix is scaled by 0.7 + 0.3 * sharpness, where sharpness is
    1 - entropy / log(num_specialists) of the router's softmax.

    Attributes:
        num_specialists: sub-specialists, at least 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, valid = jnp.ones((8, 4)), jnp.ones(8, bool)
        >>> init = jax.jit(SpecializedExpert(16, 4, num_heads=2).init_with_output)
        >>> out, _ = init(jax.random.key(0), x, valid, jnp.arange(8))
        >>> out.output.shape
        (8, 4)
    """

    num_specialists: int = 4

    def setup(self) -> None:
        """Adds the sub-specialists and their router to the layers."""
        super().setup()
        self.specialists = nn.DenseGeneral(
            features=(self.num_specialists, self.hidden_dim),
            dtype=self.dtype,
            promote_dtype=promote_dtype,
        )
        self.specialist_router = nn.Dense(self.num_specialists, dtype=jnp.float32)

    def __call__(
        self,
        x: Float[Array, "*B C D"],
        is_valid: Bool[Array, "*B C"],
        position: Int[Array, "*B C"],
        is_training: bool = False,
    ) -> ExpertOutput:
        """Encodes, processes, specialises and decodes; see the class."""
        hidden = self.process(x, is_valid, position, is_training)
        log_weight = nn.log_softmax(self.specialist_router(hidden.astype(jnp.float32)))
        weight = jnp.exp(log_weight)
        each = activate(self.specialists(hidden), self._activation)
        mixed = jnp.einsum("...s,...sh->...h", weight.astype(each.dtype), each)
        output, confidence = self.decode(mixed, is_training)
        if self.num_specialists > 1:
            entropy = -jnp.sum(weight * log_weight, axis=-1) / jnp.log(self.num_specialists)
        else:
            entropy = jnp.zeros_like(confidence)
        return ExpertOutput(output=output, confidence=confidence * (0.7 + 0.3 * (1.0 - entropy)))
