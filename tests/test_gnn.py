"""Graph layers against dense adjacency, and the encoder as a reader of the graph."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.gnn import GATLayer, GraphEncoder, SAGELayer
from moe_jax.graph import KnowledgeGraph, insert
from moe_jax.memory import MemoryReader

N, M, F, G = 10, 3, 6, 8
LAYERS = {
    "sage": SAGELayer(G),
    "gat": GATLayer(G, num_heads=2),
    "gat of mean heads": GATLayer(G, num_heads=2, is_concatenated=False),
}


def random_graph(seed=0, live=0.7):
    """Random edges, to free slots, to the node itself and twice to the same among them."""
    rng = np.random.default_rng(seed)
    graph = KnowledgeGraph.create(N, F, num_edge_slots=M)
    return graph._replace(
        is_live=jnp.asarray(rng.random(N) < live),
        value=jnp.asarray(rng.normal(size=(N, F)), jnp.float32),
        edge_target=jnp.asarray(rng.integers(N + 1, size=(N, M)), jnp.int32),
    )


def adjacency(graph):
    """[N, N], how many edges lead from a live node to another live node."""
    live, count = np.asarray(graph.is_live), np.zeros((N, N))
    for n in range(N):
        for target in np.asarray(graph.edge_target)[n]:
            if live[n] and target < N and live[target] and target != n:
                count[n, target] += 1
    return count


def variables_of(name, graph):
    start = jax.jit(LAYERS[name].init)(jax.random.key(1), graph.value, graph)
    return jax.tree.map(lambda a: a + 0.1, start)  # so that biases are not zero


run = {name: jax.jit(layer.apply) for name, layer in LAYERS.items()}


def dense_sage(p, x, count):
    mean = count @ x / np.maximum(count.sum(axis=1, keepdims=True), 1)
    out = np.maximum(x @ p["own"]["kernel"] + p["own"]["bias"] + mean @ p["near"]["kernel"], 0)
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)


def dense_gat(p, x, count, is_concatenated):
    heads = []
    transform = np.asarray(p["transform"]["kernel"]).reshape(F, 2, -1)
    for head in range(2):
        h = x @ transform[:, head]
        own, near = h @ p["attend_own"][head], h @ p["attend_near"][head]
        score = own[:, None] + near[None]
        score = np.where(score > 0, score, 0.2 * score)
        weight = np.exp(score) * (count + np.eye(N))
        heads.append(weight / weight.sum(axis=1, keepdims=True) @ h)
    out = np.concatenate(heads, axis=1) if is_concatenated else np.mean(heads, axis=0)
    out = out + p["bias"]
    return np.where(out > 0, out, np.expm1(np.minimum(out, 0)))


@pytest.mark.parametrize("name", LAYERS)
def test_equals_dense_adjacency(name):
    variables = variables_of(name, random_graph())
    for seed in range(5):
        graph = random_graph(seed, live=[0.7, 1.0][seed % 2])
        p = jax.tree.map(np.asarray, variables["params"])
        x, count = np.asarray(graph.value, np.float64), adjacency(graph)
        live = np.asarray(graph.is_live)[:, None]
        x = np.where(live, x, 0)
        if name == "sage":
            expected = dense_sage(p, x, count)
        else:
            expected = dense_gat(p, x, count, LAYERS[name].is_concatenated)
        found = run[name](variables, graph.value, graph)
        np.testing.assert_allclose(found, np.where(live, expected, 0), atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_free_slots_are_never_read(name):
    graph = random_graph(1)
    variables = variables_of(name, graph)
    poisoned = jnp.where(graph.is_live[:, None], graph.value, jnp.nan)

    @jax.jit
    def loss(variables, x):
        return jnp.sum(run[name](variables, x, graph) ** 2)

    grads = jax.grad(loss, argnums=(0, 1))
    np.testing.assert_array_equal(
        run[name](variables, poisoned, graph), run[name](variables, graph.value, graph)
    )
    clean, dirty = grads(variables, graph.value), grads(variables, poisoned)
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(dirty))
    assert any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(dirty))
    np.testing.assert_array_equal(dirty[1][~np.asarray(graph.is_live)], 0)


@pytest.mark.parametrize("name", LAYERS)
def test_renumbering_nodes_renumbers_the_output(name):
    graph = random_graph(2)
    variables = variables_of(name, graph)
    order = np.random.default_rng(0).permutation(N)  # new node i is old node order[i]
    new_id = np.append(np.argsort(order), N)
    moved = graph._replace(
        is_live=graph.is_live[order],
        edge_target=jnp.asarray(new_id[np.asarray(graph.edge_target)][order], jnp.int32),
    )
    found = run[name](variables, graph.value[order], moved)
    np.testing.assert_allclose(found, run[name](variables, graph.value, graph)[order], atol=1e-6)


@pytest.mark.parametrize("layer", ["sage", "gat"])
def test_an_empty_graph_and_half_precision(layer):
    encoder = GraphEncoder(features=G, layer=layer, num_heads=2, dtype=jnp.bfloat16)
    empty = random_graph()._replace(is_live=jnp.zeros(N, bool))
    out, variables = jax.jit(encoder.init_with_output)(jax.random.key(0), empty)
    np.testing.assert_array_equal(out, 0)
    variables = jax.tree.map(lambda a: a + 0.1, variables)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(encoder.apply(v, empty) ** 2)))(variables)
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(grads))
    exact = GraphEncoder(features=G, layer=layer, num_heads=2)
    full = random_graph()
    half, whole = (jax.jit(e.apply)(variables, full) for e in (encoder, exact))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, whole, atol=0.05)


def shaken(variables):
    """The variables with noise: equal steps in all features would vanish in a LayerNorm."""
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda a: a + jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), variables
    )


@functools.cache
def reading():
    """A reader with an open gate, an encoder, and what they read."""
    rng = np.random.default_rng(0)
    graph, _ = insert(KnowledgeGraph.create(N, F, num_edge_slots=M), rng.normal(size=(8, F)))
    graph = graph._replace(
        edge_target=jnp.asarray(rng.integers(N + 1, size=(N, M)), jnp.int32),
        value=jnp.asarray(rng.normal(size=(N, F)), jnp.float32),
    )
    x = jnp.asarray(rng.normal(size=(1, 4, F)), jnp.float32)
    reader, encoder = MemoryReader(num_heads=2, top_k=3, threshold=-1.0), GraphEncoder(features=G)
    reader_variables = jax.jit(reader.init)(jax.random.key(0), x, graph)
    reader_variables = shaken(reader_variables)
    return (
        reader,
        reader_variables,
        encoder,
        jax.jit(encoder.init)(jax.random.key(1), graph),
        graph,
        x,
    )


def test_reading_through_the_encoder_starts_as_reading_without():
    reader, reader_variables, encoder, encoder_variables, graph, x = reading()
    read, encode = jax.jit(reader.apply), jax.jit(encoder.apply)
    plain = read(reader_variables, x, graph)
    beside = read(reader_variables, x, graph, encode(encoder_variables, graph))
    np.testing.assert_allclose(beside, plain, atol=1e-6)
    changed = encode(shaken(encoder_variables), graph)
    beside = read(reader_variables, x, graph, changed)
    within = read(reader_variables, x, graph._replace(value=changed))
    np.testing.assert_allclose(beside, within, atol=1e-6)
    assert float(jnp.max(jnp.abs(beside - plain))) > 1e-3


def test_gradients_reach_the_encoder_and_not_the_graph():
    reader, reader_variables, encoder, encoder_variables, graph, x = reading()
    encoder_variables = shaken(encoder_variables)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
    def gradients(encoder_variables, key, value, weight):
        read = graph._replace(key=key, value=value, edge_weight=weight)
        values = encoder.apply(encoder_variables, read)
        return jnp.sum(reader.apply(reader_variables, x, read, values) ** 2)

    grads, *stored = gradients(encoder_variables, graph.key, graph.value, graph.edge_weight)
    for leaf in stored:
        np.testing.assert_array_equal(leaf, 0)
    for leaf in jax.tree.leaves(grads):
        assert bool(jnp.all(jnp.isfinite(leaf)))
        assert float(jnp.max(jnp.abs(leaf))) > 1e-6


def test_wrong_calls():
    graph = random_graph()
    reader, reader_variables, *_, x = reading()
    with pytest.raises(ValueError, match="num_heads must divide features 8, got 3"):
        GATLayer(G, num_heads=3).init(jax.random.key(0), graph.value, graph)
    with pytest.raises(ValueError, match="layer must be 'sage' or 'gat', got 'gcn'"):
        GraphEncoder(layer="gcn").init(jax.random.key(0), graph)
    with pytest.raises(ValueError, match=r"values must have shape \(10, 6\), got \(9, 6\)"):
        reader.apply(reader_variables, x, graph, graph.value[:9])
