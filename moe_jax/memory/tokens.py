"""A token memory: a knowledge graph whose node is one seen position and the symbol after it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int, PRNGKey
from moe_jax.graph import KnowledgeGraph, insert, search

__all__ = ["TokenHits", "read_tokens", "shuffle_symbols", "write_tokens"]


class TokenHits(NamedTuple):
    """What followed the contexts most alike, best first.

    Attributes:
        ids: [Q, K] the nodes of those positions, N where there is no hit.
        scores: [Q, K] cosines, 0 where there is no hit.
        symbols: [Q, K] the symbols that followed, -1 where there is no hit.
        is_valid: [Q, K].
    """

    ids: Int[Array, "Q K"]
    scores: Float[Array, "Q K"]
    symbols: Int[Array, "Q K"]
    is_valid: Bool[Array, "Q K"]


def read_tokens(graph: KnowledgeGraph, contexts: Float[Array, "Q D"], k: int) -> TokenHits:
    """Finds the k seen positions whose contexts are most alike.

    Args:
        graph: the token memory.
        contexts: [Q, D] context vectors; a zero vector finds nothing.
        k: how many; a smaller memory gives as many as it has slots.

    Returns:
        The hits.

    Raises:
        ValueError: k is below 1 or the contexts have the wrong width.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.graph import KnowledgeGraph
        >>> graph = KnowledgeGraph.create(4, 2)
        >>> graph = write_tokens(graph, jnp.eye(2), jnp.array([7, 8]), jnp.zeros((2, 2), int))
        >>> read_tokens(graph, jnp.array([[0.1, 2.0]]), k=2).symbols.tolist()
        [[8, 7]]
    """
    hits = search(graph, contexts, k=min(k, graph.num_nodes), reproducible=False)
    symbols = graph.symbol.at[hits.ids].get(mode="fill", fill_value=-1)
    return TokenHits(hits.ids, hits.scores, symbols, hits.is_valid)


def write_tokens(
    graph: KnowledgeGraph,
    contexts: Float[Array, "R D"],
    symbols: Int[Array, "R"],
    source: Int[Array, "R 2"],
    *,
    is_valid: Bool[Array, "R"] | None = None,
    policy: str = "oldest",
) -> KnowledgeGraph:
    """Appends positions; nothing merges, and in a full memory the oldest go first.

    Args:
        graph: the token memory.
        contexts: [R, D] context vectors.
        symbols: [R] the symbols that followed.
        source: [R, 2] document id and offset of the symbols.
        is_valid: [R], all by default; the others are not written. Vectors without a direction
            are not written either, and counted as rejected.
        policy: of a full memory, see `moe_jax.graph.insert`; "reject" compiles in less time, for a
            memory that cannot fill up.

    Returns:
        The memory after.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax.graph import KnowledgeGraph
        >>> graph, source = KnowledgeGraph.create(2, 3), jnp.zeros((3, 2), int)
        >>> write_tokens(graph, jnp.eye(3), jnp.array([5, 6, 7]), source).symbol.tolist()
        [7, 6]
    """
    graph, _ = insert(
        graph, contexts, symbol=symbols, source=source, is_valid=is_valid,
        merge_threshold=None, policy=policy,
    )  # fmt: skip
    return graph


@jax.jit
def shuffle_symbols(graph: KnowledgeGraph, key: PRNGKey) -> KnowledgeGraph:
    """Deals the live nodes' symbols out at random: a memory that knows only how often.

    Args:
        graph: the token memory.
        key: of the shuffle.

    Returns:
        The same memory with its symbols permuted among live nodes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax.graph import KnowledgeGraph
        >>> graph = KnowledgeGraph.create(4, 3)
        >>> graph = write_tokens(graph, jnp.eye(3), jnp.array([5, 6, 7]), jnp.zeros((3, 2), int))
        >>> sorted(shuffle_symbols(graph, jax.random.key(0)).symbol.tolist())
        [-1, 5, 6, 7]
    """
    chance = jax.random.uniform(key, (graph.num_nodes,))
    # Live slots in slot order, and the same slots in a random order; free slots stay put.
    place = jnp.argsort(~graph.is_live, stable=True)
    drawn = jnp.argsort(jnp.where(graph.is_live, chance, 2.0), stable=True)
    return graph._replace(symbol=graph.symbol.at[place].set(graph.symbol[drawn]))
