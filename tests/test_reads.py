"""Reads: every hit of every real token counts, on the graph that was read, before the write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

from moe_jax import MoESystem
from moe_jax.config import smallest_run, tiny
from moe_jax.data import Batch
from moe_jax.graph import KnowledgeGraph, health, insert
from moe_jax.lm import MoELanguageModel
from moe_jax.memory import ContextVectors, MemoryInterpolation, note_reads
from moe_jax.training import create_graph, create_state, make_optimizer, make_train_step
from moe_jax.training.stream import TokenReader, make_stream_step

B, S, K = 4, 32, 4
RUN = smallest_run()


def run_config(*, memory_write=True):
    """Two micro-batches a step, and no write that is due."""
    moe = RUN.model.moe.replace(memory_read=True, max_kg_nodes=16)
    how = {"accumulate": 2, "memory_write": memory_write, "memory_write_from": 1.0}
    model = RUN.model.replace(moe=moe, num_layers=1)
    return RUN.replace(model=model, training=RUN.training.replace(**how))


@functools.cache
def trained_step(config):
    """A model, its state before the first step, and its compiled step."""
    model, optimizer = MoELanguageModel(config.model), make_optimizer(config.training)
    state = create_state(model, optimizer, jax.random.key(0))
    return model, state, make_train_step(model, optimizer, config)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def text_batch(seed=0, padding=0):
    """Windows whose last rows hold only padding, and whose others end in some."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(97, 123, size=(B, S + 1)).astype(np.int32)
    is_valid = np.ones((B, S), bool)
    if padding:
        is_valid[:, -padding:] = False
        is_valid[-1] = False
    source = np.stack([np.arange(B), np.zeros(B)], axis=1).astype(np.int32)
    return jax.device_put(Batch(tokens[:, :-1], tokens[:, 1:], is_valid, source))


def some_graph(model, rows=12):
    """A graph with nodes that tokens may read, all of one time."""
    rng = np.random.default_rng(1)
    graph = create_graph(model)
    keys = rng.normal(size=(rows, graph.dim)).astype(np.float32)
    return insert(graph, keys, time=np.ones(rows, np.int32))[0]


def slow_count(reads, num_nodes):
    count = np.zeros(num_nodes, np.int64)
    ids, is_valid = (np.asarray(a).reshape(-1, K) for a in reads)
    for row, valid in zip(ids, is_valid, strict=True):
        for node, is_real in zip(row, valid, strict=True):
            if is_real:
                count[node] += 1
    return count


@pytest.mark.parametrize("padding", [0, 5])
def test_a_training_step_counts_what_it_read(padding):
    """The gate is zero at the start, and a read by a closed gate is a read."""
    model, state, step = trained_step(run_config())
    graph, batch = some_graph(model), text_batch(padding=padding)
    is_input = batch.is_input
    apply = jax.jit(model.apply)
    out = apply({"params": state.params}, batch.tokens, graph, is_valid=is_input)
    expected = slow_count(out.moe.reads, graph.num_nodes)
    is_hit = np.asarray(out.moe.reads.is_valid)
    assert out.moe.reads.ids.shape == (B, S, K)
    assert not np.any(is_hit[~np.asarray(is_input)])
    assert np.all(is_hit.any(axis=-1)[np.asarray(is_input)])
    earlier = jnp.arange(graph.num_nodes, dtype=jnp.int32)
    before = graph._replace(reads=earlier)
    _, after, metrics = step(*copied((state, before)), batch, jax.random.key(1))
    # No write is due, yet the reads count, where there is a node.
    assert int(metrics.nodes_created) == 0
    np.testing.assert_array_equal(after.reads, earlier + expected)
    same = after._replace(reads=before.reads)
    jax.tree.map(np.testing.assert_array_equal, same, before)
    assert expected.sum() > 0
    assert not np.any(expected[12:])


def test_padding_reads_nothing_even_where_it_resembles_a_node():
    """The same nodes, whatever stands in the padding."""
    model, state, step = trained_step(run_config())
    batch = text_batch(padding=5)
    other = batch._replace(tokens=jnp.where(batch.is_input, batch.tokens, 3))
    graph = some_graph(model)
    reads = [step(*copied((state, graph)), b, jax.random.key(1))[1].reads for b in (batch, other)]
    np.testing.assert_array_equal(*reads)
    nothing = batch._replace(is_valid=jnp.zeros((B, S), bool))
    _, after, _ = step(*copied((state, graph)), nothing, jax.random.key(1))
    assert not np.any(after.reads)


def test_the_step_is_traced_once_and_counts_on_the_device():
    model, state, step = trained_step(run_config())
    key, batches = jax.random.key(1), [text_batch(i) for i in range(4)]
    graph, totals = some_graph(model), []
    state, graph, _ = step(*copied((state, graph)), batches[0], key)
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, graph, _ = step(state, graph, batch, key)
            totals.append(jnp.copy(graph.reads))
    assert step._cache_size() == 1
    totals = np.stack(totals).sum(axis=1)
    assert np.all(np.diff(totals) > 0)
    assert np.all(np.diff(totals) <= B * S * K)


