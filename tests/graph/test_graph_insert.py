"""Insert against its oracle, and the properties that make it safe to batch."""

import graph_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import (
    CASES,
    assert_equals_oracle,
    assert_identical,
    assert_outcomes,
    padded,
    random_items,
    random_threshold,
    run_insert,
    slices,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.graph import KnowledgeGraph, insert


@pytest.mark.parametrize("case", CASES)
def test_equals_oracle(case):
    rows, num_nodes, dim, optional = case
    for seed in range(120):
        rng = np.random.default_rng([seed, rows, num_nodes, dim])
        graph = KnowledgeGraph.create(num_nodes, dim)
        oracle = graph_oracle.Graph(num_nodes, dim)
        items = random_items(rng, rows * 3, dim, optional)
        threshold = random_threshold(rng, items["key"])
        for part in slices(items, [0, rows, 2 * rows, 3 * rows]):
            graph, info = run_insert(graph, part, threshold)
            assert_outcomes(info, oracle.insert(part, threshold))
            assert_equals_oracle(graph, oracle)


@pytest.mark.parametrize("case", CASES[2:4])
def test_ema_equals_oracle(case):
    rows, num_nodes, dim, optional = case
    for seed in range(40):
        rng = np.random.default_rng([seed, rows, dim])
        graph = KnowledgeGraph.create(num_nodes, dim)
        oracle = graph_oracle.Graph(num_nodes, dim)
        items = random_items(rng, rows, dim, optional)
        items["key"] += rng.normal(size=(rows, dim)).astype(np.float32)  # no ties to be broken
        threshold = float(rng.choice([0.3, 0.8, 0.95]))
        graph, info = run_insert(graph, items, threshold, merge_rule="ema")
        assert_outcomes(info, oracle.insert(items, threshold, "ema"), approximate=True)
        assert_equals_oracle(graph, oracle, approximate=("key", "value"))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 40), max_size=6))
def test_a_split_of_the_stream_does_not_matter(seed, cuts):
    rng = np.random.default_rng(seed)
    items = random_items(rng, 40, 3)
    threshold = random_threshold(rng, items["key"])
    whole, _ = run_insert(KnowledgeGraph.create(20, 3), items, threshold)
    graph = KnowledgeGraph.create(20, 3)
    for part in slices(items, [0, *sorted(cuts), 40]):
        graph, _ = run_insert(graph, padded(part, 40), threshold)
    assert_identical(graph, whole)


def test_a_split_does_not_matter_at_other_matmul_shapes():
    dim = 600
    rng = np.random.default_rng(dim)
    centres = rng.normal(size=(40, dim))
    keys = centres[rng.integers(40, size=96)] + 0.25 * rng.normal(size=(96, dim))
    items = {"key": keys.astype(np.float32), "confidence": rng.random(96).astype(np.float32)}
    threshold = 0.94  # the mean cosine within a cluster, so that many pairs are close calls
    whole, info = run_insert(KnowledgeGraph.create(150, dim), items, threshold)
    assert 0 < int(info.merged.sum()) < 96
    for size in (1, 8):
        graph = KnowledgeGraph.create(150, dim)
        for part in slices(items, [*range(0, 96, size), 96]):
            graph, _ = run_insert(graph, part, threshold)
        assert_identical(graph, whole)


def test_inserting_twice_merges():
    keys = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    graph, first = insert(KnowledgeGraph.create(20, 8), keys)
    graph, second = insert(graph, keys * 5)
    assert bool(first.created.all())
    assert bool(second.merged.all())
    np.testing.assert_array_equal(first.node_id, second.node_id)
    np.testing.assert_array_equal(graph.hits[:16], 2)


def test_a_chain_does_not_collapse():
    angle = np.deg2rad(10.0) * np.arange(5)
    keys = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    graph, info = insert(KnowledgeGraph.create(8, 2), keys, merge_threshold=np.cos(np.deg2rad(15)))
    np.testing.assert_array_equal(info.node_id, [0, 0, 1, 1, 2])
    assert int(graph.num_live) == 3


