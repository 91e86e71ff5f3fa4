"""A stream with a token memory: causal, compiled once, and worth something when text repeats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

from moe_jax import KnowledgeGraph
from moe_jax.config import smallest_run
from moe_jax.data import Batch
from moe_jax.lm import MoELanguageModel
from moe_jax.memory import ContextVectors, MemoryInterpolation
from moe_jax.training.stream import (
    TokenReader,
    fit_interpolation,
    make_hidden_step,
    make_stream_step,
)

B, S, K, N = 2, 16, 4, 128
MODEL = MoELanguageModel(smallest_run().model.replace(num_layers=1))
VECTORS = ContextVectors(hidden_dim=8, signature_dim=64, lengths=(2, 4))
GATE = MemoryInterpolation()


@functools.cache
def parts():
    """Parameters, a reader and the compiled step."""
    params = random_variables(MODEL.init, jnp.zeros((B, S), jnp.int32))["params"]
    projection = VECTORS.fit(jnp.asarray(np.random.default_rng(0).normal(size=(99, 32))))
    scalars = {"log_sharpness": jnp.float32(2.0), "bias": jnp.float32(-1.0)}
    gate = {"params": {**scalars, "slope": jnp.zeros(7).at[0].set(2.0)}}
    step = make_stream_step(MODEL, VECTORS, GATE, k=K)
    return params, TokenReader(projection, gate), step


def fresh(size=N):
    return KnowledgeGraph.create(size, VECTORS.dim, num_edge_slots=1)


def batch_of(tokens, is_valid=None):
    """Windows of a text whose inputs are the symbols before the targets."""
    tokens = jnp.asarray(tokens, jnp.int32)
    if is_valid is None:
        is_valid = jnp.ones((len(tokens), S), bool)
    source = jnp.stack([jnp.arange(len(tokens)), jnp.zeros(len(tokens), int)], axis=1)
    return Batch(tokens[:, :-1], tokens[:, 1:], jnp.asarray(is_valid), source.astype(jnp.int32))


@functools.cache
def text(seed=0):
    return np.random.default_rng(seed).integers(97, 101, size=(B, S + 1))


def run(batches, memory=None, **how):
    params, reader, step = parts()
    memory = fresh() if memory is None else memory
    found = []
    how = {"is_writing": True, "is_shuffled": False} | how
    for batch in batches:
        memory, sums, evidence, is_counted = step(params, reader, memory, batch, **how)
        log_prob = GATE.apply(reader.gate, evidence, method="target_log_prob")
        found.append((sums, evidence, np.where(is_counted, log_prob, 0.0)))
    return memory, found


def test_an_empty_memory_is_the_model():
    _, [(sums, evidence, log_prob)] = run([batch_of(text())])
    params, *_ = parts()
    _, nats = make_hidden_step(MODEL)(params, batch_of(text()))
    np.testing.assert_array_equal(log_prob, evidence.model_at_target)
    np.testing.assert_allclose(sums.nats, sums.nats_without, rtol=1e-6)
    np.testing.assert_allclose(sums.nats, nats, rtol=1e-5)
    assert float(sums.count) == B * S
    assert float(sums.count_found) == 0
    assert not np.any(evidence.is_valid)


def test_a_repeated_text_is_remembered_and_a_shuffled_memory_is_not():
    memory, [_, (sums, _, log_prob)] = run([batch_of(text())] * 2)
    assert int(memory.num_live) == 2 * B * S
    np.testing.assert_allclose(sums.nats, -log_prob.sum(), rtol=1e-4)
    assert float(sums.nats) < 0.7 * float(sums.nats_without)
    memory, _ = run([batch_of(text())])
    _, [(shuffled, _, _)] = run([batch_of(text())], memory, is_shuffled=True)
    assert float(shuffled.nats) > 1.1 * float(sums.nats)


def test_memory_holds_what_came_and_where():
    memory, _ = run([batch_of(text())])
    live = np.flatnonzero(memory.is_live)
    for slot in live:
        row, offset = memory.source[slot].tolist()
        assert int(memory.symbol[slot]) == text()[row, offset + 1]
    assert {tuple(s) for s in memory.source[live].tolist()} == {
        (b, s) for b in range(B) for s in range(S)
    }


def test_nothing_is_written_when_told_so():
    memory, _ = run([batch_of(text())], is_writing=False)
    assert int(memory.num_live) == 0


@pytest.mark.parametrize("later", [3, 9, S])
def test_no_probability_depends_on_a_later_symbol(later):
    """Also not through the memory: the same rows of the same batches are compared."""
    first, second = text(), text().copy()
    second[:, later] = 97 + (second[:, later] + 1) % 4
    _, before = run([batch_of(text(1)), batch_of(first)])
    _, after = run([batch_of(text(1)), batch_of(second)])
    before, after = (found[1][2].reshape(B, S) for found in (before, after))
    # Target s is symbol s + 1, and no input before symbol `later` has changed.
    np.testing.assert_array_equal(before[:, : later - 1], after[:, : later - 1])
    assert np.all(before[:, later - 1] != after[:, later - 1])


def test_rows_do_not_read_each_other_within_a_batch():
    """What one row writes the other reads from the next batch on."""
    mixed = np.stack([text()[0], text(1)[1]])
    _, alone = run([batch_of(text()), batch_of(text(2))])
    _, other = run([batch_of(mixed), batch_of(text(2))])
    first, second = (np.stack([run[i][2].reshape(B, S)[0] for run in (alone, other)])
                     for i in (0, 1))  # fmt: skip
    np.testing.assert_array_equal(first[0], first[1])
    assert not np.array_equal(second[0], second[1])


def test_leading_context_neither_counts_nor_is_written():
    is_valid = np.arange(S)[None] >= np.array([[10], [4]])
    step = make_stream_step(MODEL, VECTORS, GATE, k=K, span=12)
    params, reader, whole = parts()
    batch = batch_of(text(), is_valid)
    results = []
    for run_step in (step, whole):
        memory, _ = run([batch_of(text(1))])
        results.append(run_step(params, reader, memory, batch, is_writing=True, is_shuffled=False))
    (memory, sums, _, is_counted), (other, expected, _, _) = results
    assert int(memory.num_live) == B * S + 18
    assert is_counted.shape == (B * 12,)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    np.testing.assert_array_equal(memory.symbol, other.symbol)
    np.testing.assert_array_equal(memory.source, other.source)


def test_the_split_of_batches_does_not_matter_where_the_memory_seen_is_the_same():
    """Both rows at once, or one after the other, reading a memory that is not written."""
    memory, _ = run([batch_of(text(1))])
    whole_memory = jax.tree.map(jnp.copy, memory)
    _, [whole] = run([batch_of(text(2))], whole_memory, is_writing=False)
    masks = (np.arange(B)[:, None] == row for row in range(B))
    rows = [batch_of(text(2), np.repeat(mask, S, axis=1)) for mask in masks]
    _, halves = run(rows, memory, is_writing=False)
    total = jax.tree.map(lambda a, b: a + b, halves[0][0], halves[1][0])
    np.testing.assert_allclose(whole[0], total, rtol=1e-5)
    np.testing.assert_allclose(whole[2], halves[0][2] + halves[1][2], rtol=1e-5)
    assert float(total.count) == B * S


def test_the_step_is_compiled_once_and_never_leaves_the_device():
    params, reader, step = parts()
    memory = fresh()
    on, off = jnp.array(True), jnp.array(False)
    batches = [jax.device_put(batch_of(text(i))) for i in range(3)]
    step(params, reader, fresh(), batches[0], is_writing=on, is_shuffled=off)
    size = step._cache_size()
    with jax.transfer_guard("disallow"):
        for batch, shuffled in zip(batches, (off, on, off), strict=True):
            memory, *_ = step(params, reader, memory, batch, is_writing=on, is_shuffled=shuffled)
    assert step._cache_size() == size


def test_fitting_lowers_the_loss_and_touches_the_gate_alone():
    _, reader, _ = parts()
    _, found = run([batch_of(text())] * 3)
    evidence = jax.tree.map(lambda *a: jnp.concatenate(a), *[f[1] for f in found])
    counted = jnp.ones(3 * B * S, bool)
    gate = fit_interpolation(GATE, evidence, counted, steps=60, batch_size=64)
    assert jax.tree.structure(gate) == jax.tree.structure(reader.gate)
    fitted = -GATE.apply(gate, evidence, method="target_log_prob").mean()
    assert fitted < -evidence.model_at_target.mean()
    start = GATE.init(jax.random.key(0), evidence, method="target_log_prob")
    assert fitted < -GATE.apply(start, evidence, method="target_log_prob").mean()
    with pytest.raises(ValueError, match="steps and batch_size"):
        fit_interpolation(GATE, evidence, counted, steps=0)


def test_positions_that_do_not_count_are_not_fitted_to():
    _, found = run([batch_of(text())] * 2)
    evidence = found[1][1]
    counted = jnp.arange(B * S) < 20
    wrong = evidence._replace(target=jnp.where(counted, evidence.target, 5))
    constant = MemoryInterpolation(is_constant=True)
    a, b = (fit_interpolation(constant, e, counted, steps=20, batch_size=64)
            for e in (evidence, wrong))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, a, b)