def test_counting_changes_neither_parameters_nor_metrics():
    """Beside a step that leaves the graph alone; the two are the same program otherwise."""
    model, state, step = trained_step(run_config())
    graph, batch = some_graph(model), text_batch()
    one, after, a = step(*copied((state, graph)), batch, jax.random.key(1))
    silent = trained_step(run_config(memory_write=False))[2]
    two, untouched, b = silent(*copied((state, graph)), batch, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, (one, a), (two, b))
    jax.tree.map(np.testing.assert_array_equal, untouched, graph)
    assert np.any(after.reads)


def test_a_model_without_memory_reads_nothing():
    model = MoELanguageModel(RUN.model.replace(num_layers=1))
    batch = text_batch()
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), batch.tokens)
    assert out.moe.reads is None
    graph = some_graph(model)
    assert note_reads(graph, None) is graph
    report = health(graph)
    assert not report.has_reads
    assert float(report.never_read_share) == 1


def test_the_least_used_node_is_one_that_no_step_read():
    """Hits alone would give up another node: the oldest of those that were read."""
    model, state, step = trained_step(run_config())
    graph = some_graph(model, rows=16)
    batch = text_batch()
    few = (jnp.arange(B) == 0)[:, None] & (jnp.arange(S) < 2)[None]
    _, after, _ = step(*copied((state, graph)), batch._replace(is_valid=few), jax.random.key(1))
    read = np.asarray(after.reads) > 0
    assert 0 < read.sum() <= 2 * K
    # Without reads the nodes' times decide, and the unread ones are the latest.
    updated = jnp.where(read, 1, 5).astype(jnp.int32)
    graph, after = (g._replace(updated=updated) for g in (graph, after))
    new = np.random.default_rng(9).normal(size=(1, graph.dim)).astype(np.float32)
    by_hits, by_reads = (
        insert(g, new, policy="least_used", merge_threshold=None)[1].node_id[0]
        for g in (graph, after)
    )
    assert (int(by_hits), int(by_reads)) == (np.argmax(read), np.argmin(read))
    report = health(after)
    assert report.has_reads
    np.testing.assert_allclose(report.never_read_share, np.mean(~read))


def test_an_inference_step_counts_then_writes():
    """What a step writes has not been read by it."""
    system = MoESystem(tiny().replace(input_dim=16, output_dim=16, memory_read=True, dropout=0.0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, 16)), jnp.float32)
    is_valid = jnp.arange(S)[None] < jnp.array([[S], [9], [0], [S]])
    variables = random_variables(system.init, x, system.create_graph())
    step, graph = system.inference_step(), system.create_graph()
    total = np.zeros(graph.num_nodes, np.int64)
    for i in range(3):
        before = np.asarray(graph.is_live)
        graph, out, _ = step(variables, graph, jnp.roll(x, i, axis=2), is_valid)
        assert not np.any(np.asarray(out.reads.is_valid)[~np.asarray(is_valid)])
        total += slow_count(out.reads, graph.num_nodes)
        np.testing.assert_array_equal(graph.reads, total)
        assert not np.any(total[~before])
        assert np.any(total) == (i > 0)
    assert int(graph.num_live) > 0
    assert step._cache_size() == 1


def test_a_stream_counts_what_it_reads_and_writes():
    model = MoELanguageModel(RUN.model.replace(num_layers=1))
    vectors, gate = ContextVectors(8, 64, lengths=(2, 4)), MemoryInterpolation()
    params = random_variables(model.init, jnp.zeros((B, S), jnp.int32))["params"]
    projection = vectors.fit(jnp.asarray(np.random.default_rng(0).normal(size=(99, 32))))
    empty = (jnp.zeros((1, 1), t) for t in (float, float, int, bool))
    reader = TokenReader(projection, gate.init(jax.random.key(0), *empty))
    step = make_stream_step(model, vectors, gate, k=K)
    memory = KnowledgeGraph.create(512, vectors.dim, num_edge_slots=1)
    last = 0
    for i in range(3):
        num_live = int(memory.num_live)
        memory, sums, evidence, is_counted = step(
            params, reader, memory, text_batch(i, padding=5), is_writing=True
        )
        reads = np.asarray(memory.reads)
        assert reads.sum() - last == np.sum(evidence.is_valid)
        assert not np.any(reads[num_live:])
        assert not np.any(np.asarray(evidence.is_valid)[~np.asarray(is_counted)])
        last = reads.sum()
    assert last == 2 * K * float(sums.count)
    held = copied(memory)
    memory, *_ = step(params, reader, memory, text_batch(), is_writing=False)
    jax.tree.map(np.testing.assert_array_equal, memory, held)
