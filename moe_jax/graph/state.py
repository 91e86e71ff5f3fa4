"""The knowledge graph as one value: fixed-size arrays, allocated once."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.search import Code, encode
from moe_jax.ops.similarity import MAX_DIM

__all__ = ["FOREVER", "KnowledgeGraph", "with_keys"]

FOREVER = 2**31 - 1
"""The last logical time: an edge that ends then never ends."""


class KnowledgeGraph(NamedTuple):
    """A memory of unit vectors with values, bookkeeping and weighted edges.

    It is a pytree of arrays whose sizes never change: N node slots, M edge slots per node. A node
    is live or its slot is free. Every function on it returns a new graph and can be jitted with
    the graph donated. An id is a slot's index; the id N, which is out of range, means "none".

    Attributes:
      key: float32 [N, D], unit norm, what nodes are found by. Zero in a free slot.
      code: int8 [N, D], the key in short, which the first pass of a search reads; see `with_keys`.
      code_scale: float32 [N]; code times code_scale is about the key. Zero in a free slot.
      code_error: float32 [N], at least the length of the difference. Zero in a free slot.
      value: float32 [N, D], what a node holds (its most confident item's value).
      is_live: bool [N].
      kind: int32 [N], a label chosen by the caller.
      expert_id: int32 [N], the expert that reported the value, -1 when unknown.
      confidence: float32 [N], of the most confident item so far.
      hits: int32 [N], how many items the node stands for: the sum of their weights.
      created: int32 [N], logical time of creation.
      updated: int32 [N], logical time of the last item that arrived.
      source: int32 [N, 2], document id and offset of the value, -1 when unknown.
      symbol: int32 [N], the symbol that followed the value, -1 when unknown.
      reads: int32 [N], how often the node was read, as far as `record_reads` was told.
      edge_target: int32 [N, M], node id at the end of an edge, N in an empty slot.
      edge_weight: float32 [N, M].
      edge_kind: int32 [N, M].
      edge_time: int32 [N, M], logical time of the last write.
      edge_start: int32 [N, M], the first logical time at which the edge holds.
      edge_end: int32 [N, M], the last logical time at which the edge holds.
      clock: int32 [], the largest logical time used so far.
      num_updates: int32 [], nodes created plus items merged so far; stops at its maximum.
      num_merged: int32 [], the items merged among them; stops at its maximum.
      num_rejected: int32 [], items that could not be stored so far; stops at its maximum.
      num_evicted: int32 [], nodes that lost their slot to another so far; stops at its maximum.

    Example:
      >>> graph = KnowledgeGraph.create(1024, 64)
      >>> graph.num_nodes, graph.dim, int(graph.num_live)
      (1024, 64, 0)
    """

    key: Float[Array, "N D"]
    code: Int[Array, "N D"]
    code_scale: Float[Array, "N"]
    code_error: Float[Array, "N"]
    value: Float[Array, "N D"]
    is_live: Bool[Array, "N"]
    kind: Int[Array, "N"]
    expert_id: Int[Array, "N"]
    confidence: Float[Array, "N"]
    hits: Int[Array, "N"]
    created: Int[Array, "N"]
    updated: Int[Array, "N"]
    source: Int[Array, "N 2"]
    symbol: Int[Array, "N"]
    reads: Int[Array, "N"]
    edge_target: Int[Array, "N M"]
    edge_weight: Float[Array, "N M"]
    edge_kind: Int[Array, "N M"]
    edge_time: Int[Array, "N M"]
    edge_start: Int[Array, "N M"]
    edge_end: Int[Array, "N M"]
    clock: Int[Array, ""]
    num_updates: Int[Array, ""]
    num_merged: Int[Array, ""]
    num_rejected: Int[Array, ""]
    num_evicted: Int[Array, ""]

    @classmethod
    def create(cls, num_nodes: int, dim: int, *, num_edge_slots: int = 8) -> "KnowledgeGraph":
        """Allocate an empty graph.

        Args:
          num_nodes: N, how many nodes fit.
          dim: D, the width of keys and values.
          num_edge_slots: M, how many edges leave one node at most.

        Returns:
          A graph without live nodes, its clock at 0.

        Raises:
          ValueError: if a size is not positive, or dim is above 16384.

        Example:
          >>> KnowledgeGraph.create(4, 2, num_edge_slots=3).edge_target.shape
          (4, 3)
        """
        sizes = {"num_nodes": num_nodes, "dim": dim, "num_edge_slots": num_edge_slots}
        for name, size in sizes.items():
            if not isinstance(size, (int, np.integer)) or size < 1:
                raise ValueError(f"{name} must be at least 1, got {size!r}")
        if dim > MAX_DIM:
            raise ValueError(f"dim must be at most {MAX_DIM}, got {dim}")
        nodes, edges = (num_nodes,), (num_nodes, num_edge_slots)

        # Each field is its own array: a donated state may not hold one buffer twice.
        def integers(shape: tuple[int, ...], fill: int = 0) -> Array:
            return jnp.full(shape, fill, jnp.int32)

        return cls(
            key=jnp.zeros((num_nodes, dim), jnp.float32),
            code=jnp.zeros((num_nodes, dim), jnp.int8),
            code_scale=jnp.zeros(nodes, jnp.float32),
            code_error=jnp.zeros(nodes, jnp.float32),
            value=jnp.zeros((num_nodes, dim), jnp.float32),
            is_live=jnp.zeros(nodes, bool),
            kind=integers(nodes),
            expert_id=integers(nodes, -1),
            confidence=jnp.zeros(nodes, jnp.float32),
            hits=integers(nodes),
            created=integers(nodes),
            updated=integers(nodes),
            source=integers((num_nodes, 2), -1),
            symbol=integers(nodes, -1),
            reads=integers(nodes),
            edge_target=integers(edges, num_nodes),
            edge_weight=jnp.zeros(edges, jnp.float32),
            edge_kind=integers(edges),
            edge_time=integers(edges),
            edge_start=integers(edges),
            edge_end=integers(edges, FOREVER),
            clock=integers(()),
            num_updates=integers(()),
            num_merged=integers(()),
            num_rejected=integers(()),
            num_evicted=integers(()),
        )

    @property
    def num_nodes(self) -> int:
        """N, the number of node slots."""
        return self.key.shape[-2]

    @property
    def dim(self) -> int:
        """D, the width of keys and values."""
        return self.key.shape[-1]

    @property
    def num_edge_slots(self) -> int:
        """M, the number of edge slots of a node."""
        return self.edge_target.shape[-1]

    @property
    def codes(self) -> Code:
        """The keys' codes, for the first pass of a search."""
        return Code(self.code, self.code_scale, self.code_error)

    @property
    def num_live(self) -> Int[Array, ""]:
        """The number of live nodes, an int32 scalar on the device."""
        return jnp.sum(self.is_live, axis=-1, dtype=jnp.int32)


def with_keys(
    graph: KnowledgeGraph, at: Int[Array, "R"], keys: Float[Array, "R D"]
) -> KnowledgeGraph:
    """Write keys and their codes: the one way to change a key, so that searches see it.

    Args:
      graph: the graph before.
      at: int32 [R], slots; those out of range are dropped.
      keys: float32 [R, D], unit vectors from `moe_jax.ops.normalize`, or zeros to clear.

    Returns:
      The graph after.

    Example:
      >>> graph = with_keys(KnowledgeGraph.create(4, 2), jnp.array([1]), jnp.array([[0.6, 0.8]]))
      >>> graph.code[1].tolist()
      [95, 127]
    """
    code, scale, error = encode(keys)
    return graph._replace(
        key=graph.key.at[at].set(keys, mode="drop"),
        code=graph.code.at[at].set(code, mode="drop"),
        code_scale=graph.code_scale.at[at].set(scale, mode="drop"),
        code_error=graph.code_error.at[at].set(error, mode="drop"),
    )
