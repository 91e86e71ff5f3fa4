"""Clusters and communities against slow versions, and on graphs that are empty, full or odd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.graph import KnowledgeGraph, cluster, label_propagation
from moe_jax.graph.state import with_keys
from moe_jax.ops import group_sums, normalize

N, D, M, SIZES, T = 40, 4, 3, (8, 3), 4
KEY = jax.random.key(0)
run = functools.partial(cluster, num_clusters=SIZES, key=KEY, num_typical=T, iterations=5)


def random_graph(seed, live=0.8):
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(5, D))
    keys = centre[rng.integers(5, size=N)] + 0.3 * rng.normal(size=(N, D))
    keys[1::9] = keys[0]  # copies, for ties
    is_live = rng.random(N) < live
    graph = KnowledgeGraph.create(N, D, num_edge_slots=M)
    at = jnp.where(is_live, jnp.arange(N), N)
    graph = with_keys(graph, at, normalize(jnp.asarray(keys, jnp.float32)))
    confidence = rng.choice([0.0, 0.5, 0.9], size=N) * (np.arange(N) > 10)
    return graph._replace(
        is_live=jnp.asarray(is_live),
        value=jnp.asarray(rng.normal(size=(N, D)), jnp.float32),
        confidence=jnp.asarray(confidence, jnp.float32),
        edge_target=jnp.asarray(rng.integers(N + 1, size=(N, M)), jnp.int32),  # self-loops, too
        edge_weight=jnp.asarray(rng.choice([-1.0, 0.0, 0.25, 0.5], size=(N, M)), jnp.float32),
    )


def expected_summary(graph, nodes):
    weight = np.maximum(np.asarray(graph.confidence)[nodes], 0)
    weight = weight if weight.sum() > 0 else np.ones(len(nodes))
    return weight @ np.asarray(graph.value)[nodes] / max(weight.sum(), 1e-9)


@pytest.mark.parametrize("live", [0.8, 1.0, 0.1, 0.0])
def test_every_level_describes_its_clusters(live):
    for seed in range(3):
        graph = random_graph(seed, live)
        levels = run(graph)
        own = np.asarray(levels[0].assignment)
        np.testing.assert_array_equal(own == SIZES[0], ~graph.is_live)
        for level, size in zip(levels, SIZES, strict=True):
            np.testing.assert_array_equal(level.assignment, own)
            for c in range(size):
                nodes = np.flatnonzero(own == c)
                assert int(level.sizes[c]) == len(nodes)
                np.testing.assert_allclose(
                    level.summary[c], expected_summary(graph, nodes), atol=1e-5
                )
                assert_typical(graph, level, c, nodes)
            parent = np.append(np.asarray(level.parent), SIZES[1])
            own = parent[own]
        np.testing.assert_array_equal(
            np.asarray(levels[0].parent) == SIZES[1], levels[0].sizes == 0
        )
        np.testing.assert_array_equal(levels[1].parent, 0)


def assert_typical(graph, level, c, nodes):
    fit = np.asarray(graph.key, np.float64)[nodes] @ np.asarray(level.centroids[c], np.float64)
    expected = [*nodes[np.argsort(-np.round(fit, 6), kind="stable")][:T], *[N] * T][:T]
    found = np.asarray(level.typical[c])
    if len(np.unique(np.round(fit, 5))) == len(fit):
        np.testing.assert_array_equal(found, expected)
    assert set(found) - {N} <= set(nodes)
    np.testing.assert_array_equal(found == N, np.arange(T) >= len(nodes))


def test_the_finest_level_puts_nodes_at_their_nearest_centroid():
    graph = random_graph(0)
    fine = run(graph)[0]
    score = np.asarray(graph.key) @ np.asarray(fine.centroids).T
    score = np.where(np.asarray(fine.sizes) > 0, score, -np.inf)
    own = np.asarray(fine.assignment)
    live = np.asarray(graph.is_live)
    np.testing.assert_allclose(score[live, own[live]], score.max(axis=1)[live], atol=1e-5)


def slow_labels(graph, rounds):
    """Raghavan's rounds with dicts."""
    live = np.asarray(graph.is_live)
    label = {n: n for n in range(N) if live[n]}
    for _ in range(rounds):
        new = {}
        for n in label:
            votes, strongest = {}, 0.0
            for slot in range(M):
                target, weight = int(graph.edge_target[n, slot]), float(graph.edge_weight[n, slot])
                if target in label and target != n and weight > 0:
                    votes[label[target]] = votes.get(label[target], 0.0) + weight
                    strongest = max(strongest, weight)
            votes[label[n]] = votes.get(label[n], 0.0) + strongest
            new[n] = min(votes, key=lambda other: (-votes[other], other))
        label = new
    return np.array([label.get(n, N) for n in range(N)])


