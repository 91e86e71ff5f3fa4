"""What every function on the graph keeps to: errors, jit, vmap, purity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import assert_identical

from moe_jax.graph import (
    KnowledgeGraph,
    StreamTail,
    build_cells,
    incoming_edges,
    insert,
    k_hop,
    link,
    link_similar,
    link_stream,
    local_pagerank,
    neighbours,
    pagerank,
    path_to,
    retrieve,
    search,
    search_cells,
    shortest_paths,
)


@pytest.fixture(scope="module")
def graph():
    keys = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    return insert(KnowledgeGraph.create(8, 4), keys)[0]


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
    (lambda g: link(g, IDS * 1.0, IDS), "source must be a list of integers.*float"),
    (lambda g: link(g, IDS, IDS, on_duplicate="skip"), "on_duplicate must be one of.*got 'skip'"),
    (lambda g: link_similar(g, IDS, k=0), "k must be at least 1, got 0"),
    (lambda g: link_similar(g, IDS, queries=ROW[:1]), "queries must have 2 rows"),
    (lambda g: link_similar(g, IDS, on_duplicate="skip"), "on_duplicate must be one of"),
    (lambda g: search(g, ROW[0]), r"queries must have shape \[rows, 4\].*got \(4,\)"),
    (lambda g: search(g, ROW, 2, kind=IDS[:1]), r"kind must have shape \(2,\), got \(1,\)"),
    (lambda g: link(g, IDS, IDS, start=IDS[:1]), r"start must have shape \(2,\), got \(1,\)"),
    (
        lambda g: link(g, IDS, IDS, end=ROW.astype(np.int32)),
        r"end must have shape \(2,\), got \(2, 4\)",
    ),
    (lambda g: link_stream(g, IDS, IDS[:1]), r"stream must have shape \(2,\), got \(1,\)"),
    (lambda g: link_stream(g, ROW, 0), "node_id must be a list of integers"),
    (lambda g: link_stream(g, IDS, 0, position=ROW.astype(np.int32)), "position must have shape"),
    (lambda g: link_stream(g, IDS, 0, tail=StreamTail(IDS, IDS[:1])), "tail must hold two lists"),
    (lambda g: StreamTail.create(g, -1), "num_streams must not be negative, got -1"),
    (lambda g: neighbours(g, np.int32(0)), "node_id must be a list of integers"),
    (lambda g: neighbours(g, IDS, as_of=IDS[:1]), r"as_of must have shape \(2,\), got \(1,\)"),
    (lambda g: k_hop(g, IDS, 1), r"start must be integers of shape \[queries, starts\].*\(2,\)"),
    (lambda g: k_hop(g, ROW, 1), "start must be of integers, got dtype float32"),
    (lambda g: k_hop(g, np.array([[2**32]]), 1), "start must fit int32, got 4294967296"),
    (lambda g: link_similar(g, IDS, threshold=ROW[0]), r"threshold must be a scalar.*\(4,\)"),
    (lambda g: k_hop(g, IDS[None], -1), "hops must not be negative, got -1"),
    (lambda g: k_hop(g, IDS[None], 1, fan_out=0), "fan_out must be at least 1, got 0"),
    (lambda g: k_hop(g, IDS[None], 1, max_nodes=1), "max_nodes must be at least 2.*got 1"),
    (lambda g: k_hop(g, IDS[None], 1, kind=IDS), r"kind must have shape \(1,\), got \(2,\)"),
    (lambda g: shortest_paths(g, IDS), "start must be integers"),
    (lambda g: shortest_paths(g, IDS[None], cost="time"), "cost must be one of.*got 'time'"),
    (lambda g: shortest_paths(g, IDS[None], max_hops=-1), "max_hops must not be negative, got -1"),
    (lambda g: shortest_paths(g, IDS[None], kind=IDS), r"kind must have shape \(1,\)"),
    (
        lambda g: path_to(shortest_paths(g, IDS[None]), 0, max_nodes=0),
        "max_nodes must be at least 1, got 0",
    ),
    (lambda g: pagerank(g, damping=1.0), "damping must be at least 0 and below 1, got 1.0"),
    (lambda g: pagerank(g, tol=-1.0), "tol must not be negative, got -1.0"),
    (lambda g: pagerank(g, max_iterations=-1), "max_iterations must not be negative, got -1"),
    (lambda g: pagerank(g, personalization=ROW), r"personalization must have shape.*\(2, 4\)"),
    (lambda g: pagerank(g, personalization=(IDS, IDS)), "personalization must be integer ids"),
    (lambda g: pagerank(g, personalization=(ROW, ROW)), "personalization must be of integers"),
    (lambda g: retrieve(g, ROW, -1), "k must be between 1 and 8.*got -1"),
    (lambda g: retrieve(g, ROW, 9), "k must be between 1 and 8.*got 9"),
    (lambda g: retrieve(g, ROW[0], 1), r"queries must have shape \[rows, 4\].*got \(4,\)"),
    (
        lambda g: retrieve(g, ROW, 1, edges=incoming_edges(KnowledgeGraph.create(3, 4))),
        "edges must be of a graph of 8 nodes, got 3",
    ),
    (lambda g: retrieve(g, ROW, 1, seeds=0), "seeds must be at least 1, got 0"),
    (lambda g: retrieve(g, ROW, 1, mix=1.5), "mix must be between 0 and 1, got 1.5"),
    (lambda g: retrieve(g, ROW, 1, damping=-0.1), "damping must be at least 0.*got -0.1"),
    (lambda g: retrieve(g, ROW, 1, iterations=-1), "iterations must not be negative, got -1"),
    (lambda g: retrieve(g, ROW, 1, sharpness=0.0), "sharpness must be positive, got 0.0"),
    (lambda g: retrieve(g, ROW, 1, seeds=4, max_nodes=3), r"max_nodes must be at least 4.*got 3"),
    (lambda g: retrieve(g, ROW, 1, hops=-1), "hops must not be negative, got -1"),
]


NONE, NO_ROWS = np.zeros((0, 2), np.int32), np.zeros((0, 4), np.float32)
WITHOUT_QUERIES = {
    "search": lambda g: search(g, NO_ROWS, 2),
    "search by codes": lambda g: search(
        KnowledgeGraph.create(128, 64), np.zeros((0, 64), np.float32), 2, implementation="code"
    ),
    "search_cells": lambda g: search_cells(
        g, build_cells(g, 2, key=jax.random.key(0)), NO_ROWS, 2, probes=1
    ),
    "retrieve": lambda g: retrieve(g, NO_ROWS, 2),
    "retrieve nearby": lambda g: retrieve(g, NO_ROWS, 2, seeds=1, max_nodes=2),
    "k_hop": lambda g: k_hop(g, NONE, 1),
    "local_pagerank": lambda g: local_pagerank(g, (NONE, NONE.astype(np.float32))),
    "pagerank": lambda g: pagerank(g, personalization=(NONE, NONE.astype(np.float32))),
    "shortest_paths": lambda g: shortest_paths(g, NONE),
}


@pytest.mark.parametrize("name", WITHOUT_QUERIES)
def test_no_queries_have_no_answers(graph, name):
    found = WITHOUT_QUERIES[name](graph)
    assert all(array.shape[0] == 0 for array in jax.tree.leaves(found))


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_calls(graph, call, message):
    with pytest.raises(ValueError, match=message):
        call(graph)


def whole_cycle(graph, keys, threshold):
    graph, info = insert(graph, keys, merge_threshold=threshold)
    graph, count = link_similar(graph, info.node_id, queries=keys, k=2, threshold=0.1)
    graph, more = link(graph, info.node_id, info.node_id[::-1], kind=1, symmetric=True)
    graph, steps, tail = link_stream(graph, info.node_id, 0, tail=StreamTail.create(graph, 1))
    hits = search(graph, keys, k=3, threshold=threshold)
    return graph, info, count + more + steps, tail, hits, neighbours(graph, hits.ids[:, 0])


def whole_walk(graph, keys):
    hits = search(graph, keys, k=2)
    paths = shortest_paths(graph, hits)
    ways = path_to(paths, hits.ids[:, 1], max_nodes=4)
    return k_hop(graph, hits, 2, max_nodes=6), paths, ways, retrieve(graph, keys, 3)


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


def test_walks_under_jit_and_vmap(graph, keys):
    graph, *_ = fast_cycle(graph, keys[0], 0.8)
    jitted = jax.jit(whole_walk)
    args = jax.device_put((graph, keys[0]))
    jitted(*args)
    with jax.transfer_guard("disallow"):
        alone = jitted(*args)
    assert jitted._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, alone, whole_walk(graph, keys[0]))
    many = jax.jit(jax.vmap(whole_walk, in_axes=(None, 0)))(graph, keys)
    for i in range(3):
        alone = jitted(graph, keys[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a, b[i]), alone, many)


def test_the_old_graph_is_untouched(graph, keys):
    before = jax.tree.map(np.array, graph)
    whole_cycle(graph, keys[0], 0.8)
    assert_identical(graph, before)
