"""A byte-level causal language model whose feed-forward layers are `MoESystem`s."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Dtype, Float, Int, Integer
from moe_jax.config import LanguageModelConfig, MoEConfig
from moe_jax.graph import KnowledgeGraph
from moe_jax.routing import RoutingStats
from moe_jax.system import MoEOutput, MoESystem, checked_mask


class LanguageModelOutput(NamedTuple):
    """What one call of the language model gives.

    Attributes:
        logits: [B, S, V] float32; row s predicts the token after input s.
        hidden: [B, S, D] what the head read, after the last norm; a context vector for memories.
        moe: output of the last block's system, the one that reports and reads memory.
        auxiliary_loss: the blocks' weighted auxiliary losses, averaged.
        stats: routing statistics, each with a leading axis of layers.
    """

    logits: Float[Array, "B S V"]
    hidden: Float[Array, "B S D"]
    moe: MoEOutput
    auxiliary_loss: Float[Array, ""]
    stats: RoutingStats


class MoELanguageModel(nn.Module):
    """Embedding -> blocks of causal attention and sparse experts -> norm -> head.

    Causal for certain: the output at t depends on inputs up to t alone, drops included. With
    `moe.dispatch="capacity"` it depends on S, too, by which slots are counted: a text alone and in
    a longer padded row may drop other choices, where "dropless" drops none. The last block's system
    writes draft reports and, when `moe.memory_read`, reads the graph; the blocks before it only
    compute.

    Attributes:
        config: everything that shapes the model.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax.config import smallest_run
        >>> model, tokens = MoELanguageModel(smallest_run().model), jnp.zeros((2, 16), int)
        >>> variables = jax.jit(model.init)(jax.random.key(0), tokens)
        >>> jax.jit(model.apply)(variables, tokens).logits.shape
        (2, 16, 257)
    """

    config: LanguageModelConfig

    def setup(self) -> None:
        """Builds the blocks."""
        c = self.config
        width, dtype = c.moe.input_dim, jnp.dtype(c.moe.compute_dtype)
        self.embedding = nn.Embed(c.vocab_size, width, embedding_init=nn.initializers.normal(0.5))
        if c.ngram_sizes:
            self.ngrams = NgramEmbedding(width, c.ngram_sizes, c.ngram_rows, c.ngram_dim)
        inner = c.moe.replace(
            report_scope="none", memory_read=False, librarian_contrastive_weight=0.0
        )
        systems = [inner] * (c.num_layers - 1) + [c.moe]
        self.blocks = [_Block(system, c.num_heads) for system in systems]
        self.norm = nn.RMSNorm(dtype=dtype)
        # Sums in float32 are kept: a softmax wants more digits than bfloat16 has.
        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        self.head = nn.Dense(c.vocab_size, use_bias=False, dtype=dtype, dot_general=dot)

    def __call__(
        self,
        tokens: Integer[Array, "B S"],
        graph: KnowledgeGraph | None = None,
        *,
        is_valid: Bool[Array, "B S"] | None = None,
        source: Int[Array, "B 2"] | None = None,
        is_training: bool = False,
    ) -> LanguageModelOutput:
        """Predicts the token after each input.

        Args:
            tokens: [B, S] ids, of any integer dtype; one that is not in [0, V) is padding.
            graph: the memory; needed when `moe.memory_read`.
            is_valid: [B, S], False for padding, wherever it lies.
            source: [B, 2] document id and offset of each sequence's first target.
            is_training: training capacity, dropout and router noise.

        Returns:
            Logits, the last system's output, losses and statistics.

        Raises:
            ValueError: tokens are not [B, S] or longer than `max_length`, or is_valid or source has
                another shape.
        """
        c = self.config
        if tokens.ndim != 2 or tokens.shape[1] > c.max_length:
            raise ValueError(
                f"tokens must have shape [B, S] with S at most max_length={c.max_length}, "
                f"got {tokens.shape}"
            )
        tokens = tokens.astype(jnp.int32)
        is_symbol = (tokens >= 0) & (tokens < c.vocab_size)
        mask = checked_mask(is_valid, tokens.shape)
        is_valid = is_symbol if mask is None else mask & is_symbol
        x = self.embedding(jnp.where(is_valid, tokens, 0))
        if c.ngram_sizes:
            x = x + self.ngrams(jnp.where(is_valid, tokens, -1))
        x = x.astype(c.moe.compute_dtype)
        outputs = []
        for block in self.blocks:
            x, output = block(x, graph, is_valid=is_valid, source=source, is_training=is_training)
            outputs.append(output)
        hidden = self.norm(x)
        return LanguageModelOutput(
            logits=self.head(hidden),
            hidden=hidden,
            moe=outputs[-1],
            auxiliary_loss=jnp.mean(jnp.stack([output.losses.total for output in outputs])),
            stats=jax.tree.map(lambda *a: jnp.stack(a), *[output.stats for output in outputs]),
        )


class NgramEmbedding(nn.Module):
    """Hashed embeddings of the last 2, 3, ... tokens: Pagnoni et al. 2024, section 3.2.1.

    Each position looks up one row per n-gram size by a hash of its last n tokens, and projects
    the rows, side by side, to the model's width. It costs a look-up and gives a small model what
    it would otherwise spend layers on: the frequent n-grams by heart.

    Attributes:
        width: D of the result.
        sizes: n-gram sizes, each at least 2.
        rows: rows per size; distinct n-grams may share one.
        dim: width of a row.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> ngrams = NgramEmbedding(width=8, sizes=(2, 3), rows=64, dim=4)
        >>> init = jax.jit(ngrams.init_with_output)
        >>> init(jax.random.key(0), jnp.zeros((1, 5), int))[0].shape
        (1, 5, 8)
    """

    width: int
    sizes: tuple[int, ...]
    rows: int
    dim: int

    @nn.compact
    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Embeds; position s sees tokens up to s."""
        ids = ngram_ids(tokens, self.sizes, self.rows)
        shape = (len(self.sizes) * self.rows, self.dim)
        table = self.param("table", nn.initializers.normal(0.5), shape)
        found = table[ids].reshape(*tokens.shape, -1)
        return nn.Dense(self.width, use_bias=False, name="project")(found)