def test_a_circle_keeps_its_nodes():
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    keys = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    graph, info = insert(KnowledgeGraph.create(64, 2), keys, merge_threshold=0.95)
    # A leader stands for 18.19 degrees either side at most: 252 steps of 0.072 degrees.
    assert int(graph.num_live) == 5000 // 253
    key = np.asarray(graph.key)[np.asarray(info.node_id)]
    assert np.sum(key * keys, axis=1).min() >= 0.95 - 1e-6
    np.testing.assert_array_equal(graph.hits.sum(), 5000)


def test_a_full_graph_rejects_and_still_merges():
    graph, info = insert(KnowledgeGraph.create(2, 3), jnp.eye(3)[jnp.array([0, 1, 2, 0, 2])])
    np.testing.assert_array_equal(info.node_id, [0, 1, 2, 0, 2])
    np.testing.assert_array_equal(info.rejected, [False, False, True, False, True])
    assert (int(graph.num_rejected), int(graph.num_updates)) == (2, 3)


def test_the_most_confident_item_speaks():
    keys = jnp.ones((4, 2))
    values = jnp.arange(8.0).reshape(4, 2)
    confidence = jnp.array([0.2, 0.7, 0.7, 0.1])
    graph, _ = insert(
        KnowledgeGraph.create(4, 2),
        keys,
        values=values,
        confidence=confidence,
        expert_id=jnp.arange(4),
        source=jnp.arange(8).reshape(4, 2),
    )
    np.testing.assert_array_equal(graph.value[0], [2.0, 3.0])
    np.testing.assert_array_equal(graph.source[0], [2, 3])
    assert (int(graph.expert_id[0]), int(graph.hits[0]), int(graph.updated[0])) == (1, 4, 4)


def test_counters_stop_at_their_maximum():
    graph = KnowledgeGraph.create(4, 2)
    top = jnp.int32(2**31 - 1)
    graph = graph._replace(clock=top, num_updates=top - 1, num_rejected=top)
    graph, _ = insert(graph, jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    assert int(graph.clock) == int(graph.num_updates) == int(graph.num_rejected) == int(top)


@pytest.mark.parametrize("merge_rule", ["leader", "ema"])
def test_nothing_to_insert(merge_rule):
    graph = KnowledgeGraph.create(4, 2)
    after, info = insert(graph, jnp.zeros((0, 2)), merge_rule=merge_rule)
    assert_identical(after, graph)
    assert info.node_id.shape == (0,)


def test_above_one_nothing_merges_and_at_one_copies_do():
    keys = np.random.default_rng(1).normal(size=(1, 8)).repeat(20, axis=0).astype(np.float32)
    graph, info = insert(KnowledgeGraph.create(30, 8), keys, merge_threshold=1.01)
    assert int(graph.num_live) == 20
    np.testing.assert_array_equal(info.node_id, np.arange(20))
    graph, info = insert(graph, keys, merge_threshold=1.0)
    np.testing.assert_array_equal(info.node_id, 0)  # twenty ties, so more than are over-fetched


def test_many_ties_in_a_large_graph_go_to_the_lowest_slot():
    """Sixty nodes at the same angle to the item: rounding of the rough pick must not choose."""
    dim = 64
    keys = np.sqrt(0.5) * np.eye(dim)[1:] + np.sqrt(0.5) * np.eye(dim)[0]
    graph, _ = insert(KnowledgeGraph.create(128, dim), keys, merge_threshold=1.01)
    _, info = insert(graph, np.eye(dim)[:1], merge_threshold=0.7)
    assert int(info.node_id[0]) == 0


def test_slots_below_old_nodes_are_filled_first_and_win_ties():
    graph, _ = insert(KnowledgeGraph.create(3, 2), jnp.array([[1.0, 0.0], [0.0, 1.0]]))
    graph = graph._replace(is_live=jnp.array([False, True, False]))
    items = jnp.array([[0.6, -0.8], [1.0, 1.0 / 3.0], [-1.0, 0.0]])
    _, info = insert(graph, items, merge_threshold=0.3)
    np.testing.assert_array_equal(info.node_id, [0, 1, 2])


def test_no_gradient_flows_into_the_graph():
    graph = KnowledgeGraph.create(4, 2)
    total = jax.grad(lambda keys: insert(graph, keys)[0].value.sum())(jnp.eye(2))
    np.testing.assert_array_equal(total, 0.0)
