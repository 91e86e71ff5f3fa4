"""What every expert takes and gives, and the parts they share."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Dtype, Float, Int
from moe_jax.experts import by_row
from moe_jax.experts.by_row import Rows
from moe_jax.ops.activations import activate
from moe_jax.ops.dropout import dropout
from moe_jax.ops.grouped import group_of_rows
from moe_jax.ops.layer_norm import layer_norm
from moe_jax.ops.segment_attention import segment_attention
from moe_jax.quantization import WithInputs, dequantize, product


def dot_general(*args: Any, **kwargs: Any) -> Array:
    """`jax.lax.dot_general` by itself, with nothing that follows fused into it.

    XLA would fuse the bias with the matmul, where it is often slower or comes apart again as a
    pass of its own; held back, the bias joins the activation that follows.
    """
    return jax.lax.optimization_barrier(jax.lax.dot_general(*args, **kwargs))


def promote_dtype(x: Array, kernel: Any, bias: Any, *, dtype: Dtype) -> list[Any]:
    """Flax's, for a matrix that may be quantised: it is multiplied out here."""
    return nn.dtypes.promote_dtype(*dequantize(x, kernel), bias, dtype=dtype)


class ExpertOutput(NamedTuple):
    """What an expert makes of its tokens.

    Attributes:
        output: [..., C, O].
        confidence: [..., C] float32 in (0, 1).
    """

    output: Float[Array, "*B C O"]
    confidence: Float[Array, "*B C"]


class Dense(nn.Module):
    """A linear layer of one expert, on its own buffer or on the rows of all experts.

    Attributes:
        features: width of the result.
        use_bias: add a bias.
        activation: of the sums: "gelu", "gelu_tanh", "swiglu" (half as wide), or None.
        dtype: of the arithmetic; parameters are float32.
        dot_general: multiplies buffers.
    """

    features: int
    use_bias: bool = True
    activation: str | None = None
    dtype: Dtype = jnp.float32
    dot_general: Callable[..., Array] = jax.lax.dot_general

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*B D"],
        rows: Rows | None = None,
        residual: Float[Array, "*B F"] | None = None,
    ) -> Float[Array, "*B F"]:
        """Multiplies and adds; with `rows` x is [R, D] and each row has its own expert.

        A residual is added last.
        """
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, shape[1:]) if self.use_bias else None
        if isinstance(kernel, WithInputs) and rows is None:
            out, bias = nn.dtypes.promote_dtype(product(x, kernel), bias, dtype=self.dtype)
        else:
            x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
            if rows is not None:
                return by_row.linear(x, kernel, bias, rows.groups, self.activation, residual)
            out = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        if bias is not None:
            out = out + bias.reshape((1,) * (x.ndim - 1) + shape[1:])
        out = activate(out, self.activation)
        return out if residual is None else out + residual


class LayerNorm(nn.Module):
    """Layer normalisation with float32 statistics and the original's epsilon.

    Attributes:
        activation: of the result, as `Dense` takes it.
        dtype: of the result.
    """

    activation: str | None = None
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Names the parameters' place."""
        self.norm = _Norm()

    def __call__(self, x: Float[Array, "*B D"], rows: Rows | None = None) -> Float[Array, "*B D"]:
        """Normalises the last axis; with `rows` x is [R, D], scaled by each row's expert."""
        scale, bias = self.norm(x)
        if rows is not None:
            return by_row.norm(x, scale, bias, rows.groups, self.dtype, self.activation)
        one = (1,) * (x.ndim - 1)
        scale, bias = (a.reshape(*one, -1) for a in (scale, bias))
        return activate(layer_norm(x, scale, bias, self.dtype), self.activation)

    def branch(
        self, x: Float[Array, "*B D"], rows: Rows | None = None
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """`x` and its norm, for a layer that is added to what it reads."""
        if rows is None:
            return x, self(x)
        return by_row.norm_branch(x, *self.norm(x), rows.groups, self.dtype, self.activation)


class _Norm(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> tuple[Float[Array, "D"], Float[Array, "D"]]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return jnp.asarray(scale), jnp.asarray(bias)


class Dropout(nn.Module):
    """Dropout in training, from the rng "dropout"; see `moe_jax.ops.dropout`.

    Attributes:
        rate: probability of zero.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"], is_training: bool) -> Float[Array, "*B D"]:
        """Drops, or gives `x` as it is."""
        if not is_training or not self.rate:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))


class ConfidenceHead(nn.Module):
    """A sigmoid over one linear read-out: how sure the expert is of each token."""

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "*B C H"], rows: Rows | None = None
    ) -> Float[Array, "*B C"]:
        """Returns the confidence of every token, float32."""
        hidden = hidden.astype(jnp.float32)
        if rows is None:
            return jax.nn.sigmoid(Dense(1, name="read_out")(hidden)[..., 0])
        return jax.nn.sigmoid(_ReadOut(name="read_out")(hidden, rows))


class _ReadOut(nn.Module):
    """`Dense(1)` on rows: one number each, which is a sum along the row and no matmul."""

    @nn.compact
    def __call__(self, hidden: Float[Array, "R H"], rows: Rows) -> Float[Array, "R"]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (hidden.shape[-1], 1))
        bias = self.param("bias", nn.initializers.zeros, (1,))
        kernel, bias = (by_row.spread(hidden, a, rows.groups) for a in (kernel[:, 0], bias))
        return jnp.sum(hidden * kernel, axis=-1) + bias[:, 0]


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
        rows: Rows | None = None,
        residual: Float[Array, "*B C H"] | None = None,
    ) -> Float[Array, "*B C H"]:
        """Attends; invalid tokens are seen by none, and rows only by their own sequence's."""
        width = x.shape[-1]
        dense = functools.partial(Dense, dtype=self.dtype, dot_general=dot_general)
        fused = dense(3 * width, name="qkv")(x, rows)
        heads = fused.reshape(-1, x.shape[-2], 3, self.num_heads, width // self.num_heads)
        among = self._among_slots if rows is None else self._among_rows
        mixed = among(heads, is_valid, position, rows)
        return dense(width, name="out")(mixed.reshape(x.shape), rows, residual)

    def _among_slots(
        self,
        heads: Float[Array, "I C 3 heads d"],
        is_valid: Bool[Array, "*B C"],
        position: Int[Array, "*B C"],
        rows: None,
    ) -> Float[Array, "I C heads d"]:
        sees = is_valid[..., None, :]
        if self.causal:
            sees = sees & (position[..., None, :] <= position[..., :, None])
        mask = jnp.broadcast_to(sees, (*is_valid.shape, is_valid.shape[-1]))
        parts = (heads[:, :, i] for i in range(3))
        return jax.nn.dot_product_attention(*parts, mask=mask.reshape(-1, 1, *mask.shape[-2:]))

    def _among_rows(
        self,
        heads: Float[Array, "1 R 3 heads d"],
        is_valid: Bool[Array, "R"],
        position: Int[Array, "R"],
        rows: Rows,
    ) -> Float[Array, "R heads d"]:
        # An expert's rows of a sequence lie together, and this number is theirs alone.
        segment = rows.sequence * (rows.groups.num_groups + 1) + group_of_rows(rows.groups)
        return segment_attention(
            heads[0],
            segment=segment,
            is_valid=is_valid,
            position=position if self.causal else None,
        )
