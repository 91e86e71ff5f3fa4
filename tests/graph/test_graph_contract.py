"""What every function on the graph keeps to: errors, jit, vmap, purity, examples that run."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import assert_identical

import moe_jax.graph
from moe_jax.graph import KnowledgeGraph, insert, link, link_similar, neighbours, search

MODULES = ["state", "update", "evict", "link", "query"]


@pytest.fixture(scope="module")
def graph():
    keys = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    return insert(KnowledgeGraph.create(8, 4), keys)[0]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    names = {**vars(moe_jax.graph), "jnp": jnp}
    module = importlib.import_module(f"moe_jax.graph.{module}")
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def test_create():
    graph = KnowledgeGraph.create(5, 3, num_edge_slots=2)
    assert (graph.num_nodes, graph.dim, graph.num_edge_slots) == (5, 3, 2)
    assert int(graph.num_live) == 0
    buffers = {leaf.unsafe_buffer_pointer() for leaf in graph}
    assert len(buffers) == len(graph)  # so that the graph can be donated


ROW = np.ones((2, 4), np.float32)
IDS = np.zeros(2, np.int32)
WRONG = [
    (lambda g: KnowledgeGraph.create(0, 4), "num_nodes must be at least 1, got 0"),
    (lambda g: KnowledgeGraph.create(4, -1), "dim must be at least 1, got -1"),
    (lambda g: KnowledgeGraph.create(4, 4, num_edge_slots=0), "num_edge_slots must be at least 1"),
    (lambda g: KnowledgeGraph.create(4, 20_000), "dim must be at most 16384, got 20000"),
    (lambda g: insert(g, ROW[:, :3]), r"keys must have shape \[rows, 4\].*got \(2, 3\)"),
    (lambda g: insert(g, ROW[0]), r"keys must have shape \[rows, 4\].*got \(4,\)"),
    (lambda g: insert(g, ROW, values=ROW[:1]), r"values must have shape \(2, 4\).*got \(1, 4\)"),
    (lambda g: insert(g, ROW, confidence=np.ones(3)), r"confidence must have shape \(2,\).*\(3,\)"),
    (lambda g: insert(g, ROW, source=IDS[:, None]), r"source must have shape \(2, 2\).*\(2, 1\)"),
    (lambda g: insert(g, ROW, is_valid=ROW), "is_valid must have shape"),
    (lambda g: insert(g, ROW, merge_threshold=-1.0), "merge_threshold must be above -1, got -1.0"),
    (lambda g: insert(g, ROW, merge_threshold=np.nan), "merge_threshold must be above -1, got nan"),
    (lambda g: insert(g, ROW, ema_decay=1.5), "ema_decay must be between 0 and 1, got 1.5"),
    (lambda g: insert(g, ROW, merge_rule="mean"), "merge_rule must be one of.*got 'mean'"),
    (lambda g: insert(g, ROW, policy="newest"), "policy must be one of.*got 'newest'"),
    (lambda g: link(g, IDS, IDS[:1]), r"target must have shape \(2,\).*got \(1,\)"),
    (lambda g: link(g, IDS * 1.0, IDS), "source must be a list of integers.*float32"),
    (lambda g: link(g, IDS, IDS, on_duplicate="skip"), "on_duplicate must be one of.*got 'skip'"),
    (lambda g: link_similar(g, IDS, k=0), "k must be at least 1, got 0"),
    (lambda g: link_similar(g, IDS, queries=ROW[:1]), "queries must have 2 rows"),
    (lambda g: link_similar(g, IDS, on_duplicate="skip"), "on_duplicate must be one of"),
    (lambda g: search(g, ROW[0]), r"queries must have shape \[rows, 4\].*got \(4,\)"),
    (lambda g: search(g, ROW, 2, kind=IDS[:1]), r"kind must have shape \(2,\), got \(1,\)"),
    (lambda g: neighbours(g, np.int32(0)), "node_id must be a list of integers"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_calls(graph, call, message):
    with pytest.raises(ValueError, match=message):
        call(graph)


def whole_cycle(graph, keys, threshold):
    graph, info = insert(graph, keys, merge_threshold=threshold)
    graph, count = link_similar(graph, info.node_id, queries=keys, k=2, threshold=0.1)
    graph, more = link(graph, info.node_id, info.node_id[::-1], kind=1)
    hits = search(graph, keys, k=3, threshold=threshold)
    return graph, info, count + more, hits, neighbours(graph, hits.ids[:, 0])


fast_cycle = jax.jit(whole_cycle)


@pytest.fixture(scope="module")
def keys():
    return np.random.default_rng(1).normal(size=(3, 5, 4)).astype(np.float32)


def test_jit_equals_eager(graph, keys):
    jitted = fast_cycle(graph, keys[0], 0.8)
    jax.tree.map(np.testing.assert_array_equal, jitted, whole_cycle(graph, keys[0], 0.8))


def test_vmap_equals_a_loop(graph, keys):
    many = jax.jit(jax.vmap(whole_cycle, in_axes=(None, 0, None)))(graph, keys, 0.8)
    for i in range(3):
        alone = fast_cycle(graph, keys[i], 0.8)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), alone, many)


def test_stays_on_the_device(graph, keys):
    text = str(jax.make_jaxpr(whole_cycle)(graph, keys[0], 0.8))
    assert "callback" not in text
    assert "while" in text
    step = jax.jit(whole_cycle, donate_argnums=0)
    args = jax.device_put((jax.tree.map(jnp.copy, graph), keys[0], np.float32(0.8)))
    with jax.transfer_guard("disallow"):
        after, *_ = step(*args)
        again, *_ = step(after, *args[1:])
    assert int(again.num_live) > int(graph.num_live)
    assert step._cache_size() == 1


def test_the_old_graph_is_untouched(graph):
    before = jax.tree.map(np.array, graph)
    insert(graph, ROW)
    link_similar(graph, IDS)
    assert_identical(graph, before)
