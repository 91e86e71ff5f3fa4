"""Reading the graph: nothing at the start, only hits later, each token by itself."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import KnowledgeGraph
from moe_jax.graph import insert, search
from moe_jax.memory import MemoryReader

B, S, N = 2, 5, 12


@functools.cache
def compiled(**fields):
    reader = MemoryReader(num_heads=2, top_k=3, **fields)
    return jax.jit(reader.init), jax.jit(reader.apply)


@functools.cache
def graph_of(dim=8, rows=7):
    keys = np.random.default_rng(1).normal(size=(rows, dim)).astype(np.float32)
    return insert(KnowledgeGraph.create(N, dim), keys, values=2 * keys)[0]


@functools.cache
def tokens(dim=8):
    x = np.random.default_rng(0).normal(size=(B, S, dim)).astype(np.float32)
    return jnp.asarray(x)


@functools.cache
def open_variables(dim=8, model_dim=8):
    """Parameters with every gate open and every bias non-zero."""
    variables = compiled()[0](jax.random.key(0), tokens(model_dim), graph_of(dim))
    return jax.tree.map(lambda a: a + 0.3, variables)


@pytest.mark.parametrize("dim", [8, 4])
def test_the_gate_starts_closed(dim):
    x, graph = tokens(), graph_of(dim)
    init, run = compiled()
    np.testing.assert_array_equal(run(init(jax.random.key(0), x, graph), x, graph), x)
    opened = run(open_variables(dim), x, graph)
    assert opened.shape == x.shape
    assert np.all(np.any(np.asarray(opened) != x, axis=-1))


def test_dtypes_are_kept():
    x = tokens().astype(jnp.bfloat16)
    reader = MemoryReader(num_heads=2, top_k=3, dtype=jnp.bfloat16)
    out = jax.eval_shape(reader.apply, open_variables(), x, graph_of())
    assert out.dtype == jnp.bfloat16


def test_gradients_reach_the_reader_but_not_the_graph():
    x, graph = tokens(), graph_of()
    run = compiled()[1]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def gradients(variables, x, key, value):
        return jnp.sum(run(variables, x, graph._replace(key=key, value=value)) ** 2)

    reader, token, key, value = gradients(open_variables(), x, graph.key, graph.value)
    np.testing.assert_array_equal(key, 0.0)
    np.testing.assert_array_equal(value, 0.0)
    assert np.all(np.any(np.asarray(token) != 0, axis=-1))
    for name in ("search", "query", "key", "value", "out"):
        assert np.any(reader["params"][name]["kernel"] != 0), name
    assert np.all(reader["params"]["gate"] != 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((reader, token)))


def test_a_closed_gate_still_learns():
    x, graph = tokens(), graph_of()
    init, run = compiled()
    variables = init(jax.random.key(0), x, graph)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(run(v, x, graph) ** 2)))(variables)
    assert np.any(gradient["params"]["gate"] != 0)


def test_an_empty_graph_changes_nothing():
    x, empty = tokens(), KnowledgeGraph.create(N, 8)
    run = compiled()[1]
    np.testing.assert_array_equal(run(open_variables(), x, empty), x)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(run(v, x, empty) ** 2)))(open_variables())
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_only_hits_are_read():
    x, graph = tokens(), graph_of()
    run, variables = compiled()[1], open_variables()
    before = run(variables, x, graph)
    dead = ~graph.is_live[:, None]
    poisoned = graph._replace(
        value=jnp.where(dead, jnp.nan, graph.value), key=jnp.where(dead, 1.0, graph.key)
    )
    np.testing.assert_array_equal(run(variables, x, poisoned), before)
    fewer = compiled(threshold=0.999)[1]
    np.testing.assert_array_equal(fewer(variables, x, graph), x)


def test_a_token_reads_its_nearest_nodes():
    """At the start a token searches for what it resembles: its own normalised self."""
    x, graph = tokens(), graph_of()
    run = compiled()[1]
    variables = compiled()[0](jax.random.key(0), x, graph)
    variables["params"]["gate"] = jnp.ones(8)
    before = run(variables, x, graph)
    wanted = (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)
    hits = search(graph, wanted.reshape(-1, 8), k=3, threshold=0.0)
    for node in range(7):
        changed = graph._replace(value=graph.value.at[node].multiply(jnp.arange(8.0)))
        moved = np.any(np.asarray(run(variables, x, changed)) != before, axis=-1)
        is_read = np.any(np.asarray(hits.ids) == node, axis=-1).reshape(B, S)
        np.testing.assert_array_equal(moved, is_read)


def test_each_token_reads_by_itself():
    x, graph = tokens(), graph_of()
    run, variables = compiled()[1], open_variables()
    before, after = run(variables, x, graph), run(variables, x.at[:, 2:].multiply(-1.0), graph)
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert not np.array_equal(before[:, 2:], after[:, 2:])


def test_retrieval_in_parts_equals_retrieval_at_once(monkeypatch):
    x, graph, variables = tokens(), graph_of(), open_variables()
    whole = compiled()[1](variables, x, graph)
    nearest = importlib.import_module("moe_jax.ops.search.nearest")
    query = importlib.import_module("moe_jax.graph.query")
    monkeypatch.setattr(nearest, "SCORES_AT_ONCE", 4 * graph.num_nodes)
    nearest.nearest.clear_cache()
    query._search.clear_cache()
    apply = MemoryReader(num_heads=2, top_k=3).apply
    assert "scan" in str(jax.make_jaxpr(apply)(variables, x, graph))
    np.testing.assert_array_equal(jax.jit(apply)(variables, x, graph), whole)
