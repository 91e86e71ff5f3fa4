"""Experts that treat each token by itself: MLP and SwiGLU."""

import flax.linen as nn
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Dtype, Float, Int
from moe_jax.experts.base import ConfidenceHead, Dense, Dropout, ExpertOutput
from moe_jax.experts.by_row import Rows


class MLPExpert(nn.Module):
    """Linear -> GELU -> Dropout -> Linear, as in Switch and GShard.

    Attributes:
        hidden_dim: H.
        output_dim: O.
        dropout: rate.
        approximate_gelu: tanh GELU in place of the exact one.
        dtype: of the arithmetic; parameters are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, valid = jnp.ones((8, 4)), jnp.ones(8, bool)
        >>> init = jax.jit(MLPExpert(16, 4).init_with_output)
        >>> out, _ = init(jax.random.key(0), x, valid, jnp.arange(8))
        >>> out.output.shape, out.confidence.shape
        ((8, 4), (8,))
    """

    hidden_dim: int
    output_dim: int
    dropout: float = 0.0
    approximate_gelu: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B C D"],
        is_valid: Bool[Array, "*B C"],
        position: Int[Array, "*B C"],
        is_training: bool = False,
        rows: Rows | None = None,
    ) -> ExpertOutput:
        """Treats each token; `is_valid` and `position` are the contract's and unused."""
        del is_valid, position
        gelu = "gelu_tanh" if self.approximate_gelu else "gelu"
        up = Dense(self.hidden_dim, activation=gelu, dtype=self.dtype, name="up")
        hidden = up(x, rows)
        hidden = Dropout(self.dropout)(hidden, is_training)
        output = Dense(self.output_dim, dtype=self.dtype, name="down")(hidden, rows)
        confidence = ConfidenceHead(name="confidence")(hidden, rows)
        return ExpertOutput(output=output, confidence=confidence)


class SwiGLUExpert(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases: Shazeer 2020, as in Mixtral.

    Attributes:
        hidden_dim: H.
        output_dim: O.
        dropout: rate, on the gated product.
        dtype: of the arithmetic; parameters are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, valid = jnp.ones((8, 4)), jnp.ones(8, bool)
        >>> init = jax.jit(SwiGLUExpert(16, 4).init_with_output)
        >>> out, _ = init(jax.random.key(0), x, valid, jnp.arange(8))
        >>> out.output.shape
        (8, 4)
    """

    hidden_dim: int
    output_dim: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B C D"],
        is_valid: Bool[Array, "*B C"],
        position: Int[Array, "*B C"],
        is_training: bool = False,
        rows: Rows | None = None,
    ) -> ExpertOutput:
        """Treats each token; `is_valid` and `position` are the contract's and unused."""
        del is_valid, position
        how = {"use_bias": False, "dtype": self.dtype}
        gate_up = Dense(2 * self.hidden_dim, activation="swiglu", name="gate_up", **how)
        hidden = gate_up(x, rows)
        hidden = Dropout(self.dropout)(hidden, is_training)
        output = Dense(self.output_dim, name="down", **how)(hidden, rows)
        confidence = ConfidenceHead(name="confidence")(hidden, rows)
        return ExpertOutput(output=output, confidence=confidence)
