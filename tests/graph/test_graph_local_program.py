"""PageRank near its seeds, as users compile it: its bits, and what its programs hold."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from graph_shapes import NUM_NODES, random_graph

from moe_jax.graph import KnowledgeGraph, local, local_pagerank, pagerank

fast_local = jax.jit(local_pagerank, static_argnames="max_nodes")


def test_a_query_is_the_same_bits_alone_and_among_others(monkeypatch):
    rng = np.random.default_rng(0)
    graph = random_graph(rng)
    ids = rng.integers(NUM_NODES, size=(5, 3)).astype(np.int32)
    weight = rng.random((5, 3)).astype(np.float32)
    whole = fast_local(graph, (ids, weight), max_nodes=7)
    for q in range(5):
        alone = fast_local(graph, (ids[q : q + 1], weight[q : q + 1]), max_nodes=7)
        jax.tree.map(lambda a, b, q=q: np.testing.assert_array_equal(a[0], b[q]), alone, whole)
    monkeypatch.setattr(local, "_EDGES_AT_ONCE", 2 * 7 * graph.num_edge_slots)
    jax.clear_caches()
    parts = local_pagerank(graph, (ids, weight), max_nodes=7)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


def test_no_array_but_the_graph_is_as_long_as_the_graph():
    size = 4999
    graph = KnowledgeGraph.create(size, 4, num_edge_slots=3)
    seeds = (jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3)))

    def longest(run):
        text = jax.jit(run).lower(graph, seeds).compile().as_text()
        made = re.findall(rf"= \(?\w+\[[\d,]*\b(?:{size}|{3 * size})\b[^=]*? ([\w-]+)\(", text)
        return set(made) - {"parameter", "bitcast", "get-tuple-element", "tuple"}

    assert not longest(lambda graph, seeds: local_pagerank(graph, seeds, max_nodes=32))
    assert longest(lambda graph, seeds: pagerank(graph, personalization=seeds))