def ngram_ids(
    tokens: Integer[Array, "B S"], sizes: tuple[int, ...], rows: int
) -> Int[Array, "B S I"]:
    """Rows of a stacked n-gram table, by a multiplicative hash of the last n tokens.

    Args:
        tokens: [B, S]; -1 for none, as before the first.
        sizes: n-gram sizes; size i owns the rows [i * rows, (i + 1) * rows).
        rows: rows per size.

    Returns:
        [B, S, len(sizes)] int32.

    Example:
        >>> import jax.numpy as jnp
        >>> a = ngram_ids(jnp.array([[1, 2, 3, 2, 3]]), (2,), 1024)[0, :, 0]
        >>> bool(a[2] == a[4]), bool(a[1] == a[2])
        (True, False)
    """
    tokens = tokens.astype(jnp.int32)
    # Knuth's multiplicative constant, and a shift that mixes high bits into low ones.
    factor, hashes = jnp.uint32(2654435761), []
    for i, size in enumerate(sizes):
        code = jnp.full(tokens.shape, size, jnp.uint32)
        for back in range(size):
            shifted = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)
            code = (code ^ shifted[:, : tokens.shape[1]].astype(jnp.uint32)) * factor
            code = code ^ (code >> 15)
        hashes.append((code % jnp.uint32(rows)).astype(jnp.int32) + i * rows)
    return jnp.stack(hashes, axis=-1)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + system(norm(x))."""

    config: MoEConfig
    num_heads: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        graph: KnowledgeGraph | None,
        *,
        is_valid: Bool[Array, "B S"] | None,
        source: Int[Array, "B 2"] | None,
        is_training: bool,
    ) -> tuple[Float[Array, "B S D"], MoEOutput]:
        dtype = jnp.dtype(self.config.compute_dtype)
        normed = nn.RMSNorm(dtype=dtype, name="attention_norm")(x)
        x = x + CausalAttention(self.num_heads, dtype=dtype, name="attention")(normed, is_valid)
        normed = nn.RMSNorm(dtype=dtype, name="system_norm")(x)
        output = MoESystem(self.config, name="system")(
            normed, graph, is_valid=is_valid, source=source, is_training=is_training
        )
        return x + output.output, output


class CausalAttention(nn.Module):
    """Multi-head causal attention with rotary positions and smeared keys.

    Rotary embeddings: Su et al. 2021, equation 34. Smeared keys, a learned blend of each key with
    its predecessor (Olsson et al. 2022, "In-context learning and induction heads"), let a single
    layer look for "what followed this before".

    Attributes:
        num_heads: heads; divides the width into even parts.
        dtype: of the arithmetic; the softmax is float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> init = jax.jit(CausalAttention(num_heads=2).init_with_output)
        >>> init(jax.random.key(0), jnp.ones((1, 5, 8)))[0].shape
        (1, 5, 8)
    """

    num_heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], is_valid: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B S D"]:
        """Attends to valid tokens up to each position."""
        batch, length, width = x.shape
        fused = nn.Dense(3 * width, use_bias=False, dtype=self.dtype, name="qkv")(x)
        heads = fused.reshape(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = (heads[:, :, i] for i in range(3))
        if is_valid is not None:  # padding blends into no key, and its numbers do not matter
            key, value = (jnp.where(is_valid[..., None, None], a, 0) for a in (key, value))
        blend = self.param("smear", nn.initializers.zeros, (self.num_heads, heads.shape[-1]))
        blend = jax.nn.sigmoid(blend).astype(key.dtype)[None, None]
        previous = jnp.pad(key, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :length]
        key = blend * key + (1 - blend) * previous
        mask = None if is_valid is None else is_valid[:, None, None, :]
        mixed = jax.nn.dot_product_attention(
            rotate(query), rotate(key), value, mask=mask, is_causal=True
        )
        out = nn.Dense(width, use_bias=False, dtype=self.dtype, name="out")
        return out(mixed.reshape(batch, length, width))


def rotate(x: Float[Array, "B S G W"]) -> Float[Array, "B S G W"]:
    """Turns each pair of coordinates by an angle that grows with the position.

    Args:
        x: [B, S, heads, W], W even.

    Returns:
        The same shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 1, 1, 4))
        >>> bool((rotate(x) == x).all())
        True
    """
    length, half = x.shape[1], x.shape[-1] // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency[None]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)
    return turned.astype(x.dtype)
