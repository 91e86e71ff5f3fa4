"""The supervisor: attention over expert embeddings, a gate, and a choice of experts."""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Dtype, Float, PRNGKey
from moe_jax.routing import Choices, dense, noisy_topk, topk

BALANCE_BIAS = "balance_bias"


class SupervisorOutput(NamedTuple):
    """The supervisor's decision.

    Attributes:
        logits: [B, S, E] float32 router logits.
        choices: the experts and weights of each token.
    """

    logits: Float[Array, "B S E"]
    choices: Choices


class Supervisor(nn.Module):
    """logits = gate(x + attention(query=x, key=value=expert_embeddings)).

    The gate is Linear(D, 4E) -> GELU -> Linear(4E, E). Everything is float32, whatever the
    compute dtype, since routing decides discretely. The gate's last layer starts with orthogonal
    columns that each sum to zero: GELU's positive mean then gives no expert a head start, so the
    load is even before any training.

    Attributes:
        num_experts: E.
        top_k: K; ignored by the "dense" gating.
        num_heads: heads of the attention; divides D.
        gating_type: "topk", "noisy_topk" or "dense".
        balance_bias: hold a parameter "balance_bias" [E] that sways which experts are chosen. It
            has no gradient; `moe_jax.routing.balanced_bias` moves it.
        residual: add x to the attention's result; False is the original's gate, which sees
            only a mixture of expert embeddings.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> supervisor = Supervisor(num_experts=4, top_k=2, num_heads=2)
        >>> x, embeddings = jnp.ones((1, 3, 8)), jnp.ones((4, 8))
        >>> out, _ = jax.jit(supervisor.init_with_output)(jax.random.key(0), x, embeddings)
        >>> out.choices.expert.shape
        (1, 3, 2)
    """

    num_experts: int
    top_k: int
    num_heads: int = 8
    gating_type: Literal["topk", "noisy_topk", "dense"] = "topk"
    residual: bool = True
    balance_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        expert_embeddings: Float[Array, "E D"],
        is_training: bool = False,
    ) -> SupervisorOutput:
        """Chooses each token's experts.

        Args:
            x: [B, S, D] tokens, any float dtype.
            expert_embeddings: [E, D], what the attention reads.
            is_training: "noisy_topk" then adds noise from the rng "router".

        Returns:
            Logits and choices.

        Raises:
            ValueError: gating_type is unknown, or num_heads does not divide D.
        """
        if self.gating_type not in ("topk", "noisy_topk", "dense"):
            raise ValueError(
                f'gating_type must be "topk", "noisy_topk" or "dense", got {self.gating_type!r}'
            )
        if x.shape[-1] % self.num_heads:
            raise ValueError(f"num_heads must divide D={x.shape[-1]}, got {self.num_heads}")
        x = x.astype(jnp.float32)
        seen = _EmbeddingAttention(self.num_heads, name="attention")(x, expert_embeddings)
        if self.residual:
            seen = x + seen
        hidden = nn.gelu(
            nn.Dense(4 * self.num_experts, name="gate_hidden")(seen), approximate=False
        )
        logits = nn.Dense(self.num_experts, kernel_init=_centred_orthogonal, name="gate_out")(
            hidden
        )
        bias = None
        if self.balance_bias:
            bias = self.param(BALANCE_BIAS, nn.initializers.zeros, (self.num_experts,))
            bias = jax.lax.stop_gradient(bias)
        match self.gating_type:
            case "dense":
                choices = dense(logits)
            case "noisy_topk":
                zero = nn.initializers.zeros
                noise = nn.Dense(self.num_experts, kernel_init=zero, name="noise")(seen)
                key = self.make_rng("router") if is_training else None
                choices = noisy_topk(logits, noise, self.top_k, key, bias)
            case _:
                choices = topk(logits, self.top_k, bias)
        return SupervisorOutput(logits=logits, choices=choices)


class _EmbeddingAttention(nn.Module):
    """Multi-head attention of every token over the E expert embeddings."""

    num_heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], embeddings: Float[Array, "E D"]
    ) -> Float[Array, "B S D"]:
        width = x.shape[-1]
        per_head = self.num_heads, width // self.num_heads
        fused = nn.Dense(2 * width, name="key_value")(embeddings)
        key, value = fused.reshape(-1, 2, *per_head).swapaxes(0, 1)
        ask, ask_bias = _Affine(width, name="query")()
        tell, tell_bias = _Affine(width, name="out")()
        # With few experts it takes less to multiply their keys and values into the matrices
        # before and after than to apply those to every token: einsum chooses the cheaper order.
        score = jnp.einsum("bsx,xhd,ehd->bshe", x, ask.reshape(width, *per_head), key)
        score += jnp.einsum("hd,ehd->he", ask_bias.reshape(per_head), key)[None, None]
        share = jax.nn.softmax(score / jnp.sqrt(jnp.float32(per_head[1])), axis=-1)
        seen = jnp.einsum("bshe,ehd,hdx->bsx", share, value, tell.reshape(*per_head, width))
        return seen + tell_bias[None, None]


class _Affine(nn.Module):
    """The parameters of a linear layer that keeps the width."""

    width: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "D D"], Float[Array, "D"]]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.width, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        return jnp.asarray(kernel), jnp.asarray(bias)


def _centred_orthogonal(
    key: PRNGKey, shape: tuple[int, ...], dtype: Dtype = jnp.float32
) -> Float[Array, "I E"]:
    """Orthonormal columns, each summing to zero; scaled so that logits have about unit variance."""
    rows, columns = shape
    wide = jax.random.normal(key, (rows, columns), jnp.float32)
    wide = wide - jnp.mean(wide, axis=0, keepdims=True)
    basis, _ = jnp.linalg.qr(wide)
    # GELU of a standard normal has variance 0.345.
    return (basis / jnp.sqrt(0.345)).astype(dtype)
