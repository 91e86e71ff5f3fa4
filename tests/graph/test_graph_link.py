"""Edges against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import assert_equals_oracle, assert_identical, filled, random_keys

from moe_jax.graph import KnowledgeGraph, insert, link, link_similar, neighbours

fast_link = jax.jit(link, static_argnames="on_duplicate")
fast_link_similar = jax.jit(link_similar, static_argnames=("k", "on_duplicate"))


@pytest.mark.parametrize(("on_duplicate", "has_weight"), [("update", True), ("append", False)])
def test_link_equals_oracle(on_duplicate, has_weight):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        graph, oracle = filled(rng, 6, 3, 5, num_edge_slots=2, threshold=0.9)
        for _ in range(2):
            source, target = rng.integers(-1, 8, size=(2, 12)).astype(np.int32)
            weight = rng.choice([0.1, 0.2, 0.3, -0.4, np.nan], size=12).astype(np.float32)
            kind, time = rng.integers(2, size=12), rng.integers(9, size=12)
            is_valid = rng.random(12) < 0.9
            graph, count = fast_link(
                graph,
                source,
                target,
                weight=weight if has_weight else None,
                kind=kind,
                time=time,
                is_valid=is_valid,
                on_duplicate=on_duplicate,
            )
            expected = 0
            for i in np.flatnonzero(is_valid):
                edge = source[i], target[i], weight[i] if has_weight else None, kind[i], time[i]
                expected += oracle.link_one(*edge, on_duplicate)
            assert int(count) == expected
            assert_equals_oracle(graph, oracle)


@pytest.mark.parametrize(("on_duplicate", "has_queries"), [("update", True), ("append", False)])
def test_link_similar_equals_oracle(on_duplicate, has_queries):
    for seed in range(70):
        rng = np.random.default_rng(seed)
        graph, oracle = filled(rng, 20, 3, 16, num_edge_slots=4, threshold=0.95)
        threshold = np.float32(rng.choice([-1.0, 0.0, 0.3, 0.7]))
        node_id = rng.integers(-1, 22, size=8).astype(np.int32)
        queries = random_keys(rng, 8, 3) if has_queries else None
        graph, count = fast_link_similar(
            graph, node_id, queries=queries, k=3, threshold=threshold, on_duplicate=on_duplicate
        )
        assert int(count) == oracle.link_similar(node_id, queries, 3, threshold, on_duplicate)
        assert_equals_oracle(graph, oracle)


def test_the_strongest_edges_stay():
    graph, _ = insert(KnowledgeGraph.create(6, 6, num_edge_slots=2), jnp.eye(6))
    target = jnp.array([1, 2, 3, 4, 5])
    weight = jnp.array([0.3, 0.2, 0.2, 0.9, 0.1])
    graph, count = link(graph, jnp.zeros(5, jnp.int32), target, weight=weight)
    out = neighbours(graph, jnp.array([0]))
    np.testing.assert_array_equal(out.ids, [[1, 4]])
    np.testing.assert_array_equal(out.weight, np.float32([[0.3, 0.9]]))
    assert int(count) == 3


def test_no_edges_to_itself_or_to_nothing():
    graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
    source, target = jnp.array([0, 0, 3, -1, 4]), jnp.array([0, 3, 0, 0, 1])
    after, count = link(graph, source, target, weight=1.0)
    assert int(count) == 0
    assert_identical(after, graph)


def test_neighbours_of_no_node():
    graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.array([[1.0, 0.0], [1.0, 1.0]]))
    graph, _ = link_similar(graph, jnp.array([0, 1]))
    out = neighbours(graph, jnp.array([1, 3, 4, -1]))
    np.testing.assert_array_equal(out.is_valid.sum(axis=1), [1, 0, 0, 0])
    np.testing.assert_array_equal(out.ids[1:], 4)


def test_nothing_to_link():
    graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
    none = jnp.zeros(0, jnp.int32)
    for after, count in (link(graph, none, none), link_similar(graph, none)):
        assert_identical(after, graph)
        assert int(count) == 0
    assert neighbours(graph, none).ids.shape == (0, 8)
