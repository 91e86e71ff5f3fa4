"""Reading the knowledge graph back: gated cross-attention over retrieved nodes."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Dtype, Float, Int
from moe_jax.experts import LayerNorm
from moe_jax.graph import KnowledgeGraph, record_reads, search

__all__ = ["MemoryReader", "Reads", "note_reads"]


class Reads(NamedTuple):
    """Which nodes were read: one entry for each hit of each token.

    Attributes:
        ids: [..., K] int32 node ids, N where there is no hit.
        is_valid: [..., K] which of them were read; none by padding.
    """

    ids: Int[Array, "*B K"]
    is_valid: Bool[Array, "*B K"]


def note_reads(graph: KnowledgeGraph, reads: Reads | None) -> KnowledgeGraph:
    """Counts on a graph what was read of it: what every step that writes does before it writes.

    A node that many tokens read counts as often, whatever their gate lets through.

    Args:
        graph: the graph that was read.
        reads: what was read; None, of a model without memory, changes nothing.

    Returns:
        The graph with its `reads` counted.

    Example:
        >>> graph = KnowledgeGraph.create(2, 4)._replace(is_live=jnp.ones(2, bool))
        >>> ids, hits = jnp.array([[0, 1], [0, 2]]), jnp.array([[True, True], [True, False]])
        >>> note_reads(graph, Reads(ids, hits)).reads.tolist()
        [2, 1]
    """
    return graph if reads is None else record_reads(graph, reads.ids, reads.is_valid)


class MemoryReader(nn.Module):
    """Adds to each token what its nearest nodes of the graph say.

    A token's search vector is a projection of it; the k nearest live nodes are retrieved, and the
    token attends to their values by their keys. The result passes a gate, tanh of a learned
    vector that starts at zero, so that at the start the model is as without memory (as in
    Flamingo, Alayrac et al. 2022, section 2.2). Gradients reach the reader and the token, never
    the stored arrays. Each token reads by itself, so causality is kept.

    Attributes:
        num_heads: heads of the attention; divides the graph's width.
        top_k: nodes that each token reads.
        threshold: least cosine of a node that is read.
        dtype: of the arithmetic; search and softmax are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax.graph import KnowledgeGraph
        >>> init = jax.jit(MemoryReader(num_heads=2, top_k=2).init_with_output)
        >>> graph, x = KnowledgeGraph.create(8, 4), jnp.ones((1, 3, 4))
        >>> bool((init(jax.random.key(0), x, graph)[0] == x).all())
        True
    """

    num_heads: int = 4
    top_k: int = 4
    threshold: float = 0.0
    dtype: Dtype = jnp.float32

    def __call__(
        self,
        x: Float[Array, "B S D"],
        graph: KnowledgeGraph,
        values: Float[Array, "N O"] | None = None,
    ) -> Float[Array, "B S D"]:
        """Reads; `read` also says what.

        Args:
            x: [B, S, D] tokens.
            graph: the memory, [N, O].
            values: [N, O], what to read in place of the graph's values, such as a
                `moe_jax.gnn.GraphEncoder` makes of them; gradients flow into it.

        Returns:
            [B, S, D], x plus the gated reading.

        Raises:
            ValueError: if values has another shape than the graph's.
        """
        return self.read(x, graph, values)[0]

    @nn.compact
    def read(
        self,
        x: Float[Array, "B S D"],
        graph: KnowledgeGraph,
        values: Float[Array, "N O"] | None = None,
        *,
        is_valid: Bool[Array, "B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Reads]:
        """Reads, and says which nodes.

        Args:
            x: [B, S, D] tokens.
            graph: the memory, [N, O].
            values: as in a call.
            is_valid: [B, S], False for padding, whose reads do not count.

        Returns:
            What a call gives, and the K hits of each token, [B, S, K]: also those that a closed
            gate keeps from the output.

        Raises:
            ValueError: as a call.
        """
        if values is None:
            values = jax.lax.stop_gradient(graph.value)
        elif values.shape != graph.value.shape:
            raise ValueError(f"values must have shape {graph.value.shape}, got {values.shape}")
        width, model_width = graph.dim, x.shape[-1]
        tokens = LayerNorm(dtype=self.dtype, name="norm")(x).reshape(-1, model_width)
        # Starting at the identity makes the first searches look for what the token resembles.
        start = nn.initializers.zeros if width == model_width else nn.initializers.lecun_normal()
        wanted = nn.Dense(width, kernel_init=start, name="search")(tokens.astype(jnp.float32))
        if width == model_width:
            wanted = wanted + tokens.astype(jnp.float32)
        # A reader does not mind near-ties in another order, and has a query for every token.
        hits = search(
            graph, jax.lax.stop_gradient(wanted), self.top_k, self.threshold, reproducible=False
        )

        keys = jax.lax.stop_gradient(graph.key.at[hits.ids].get(mode="fill", fill_value=0))
        values = values.at[hits.ids].get(mode="fill", fill_value=0)
        split = (self.num_heads, width // self.num_heads)
        query = nn.Dense(width, dtype=self.dtype, name="query")(wanted).reshape(-1, *split)
        key = nn.Dense(width, dtype=self.dtype, name="key")(keys)
        value = LayerNorm(dtype=self.dtype, name="value_norm")(values)
        value = nn.Dense(width, dtype=self.dtype, name="value")(value)
        mixed = _attend(query, key.reshape(*key.shape[:2], *split),
                        value.reshape(*value.shape[:2], *split), hits.is_valid)  # fmt: skip
        reading = nn.Dense(model_width, dtype=self.dtype, name="out")(mixed.reshape(-1, width))
        # A token without hits must not read the output's bias either.
        reading = jnp.where(jnp.any(hits.is_valid, axis=1)[:, None], reading, 0)
        gate = jnp.tanh(self.param("gate", nn.initializers.zeros, (model_width,)))
        out = x + (gate[None] * reading).reshape(x.shape).astype(x.dtype)
        ids, is_hit = (a.reshape(*x.shape[:2], -1) for a in (hits.ids, hits.is_valid))
        if is_valid is not None:
            is_hit = is_hit & is_valid[..., None]
        return out, Reads(ids, is_hit)


def _attend(
    query: Float[Array, "T G W"],
    key: Float[Array, "T K G W"],
    value: Float[Array, "T K G W"],
    is_valid: Array,
) -> Float[Array, "T G W"]:
    """Attention of each token over its own K nodes; zero where none is valid."""
    score = jnp.einsum("tgw,tkgw->tgk", query, key, preferred_element_type=jnp.float32)
    score = score / jnp.sqrt(jnp.float32(query.shape[-1]))
    weight = jax.nn.softmax(jnp.where(is_valid[:, None, :], score, -1e9), axis=-1)
    weight = jnp.where(is_valid[:, None, :], weight, 0.0)
    return jnp.einsum("tgk,tkgw->tgw", weight.astype(value.dtype), value)
