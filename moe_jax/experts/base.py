"""What every expert takes and gives, and the parts they share."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Dtype, Float, Int

LAYER_NORM_EPS = 1e-5


def dot_general(*args: Any, **kwargs: Any) -> Array:
    """`jax.lax.dot_general` by itself, with nothing that follows fused into it.

    XLA would fuse the bias with the matmul, where it is often slower or comes apart again as a
    pass of its own; held back, the bias joins the activation that follows.
    """
    return jax.lax.optimization_barrier(jax.lax.dot_general(*args, **kwargs))


class ExpertOutput(NamedTuple):
    """What an expert makes of its tokens.

    Attributes:
        output: [..., C, O].
        confidence: [..., C] float32 in (0, 1).
    """

    output: Float[Array, "*B C O"]
    confidence: Float[Array, "*B C"]


class LayerNorm(nn.Module):
    """Layer normalisation with float32 statistics and the original's epsilon.

    Attributes:
        dtype: of the result.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        norm = nn.LayerNorm(
            epsilon=LAYER_NORM_EPS, dtype=self.dtype, use_fast_variance=False, name="norm"
        )
        return norm(x)


class ConfidenceHead(nn.Module):
    """A sigmoid over one linear read-out: how sure the expert is of each token."""

    @nn.compact
    def __call__(self, hidden: Float[Array, "*B C H"]) -> Float[Array, "*B C"]:
        """Returns the confidence of every token, float32."""
        logit = nn.Dense(1, dtype=jnp.float32, name="read_out")(hidden.astype(jnp.float32))
        return jax.nn.sigmoid(logit[..., 0])


class SelfAttention(nn.Module):
    """Multi-head attention among an expert's own tokens.

    Attributes:
        num_heads: heads; divides the width.
        causal: a token sees only tokens at its own or an earlier position of the sequence.
        dtype: of the arithmetic; the softmax is float32.
    """

    num_heads: int
    causal: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B C H"],
        is_valid: Bool[Array, "*B C"],
        position: Int[Array, "*B C"],
    ) -> Float[Array, "*B C H"]:
        """Attends; invalid tokens are seen by none."""
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, dot_general=dot_general)
        fused = dense(3 * width, name="qkv")(x)
        heads = fused.reshape(-1, x.shape[-2], 3, self.num_heads, width // self.num_heads)
        sees = is_valid[..., None, :]
        if self.causal:
            sees = sees & (position[..., None, :] <= position[..., :, None])
        mask = jnp.broadcast_to(sees, (*x.shape[:-1], x.shape[-2]))
        mixed = jax.nn.dot_product_attention(
            *(heads[:, :, i] for i in range(3)),
            mask=mask.reshape(-1, 1, *mask.shape[-2:]),
        )
        return dense(width, name="out")(mixed.reshape(x.shape))
