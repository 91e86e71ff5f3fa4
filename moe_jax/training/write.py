"""The graph's write within a training step."""

import jax
import jax.numpy as jnp
import optax

from moe_jax._types import Array, Int
from moe_jax.config import RunConfig
from moe_jax.graph import InsertInfo, KnowledgeGraph
from moe_jax.librarian import Proposals
from moe_jax.lm import MoELanguageModel
from moe_jax.system import MoESystem


def write_when_due(
    model: MoELanguageModel,
    graph: KnowledgeGraph,
    proposals: Proposals,
    step: Int[Array, ""],
    config: RunConfig,
) -> tuple[KnowledgeGraph, InsertInfo]:
    """Writes the proposals of all micro-batches when a write is due."""
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), proposals)

    def write(graph: KnowledgeGraph) -> tuple[KnowledgeGraph, InsertInfo]:
        return MoESystem(model.config.moe).write(graph, flat)

    def skip(graph: KnowledgeGraph) -> tuple[KnowledgeGraph, InsertInfo]:
        rows = flat.is_kept.shape[0]
        no, nowhere = jnp.zeros(rows, bool), jnp.full(rows, graph.num_nodes, jnp.int32)
        return graph, InsertInfo(nowhere, no, no, no, jnp.zeros(rows), no)

    c = config.training
    is_due = (step % c.memory_write_every == 0) & (step >= round(c.memory_write_from * c.steps))
    return jax.lax.cond(is_due, write, skip, graph)


def write_before_update(graph: KnowledgeGraph, opt_state: optax.OptState) -> optax.OptState:
    """Orders a training step: the optimizer's update waits for the graph's write.

    On a GPU the host waits for the branches and loops of a write. If the write comes last the
    device has nothing left to do by then, and idles until the host has started the next step. So
    the update, which takes the device longer than that, is made to come after the write. Only
    scalars are held back (an optimizer's step count), so that the update stays one pass over
    gradients and parameters; an optimizer without any is left as it is.

    Args:
        graph: after the write.
        opt_state: before the update.

    Returns:
        The same optimizer state.

    Example:
        >>> from moe_jax.graph import KnowledgeGraph
        >>> state = optax.adam(0.1).init(jnp.ones(3))
        >>> int(write_before_update(KnowledgeGraph.create(4, 2), state)[0].count)
        0
    """
    leaves, tree = jax.tree.flatten(opt_state)
    scalars = [i for i, leaf in enumerate(leaves) if jnp.ndim(leaf) == 0]
    # An entry of what inserting, linking and counting reads write last.
    done = graph.num_updates, graph.edge_target[:1, :1], graph.reads[:1]
    held, _ = jax.lax.optimization_barrier(([leaves[i] for i in scalars], done))
    for i, leaf in zip(scalars, held, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)
