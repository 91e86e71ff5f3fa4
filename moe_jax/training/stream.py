"""Scoring a stream with a token memory: read, mix, score, write, in one compiled step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax._types import Array, Bool, Float, Variables
from moe_jax.data import Batch
from moe_jax.graph import KnowledgeGraph
from moe_jax.lm import MoELanguageModel
from moe_jax.memory import (
    ContextVectors,
    Evidence,
    MemoryInterpolation,
    Projection,
    Reads,
    gather_evidence,
    note_reads,
    read_tokens,
    shuffle_symbols,
    write_tokens,
)
from moe_jax.training.losses import cross_entropy

__all__ = ["StreamSums", "TokenReader", "fit_interpolation", "make_hidden_step", "make_stream_step"]


class TokenReader(NamedTuple):
    """What reads a token memory.

    Attributes:
        projection: of hidden states, from `ContextVectors.fit`.
        gate: the variables of a `MemoryInterpolation`.
    """

    projection: Projection
    gate: Variables


class StreamSums(NamedTuple):
    """Sums over one batch of a stream; add them up, then divide.

    Attributes:
        nats: summed cross entropy with the memory.
        nats_without: of the very same targets by the model alone.
        count: targets.
        count_found: targets whose position found something in the memory.
    """

    nats: Float[Array, ""]
    nats_without: Float[Array, ""]
    count: Float[Array, ""]
    count_found: Float[Array, ""]


StreamStep = Callable[..., tuple[KnowledgeGraph, StreamSums, Evidence, Bool[Array, "Q"]]]


def make_stream_step(
    model: MoELanguageModel,
    vectors: ContextVectors,
    interpolation: MemoryInterpolation,
    *,
    k: int = 32,
    span: int | None = None,
    policy: str = "oldest",
) -> StreamStep:
    """Returns the compiled step of a stream; it donates the token memory.

    Every counted position searches the memory as it was before the batch, the two distributions
    are mixed, and then the reads are counted and the positions written with the symbols that
    came. So no position knows its own symbol or a later one of its row, nor any of the same batch.

    Args:
        model: the model.
        vectors: what a position looks like to the memory.
        interpolation: how the distributions are mixed.
        k: seen positions that each position reads.
        span: the most positions of a row that count, all by default; `stream_batches` counts at
            most `seq_len - context`, next to each other.
        policy: of a full memory, as `write_tokens` takes it.

    Returns:
        (params, reader, memory, batch, *, reports=None, is_writing=True, is_shuffled=False) ->
        (memory, sums, evidence [Q], is_counted [Q]), Q being B * span. `reports` is the graph
        that a model with `memory_read` reads; `is_shuffled` reads the symbols of other nodes.

    Example:
        >>> from moe_jax.config import smallest_run
        >>> config = smallest_run().model
        >>> model, vectors = MoELanguageModel(config), ContextVectors(8, 32)
        >>> ids, ones = jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), bool)
        >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
        >>> gate = MemoryInterpolation()
        >>> empty = jnp.zeros((1, 1)), jnp.zeros((1, 1), int), jnp.zeros((1, 1), bool)
        >>> variables = jax.jit(gate.init)(jax.random.key(0), jnp.zeros((1, 257)), *empty)
        >>> projection = jax.jit(vectors.fit)(jax.random.normal(jax.random.key(1), (64, 32)))
        >>> step = make_stream_step(model, vectors, gate)
        >>> batch = Batch(ids, ids, ones, jnp.zeros((2, 2), jnp.int32))
        >>> memory, reader = KnowledgeGraph.create(64, 40), TokenReader(projection, variables)
        >>> memory, sums, _, _ = step(params, reader, memory, batch)
        >>> float(sums.count_found), int(memory.num_live)
        (0.0, 32)
    """

    def step(
        params: Variables,
        reader: TokenReader,
        memory: KnowledgeGraph,
        batch: Batch,
        *,
        reports: KnowledgeGraph | None = None,
        is_writing: Any = True,
        is_shuffled: Any = False,
    ) -> tuple[KnowledgeGraph, StreamSums, Evidence, Bool[Array, "Q"]]:
        log_model, contexts = _contexts(model, vectors, params, reader.projection, batch, reports)
        offset = batch.source[:, 1][:, None] + jnp.arange(batch.tokens.shape[1])[None]
        source = jnp.stack([jnp.broadcast_to(batch.source[:, :1], offset.shape), offset], axis=-1)
        fields = (log_model, contexts, batch.targets, source, batch.is_valid)
        fields = _counted(fields, batch.is_valid, span or batch.tokens.shape[1])
        log_model, contexts, target, source, is_counted = fields
        # What does not count must not search either.
        contexts = jnp.where(is_counted[:, None], contexts, 0.0)

        read = jax.lax.cond(
            is_shuffled,
            lambda m: shuffle_symbols(m, jax.random.key(m.clock)).symbol,
            lambda m: m.symbol,
            memory,
        )
        hits = read_tokens(memory._replace(symbol=read), contexts, k)
        evidence = gather_evidence(log_model, hits.scores, hits.symbols, hits.is_valid, target)
        mixed = interpolation.apply(reader.gate, log_model, *_hits_of(evidence))
        picked = jnp.take_along_axis(mixed, target[:, None], axis=-1)[:, 0]
        found = is_counted & jnp.any(evidence.is_valid, axis=-1)
        sums = StreamSums(
            nats=-jnp.sum(jnp.where(is_counted, picked, 0.0)),
            nats_without=-jnp.sum(jnp.where(is_counted, evidence.model_at_target, 0.0)),
            count=jnp.sum(is_counted, dtype=jnp.float32),
            count_found=jnp.sum(found, dtype=jnp.float32),
        )
        memory = note_reads(memory, Reads(hits.ids, hits.is_valid & is_writing))
        how = {"is_valid": is_counted & is_writing, "policy": policy}
        memory = write_tokens(memory, contexts, target, source, **how)
        return memory, sums, evidence, is_counted

    return jax.jit(step, donate_argnums=2)


def _hits_of(evidence: Evidence) -> tuple[Array, Array, Array]:
    """The scores, symbols and validity that `MemoryInterpolation` takes."""
    return evidence.scores, evidence.symbols, evidence.is_valid


def make_hidden_step(
    model: MoELanguageModel,
) -> Callable[..., tuple[Float[Array, "B S D"], Float[Array, ""]]]:
    """Returns the compiled model alone: hidden states, and the nats of what counts.

    Args:
        model: the model.

    Returns:
        (params, batch, reports=None) -> (hidden [B, S, D], nats).

    Example:
        >>> from moe_jax.config import smallest_run
        >>> model = MoELanguageModel(smallest_run().model)
        >>> ids, ones = jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), bool)
        >>> params = jax.jit(model.init)(jax.random.key(0), ids)["params"]
        >>> batch = Batch(ids, ids, ones, jnp.zeros((2, 2), jnp.int32))
        >>> make_hidden_step(model)(params, batch)[0].shape
        (2, 16, 32)
    """

    def step(
        params: Variables, batch: Batch, reports: KnowledgeGraph | None = None
    ) -> tuple[Array, Array]:
        out = model.apply({"params": params}, batch.tokens, reports, is_valid=batch.is_input)
        return out.hidden, jnp.sum(cross_entropy(out, batch))

    return jax.jit(step)


def fit_interpolation(
    interpolation: MemoryInterpolation,
    evidence: Evidence,
    is_counted: Bool[Array, "T"],
    *,
    steps: int = 400,
    batch_size: int = 8192,
    rate: float = 0.1,
    seed: int = 0,
) -> Variables:
    """Fits the gate's few scalars, and nothing else, to evidence collected on a stream.

    Args:
        interpolation: the module.
        evidence: [T] of a validation text: neither trained on nor reported.
        is_counted: [T], which positions count.
        steps: of Adam, with a cosine decay.
        batch_size: positions in a step, drawn with replacement.
        rate: Adam's peak rate.
        seed: of the draws.

    Returns:
        The variables of the interpolation.

    Raises:
        ValueError: `steps` or `batch_size` is below 1.

    Example:
        >>> log_model = jnp.log(jnp.full((8, 2), 0.5))
        >>> ones = jnp.ones((8, 1))
        >>> evidence = gather_evidence(
        ...     log_model, ones, ones.astype(int), ones > 0, jnp.ones(8, int))
        >>> constant = MemoryInterpolation(is_constant=True)
        >>> variables = fit_interpolation(constant, evidence, jnp.ones(8, bool), steps=50)
        >>> bool(constant.apply(variables, evidence, method="target_log_prob")[0] > jnp.log(0.7))
        True
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    return _fit(interpolation, evidence, is_counted, steps, batch_size, rate, seed)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _fit(
    interpolation: MemoryInterpolation,
    evidence: Evidence,
    is_counted: Bool[Array, "T"],
    steps: int,
    batch_size: int,
    rate: Any,
    seed: Any,
) -> Variables:
    init_key, draw_key = jax.random.split(jax.random.key(seed))
    size = is_counted.shape[0]

    def loss(variables: Variables, part: Evidence, counts: Array) -> Array:
        log_prob = interpolation.apply(variables, part, method="target_log_prob")
        return -jnp.sum(jnp.where(counts, log_prob, 0.0)) / jnp.maximum(jnp.sum(counts), 1)

    one = jax.tree.map(lambda a: a[:1], evidence)
    variables = interpolation.init(init_key, one, method="target_log_prob")
    optimizer = optax.adam(optax.cosine_decay_schedule(1.0, steps))

    def step(carry: tuple, key: Array) -> tuple[tuple, None]:
        variables, moments = carry
        at = jax.random.randint(key, (min(batch_size, size),), 0, size)
        part = jax.tree.map(lambda a: a[at], evidence)
        grads = jax.grad(loss)(variables, part, is_counted[at])
        updates, moments = optimizer.update(grads, moments)
        updates = jax.tree.map(lambda u: rate * u, updates)
        return (optax.apply_updates(variables, updates), moments), None

    keys = jax.random.split(draw_key, steps)
    return jax.lax.scan(step, (variables, optimizer.init(variables)), keys)[0][0]


def _contexts(
    model: MoELanguageModel,
    vectors: ContextVectors,
    params: Variables,
    projection: Projection,
    batch: Batch,
    reports: KnowledgeGraph | None,
) -> tuple[Float[Array, "B S V"], Float[Array, "B S W"]]:
    """The model's log probabilities and every position's context vector."""
    out = model.apply({"params": params}, batch.tokens, reports, is_valid=batch.is_input)
    log_model = jax.nn.log_softmax(out.logits, axis=-1)
    return log_model, vectors(projection, out.hidden, batch.tokens)


def _counted(fields: tuple, is_valid: Bool[Array, "B S"], span: int) -> tuple:
    """Of each [B, S, ...] the `span` positions from the first that counts, as [B * span, ...]."""
    first = jnp.minimum(jnp.argmax(is_valid, axis=1), is_valid.shape[1] - span)
    at = first[:, None] + jnp.arange(span)[None]
    row = jnp.arange(is_valid.shape[0])[:, None]
    return tuple(a[row, at].reshape(-1, *a.shape[2:]) for a in fields)
