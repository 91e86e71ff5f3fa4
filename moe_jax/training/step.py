"""The jitted training and evaluation steps."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax._types import Array, Float, Int, PRNGKey, Variables
from moe_jax.config import RunConfig
from moe_jax.data import Batch
from moe_jax.graph import KnowledgeGraph
from moe_jax.lm import MoELanguageModel
from moe_jax.memory import note_reads
from moe_jax.routing import balanced_bias
from moe_jax.supervisor import BALANCE_BIAS
from moe_jax.training.copies import matrix_copies, with_copies
from moe_jax.training.losses import confidence_loss, cross_entropy
from moe_jax.training.state import TrainState
from moe_jax.training.write import write_before_update, write_when_due


class Metrics(NamedTuple):
    """What one training step measured, all on the device.

    Attributes:
        loss: mean cross entropy of the valid targets, nats.
        auxiliary_loss: weighted routing and librarian losses.
        confidence_loss: see `TrainConfig.confidence_weight`.
        grad_norm: global norm before clipping.
        load: [L, E] share of choices per layer and expert.
        max_over_mean: [L] largest load over the mean.
        dropped_fraction: [L] choices that found no slot.
        nodes_created: nodes that the step wrote; a line of ``metrics.jsonl`` has this and the next
            two summed over the steps since the line before.
        nodes_merged: proposals that merged into a node.
        proposals_rejected: proposals the graph could not hold.
        graph_nodes: live nodes after the step.
        graph_updates: node updates in the graph's life.
    """

    loss: Float[Array, ""]
    auxiliary_loss: Float[Array, ""]
    confidence_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    load: Float[Array, "L E"]
    max_over_mean: Float[Array, "L"]
    dropped_fraction: Float[Array, "L"]
    nodes_created: Int[Array, ""]
    nodes_merged: Int[Array, ""]
    proposals_rejected: Int[Array, ""]
    graph_nodes: Int[Array, ""]
    graph_updates: Int[Array, ""]


class EvalSums(NamedTuple):
    """Sums over one held-out batch; add them up over batches, then divide.

    Attributes:
        nats: summed cross entropy of the valid targets.
        count: valid targets.
        load: [L, E] summed choices per layer and expert, over real inputs.
        dropped: [L] summed dropped choices.
        choices: summed choices per layer.
    """

    nats: Float[Array, ""]
    count: Float[Array, ""]
    load: Float[Array, "L E"]
    dropped: Float[Array, "L"]
    choices: Float[Array, ""]


TrainStep = Callable[
    [TrainState, KnowledgeGraph, Batch, PRNGKey], tuple[TrainState, KnowledgeGraph, Metrics]
]


def make_train_step(
    model: MoELanguageModel, optimizer: optax.GradientTransformation, config: RunConfig
) -> TrainStep:
    """Returns the compiled training step; it donates the state and the graph.

    The step splits the batch into `accumulate` micro-batches, averages their gradients over all
    valid targets, updates the parameters, and writes the proposals of the micro-batches, in
    order, into the graph. The graph that the model reads is the one before the step, on which
    its reads are counted before anything is written; with `memory_write=False` the graph stays
    as it is. Random numbers depend on the key and the step alone, so a resumed run repeats an
    unbroken one.

    Args:
        model: the model.
        optimizer: from `make_optimizer`.
        config: of the run.

    Returns:
        (state, graph, batch, key) -> (state, graph, metrics).

    Example:
        >>> from moe_jax.config import smallest_run
        >>> from moe_jax.training import create_graph, create_state, make_optimizer
        >>> config = smallest_run()
        >>> model, optimizer = MoELanguageModel(config.model), make_optimizer(config.training)
        >>> state = create_state(model, optimizer, jax.random.key(0))
        >>> ids, valid = jnp.zeros((4, 32), jnp.int32), jnp.ones((4, 32), bool)
        >>> batch = Batch(ids, ids, valid, jnp.zeros((4, 2), jnp.int32))
        >>> step = make_train_step(model, optimizer, config)
        >>> state, graph, metrics = step(state, create_graph(model), batch, jax.random.key(1))
        >>> int(state.step)
        1
    """

    def step(
        state: TrainState, graph: KnowledgeGraph, batch: Batch, key: PRNGKey
    ) -> tuple[TrainState, KnowledgeGraph, Metrics]:
        key = jax.random.fold_in(key, state.step)
        totals = (
            jnp.maximum(jnp.sum(batch.is_valid), 1),
            jnp.maximum(jnp.sum(batch.is_input), 1),
        )
        grads, aux = _gradients(model, config, state, graph, batch, key, totals)
        (nats, auxiliary, confidence, stats), proposals, reads = aux
        opt_state, written = state.opt_state, (jnp.zeros((), jnp.int32),) * 3
        if config.training.memory_write:
            # Reads count at every step, written or not, and on the graph that was read.
            graph = note_reads(graph, reads)
            graph, info = write_when_due(model, graph, proposals, state.step, config)
            written = tuple(map(jnp.sum, (info.created, info.merged, info.rejected)))
            opt_state = write_before_update(graph, opt_state)
        updates, opt_state = optimizer.update(grads, opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        load = jnp.sum(stats.load, axis=0)
        params = _rebalanced(params, load, config.model.moe.balance_bias_rate)
        copies = matrix_copies(params, config.model.moe.compute_dtype)
        metrics = Metrics(
            loss=jnp.sum(nats) / totals[0],
            auxiliary_loss=jnp.sum(auxiliary),
            confidence_loss=jnp.sum(confidence),
            grad_norm=optax.tree.norm(grads),
            load=load,
            max_over_mean=jnp.max(load, axis=-1) * load.shape[-1],
            dropped_fraction=jnp.sum(stats.dropped_fraction, axis=0),
            nodes_created=written[0],
            nodes_merged=written[1],
            proposals_rejected=written[2],
            graph_nodes=graph.num_live,
            graph_updates=graph.num_updates,
        )
        return TrainState(state.step + 1, params, opt_state, copies), graph, metrics

    return jax.jit(step, donate_argnums=(0, 1))


def make_eval_step(
    model: MoELanguageModel,
) -> Callable[[Variables, KnowledgeGraph, Batch], EvalSums]:
    """Returns the compiled evaluation of one batch; nothing is written.

    Args:
        model: the model.

    Returns:
        (params, graph, batch) -> sums.

    Example:
        >>> from moe_jax.config import smallest_run
        >>> from moe_jax.training import create_graph
        >>> model = MoELanguageModel(smallest_run().model)
        >>> ids, valid = jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), bool)
        >>> batch = Batch(ids, ids, valid, jnp.zeros((2, 2), jnp.int32))
        >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
        >>> float(make_eval_step(model)(params, create_graph(model), batch).count)
        32.0
    """

    def evaluate(params: Variables, graph: KnowledgeGraph, batch: Batch) -> EvalSums:
        is_input = batch.is_input
        out = model.apply({"params": params}, batch.tokens, graph, is_valid=is_input)
        num_choices = model.config.moe.num_choices
        choices = jnp.sum(is_input) * num_choices
        return EvalSums(
            nats=jnp.sum(cross_entropy(out, batch)),
            count=jnp.sum(batch.is_valid, dtype=jnp.float32),
            load=out.stats.load * choices,
            dropped=out.stats.dropped_fraction * choices,
            choices=choices.astype(jnp.float32),
        )

    return jax.jit(evaluate)


def _gradients(
    model: MoELanguageModel,
    config: RunConfig,
    state: TrainState,
    graph: KnowledgeGraph,
    batch: Batch,
    key: PRNGKey,
    totals: tuple[Int[Array, ""], Int[Array, ""]],
):
    """Gradients summed over the micro-batches, and what `_loss` reports, one row for each."""
    parts = config.training.accumulate
    params = with_copies(state.params, state.copies)
    differentiate = jax.value_and_grad(_loss, argnums=1, has_aux=True)

    def of_part(part: Batch, key: PRNGKey):
        (_, aux), grads = differentiate(model, params, graph, part, key, config, totals)
        return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params), aux

    def add(sums, inputs):
        grads, aux = of_part(*inputs)
        return jax.tree.map(jnp.add, sums, grads), aux

    if parts == 1:
        grads, aux = of_part(batch, key)
        return grads, jax.tree.map(lambda a: a[None], aux)
    split = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), batch)
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    return jax.lax.scan(add, zeros, (split, jax.random.split(key, parts)))


def _loss(
    model: MoELanguageModel,
    params: Variables,
    graph: KnowledgeGraph,
    batch: Batch,
    key: PRNGKey,
    config: RunConfig,
    totals: tuple[Int[Array, ""], Int[Array, ""]],
):
    """Loss of one micro-batch, by its share of the batch's valid targets and inputs (`totals`).

    So the micro-batches' losses, statistics and gradients add up to the batch's, but for what is
    not linear in tokens, the balance loss.
    """
    dropout, router = jax.random.split(key)
    out = model.apply(
        {"params": params},
        batch.tokens,
        graph,
        is_valid=batch.is_input,
        source=batch.source,
        is_training=True,
        rngs={"dropout": dropout, "router": router},
    )
    nats = cross_entropy(out, batch)
    of_targets = jnp.sum(batch.is_valid) / totals[0]
    of_inputs = jnp.sum(batch.is_input) / totals[1]
    confidence = of_targets * confidence_loss(out.moe.confidence, nats, batch.is_valid)
    auxiliary = of_inputs * out.auxiliary_loss
    extra = auxiliary + config.training.confidence_weight * confidence
    loss = jnp.sum(nats) / totals[0] + extra
    stats = jax.tree.map(lambda x: of_inputs * x, out.stats)
    report = (jnp.sum(nats), auxiliary, confidence, stats)
    return loss, (report, out.moe.proposals, out.moe.reads)


def _rebalanced(params: Variables, load: Float[Array, "L E"], rate: float) -> Variables:
    """Moves each layer's balance bias against its load."""
    if rate == 0:
        return params

    def move(path: tuple, leaf: Array) -> Array:
        names = [str(part.key) for part in path]
        if names[-1] != BALANCE_BIAS:
            return leaf
        layer = int(names[0].removeprefix("blocks_"))
        return balanced_bias(leaf, load[layer], rate)

    return jax.tree_util.tree_map_with_path(move, params)