@pytest.mark.parametrize("rounds", [0, 1, 2, 30])
def test_labels_equal_the_slow_version(rounds):
    for seed in range(4):
        graph = jax.tree.map(np.asarray, random_graph(seed))
        found = label_propagation(jax.tree.map(jnp.asarray, graph), max_iterations=rounds)
        assert int(found.rounds) <= rounds
        expected = slow_labels(graph, int(found.rounds))
        np.testing.assert_array_equal(found.label, expected)
        if bool(found.is_stable):
            np.testing.assert_array_equal(slow_labels(graph, int(found.rounds) + 1), expected)
        else:
            assert int(found.rounds) == rounds


def with_edges(edges, is_live):
    graph = KnowledgeGraph.create(N, D, num_edge_slots=M)
    target, weight = np.full((N, M), N), np.zeros((N, M), np.float32)
    for source, slot, other in edges:
        target[source, slot], weight[source, slot] = other, 0.5
    return graph._replace(
        is_live=jnp.asarray(is_live),
        edge_target=jnp.asarray(target, jnp.int32),
        edge_weight=jnp.asarray(weight),
    )


def test_propagation_ends_on_awkward_graphs():
    everyone = np.ones(N, bool)
    pair = label_propagation(with_edges([(3, 0, 5), (5, 0, 3)], everyone), max_iterations=30)
    assert (int(pair.label[3]), int(pair.label[5])) == (3, 3)
    loops = label_propagation(with_edges([(n, 0, n) for n in range(N)], everyone), 30)
    np.testing.assert_array_equal(loops.label, np.arange(N))
    empty = label_propagation(with_edges([(3, 0, 5)], ~everyone), max_iterations=30)
    np.testing.assert_array_equal(empty.label, N)
    ring = label_propagation(with_edges([(n, 0, (n + 1) % N) for n in range(N)], everyone), 30)
    assert int(ring.rounds) == 30
    assert not bool(ring.is_stable)  # a label takes N rounds round the ring
    for found in (pair, loops, empty):
        assert bool(found.is_stable)


def test_sums_of_groups_in_chunks(monkeypatch):
    import moe_jax.ops.segment as segment

    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3)).astype(np.float32)
    group, weight = rng.integers(7, size=50), rng.random(50).astype(np.float32)
    expected = np.zeros((5, 3))
    for row in range(50):
        if group[row] < 5:
            expected[group[row]] += weight[row] * x[row]
    group = jnp.asarray(group, jnp.int32)
    for pairs in (2**24, 5 * 16):
        monkeypatch.setattr(segment, "_PAIRS_AT_ONCE", pairs)
        found = jax.jit(segment.group_sums.__wrapped__, static_argnums=3)(x, group, weight, 5)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert group_sums(x[:0], group[:0], weight[:0], 5).shape == (5, 3)


def test_wrong_calls():
    graph = random_graph(0)
    for sizes in ((), (3, 0), (3, 3), (2, 4)):
        with pytest.raises(ValueError, match="num_clusters must"):
            cluster(graph, sizes, key=KEY)
    with pytest.raises(ValueError, match="num_typical must be at least 1, got 0"):
        cluster(graph, (2,), key=KEY, num_typical=0)
    with pytest.raises(ValueError, match="max_iterations must be at least 0, got -1"):
        label_propagation(graph, -1)
