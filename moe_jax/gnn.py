"""Graph neural network layers over the edge slots, and how a model reads the graph through them."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Dtype, Float, Int
from moe_jax.graph import KnowledgeGraph
from moe_jax.graph._arguments import is_live_at

__all__ = ["GATLayer", "GraphEncoder", "SAGELayer"]


class SAGELayer(nn.Module):
    """GraphSAGE with the mean aggregator (Hamilton, Ying and Leskovec 2017, algorithm 1).

    h'_v = activation(W [h_v, mean of h_u over the targets u of v's edges]), scaled to unit length.
    Edges to free slots and to the node itself do not count; a node without edges has a mean of
    zero. Each of two edges to the same target counts.

    Attributes:
      features: F', the width of the output.
      activation: the nonlinearity.
      is_normalized: whether rows are scaled to unit length, line 7 of the algorithm.
      dtype: of the arithmetic; lengths are float32.

    Example:
      >>> graph = KnowledgeGraph.create(8, 4)
      >>> layer = SAGELayer(features=6)
      >>> out, _ = jax.jit(layer.init_with_output)(jax.random.key(0), graph.value, graph)
      >>> out.shape
      (8, 6)
    """

    features: int
    activation: Callable[[Array], Array] = nn.relu
    is_normalized: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N F"], graph: KnowledgeGraph) -> Float[Array, "N G"]:
        """One step.

        Args:
          x: [N, F], what each node holds; rows of free slots are ignored.
          graph: the edges.

        Returns:
          [N, F'], zero for free slots.
        """
        target, is_edge = _edges(graph)
        x = jnp.where(graph.is_live[:, None], x, 0).astype(self.dtype)
        near = jnp.where(is_edge[:, :, None], x[target], 0)
        count = jnp.maximum(jnp.sum(is_edge, axis=1), 1).astype(self.dtype)
        mean = jnp.sum(near, axis=1) / count[:, None]
        dense = functools.partial(nn.Dense, self.features, dtype=self.dtype)
        out = self.activation(dense(name="own")(x) + dense(name="near", use_bias=False)(mean))
        if self.is_normalized:
            squares = jnp.sum(jnp.square(out.astype(jnp.float32)), axis=1, keepdims=True)
            out = (out * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))).astype(out.dtype)
        return jnp.where(graph.is_live[:, None], out, 0)


class GATLayer(nn.Module):
    """Graph attention (Velickovic et al. 2018, equations 1 to 6).

    Each head weighs a node's own features and those of its edges' targets by
    softmax(LeakyReLU(a . [W h_v, W h_u])) and adds them up. Edges to free slots do not count, and
    a slot that points at the node itself does not make it count twice.

    Attributes:
      features: F', the width of the output.
      num_heads: heads; divides features where heads are concatenated.
      is_concatenated: heads side by side, each features / num_heads wide (equation 5), or the
        mean of heads as wide as the output (equation 6).
      activation: the nonlinearity at the end.
      negative_slope: of the LeakyReLU.
      dtype: of the arithmetic; the softmax is float32.

    Raises:
      ValueError: if num_heads does not divide features where it must.

    Example:
      >>> graph = KnowledgeGraph.create(8, 4)
      >>> layer = GATLayer(features=6, num_heads=2)
      >>> out, _ = jax.jit(layer.init_with_output)(jax.random.key(0), graph.value, graph)
      >>> out.shape
      (8, 6)
    """

    features: int
    num_heads: int = 4
    is_concatenated: bool = True
    activation: Callable[[Array], Array] = nn.elu
    negative_slope: float = 0.2
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N F"], graph: KnowledgeGraph) -> Float[Array, "N G"]:
        """One step.

        Args:
          x: [N, F], what each node holds; rows of free slots are ignored.
          graph: the edges.

        Returns:
          [N, F'], zero for free slots.
        """
        if self.is_concatenated and self.features % self.num_heads:
            raise ValueError(
                f"num_heads must divide features {self.features}, got {self.num_heads}"
            )
        nodes, heads = graph.num_nodes, self.num_heads
        width = self.features // heads if self.is_concatenated else self.features
        target, is_edge = _edges(graph)
        x = jnp.where(graph.is_live[:, None], x, 0)
        dense = nn.Dense(heads * width, use_bias=False, dtype=self.dtype, name="transform")
        h = dense(x).reshape(nodes, heads, width)

        def part(name: str) -> Float[Array, "N heads"]:
            vector = self.param(name, nn.initializers.lecun_normal(), (heads, width))
            return jnp.einsum("nhw,hw->nh", h, vector.astype(self.dtype)).astype(jnp.float32)

        # a . [W h_v, W h_u] is a sum of two parts, so that only the second one is gathered.
        own, other = part("attend_own"), part("attend_near")
        target = jnp.concatenate([jnp.arange(nodes, dtype=jnp.int32)[:, None], target], axis=1)
        is_read = jnp.concatenate([jnp.ones((nodes, 1), bool), is_edge], axis=1)[:, :, None]
        score = nn.leaky_relu(own[:, None, :] + other[target], self.negative_slope)
        weight = jax.nn.softmax(jnp.where(is_read, score, -jnp.inf), axis=1)
        mixed = jnp.einsum("nmh,nmhw->nhw", weight.astype(self.dtype), h[target])
        out = mixed.reshape(nodes, -1) if self.is_concatenated else jnp.mean(mixed, axis=1)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        out = self.activation(out + bias.astype(self.dtype)[None])
        return jnp.where(graph.is_live[:, None], out, 0)


class GraphEncoder(nn.Module):
    """The nodes' values as their surroundings colour them, for a reader to read.

    A stack of layers over the values, added to them through a projection that starts at zero, so
    that at the start the values are as they were. Give the result to
    `MemoryReader(x, graph, values=encoder(graph))`: gradients reach the encoder's parameters and
    never the graph. Each layer holds [N, M, F]. Where gradients are not wanted,
    `graph._replace(value=encoder(graph))` serves every reader.

    Attributes:
      features: width of the layers; N's values may have another.
      num_layers: how many, and so how many edges away a node looks.
      layer: "sage" or "gat".
      num_heads: heads of "gat".
      dtype: of the arithmetic.

    Raises:
      ValueError: if layer is unknown.

    Example:
      >>> graph = KnowledgeGraph.create(8, 4)
      >>> init = jax.jit(GraphEncoder(features=16).init_with_output)
      >>> out, _ = init(jax.random.key(0), graph)
      >>> bool((out == graph.value).all())
      True
    """

    features: int = 128
    num_layers: int = 2
    layer: str = "sage"
    num_heads: int = 4
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, graph: KnowledgeGraph) -> Float[Array, "N O"]:
        """Encodes.

        Args:
          graph: the graph.

        Returns:
          float32 [N, O], O the width of the graph's values; zero for free slots.
        """
        if self.layer not in ("sage", "gat"):
            raise ValueError(f"layer must be 'sage' or 'gat', got {self.layer!r}")
        graph = jax.lax.stop_gradient(graph)
        value = jnp.where(graph.is_live[:, None], graph.value, 0.0)
        x = value
        for i in range(self.num_layers):
            if self.layer == "sage":
                step = SAGELayer(self.features, dtype=self.dtype, name=f"layer_{i}")
            else:
                step = GATLayer(self.features, self.num_heads, dtype=self.dtype, name=f"layer_{i}")
            x = step(x, graph)
        start = nn.initializers.zeros
        change = nn.Dense(graph.dim, kernel_init=start, dtype=self.dtype, name="out")(x)
        return jnp.where(graph.is_live[:, None], value + change.astype(jnp.float32), 0.0)


def _edges(graph: KnowledgeGraph) -> tuple[Int[Array, "N M"], Bool[Array, "N M"]]:
    """Where each slot points, and whether it is an edge that counts; others point at the node."""
    own = jnp.arange(graph.num_nodes, dtype=jnp.int32)[:, None]
    target = graph.edge_target
    is_edge = is_live_at(graph, target) & (target != own) & graph.is_live[:, None]
    return jnp.where(is_edge, target, own), is_edge
