"""The health report against counts made one node and one edge at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import filled
from graph_oracle import cosine

from moe_jax.graph import GraphHealth, KnowledgeGraph, health, insert

N, D, M = 24, 4, 3
SHARES = ("occupancy", "merge_rate", "duplicate_rate", "never_read_share", "mean_out_degree")
SHARES += ("hub_share", "isolated_share")


def bin_of(value):
    return len(f"{value:b}") if value > 0 else 0


def slow_health(graph, now, duplicate_cosine, sample):
    g = jax.tree.map(np.asarray, graph)
    size = len(g.is_live)
    live = [n for n in range(size) if g.is_live[n]]
    edges, dead = [], 0
    for n in range(size):
        for target in g.edge_target[n]:
            if 0 <= target < size:
                if n in live and target in live:
                    edges.append((n, int(target)))
                else:
                    dead += 1
    into = [sum(t == n for _, t in edges) for n in range(size)]
    count = min(sample, len(live))
    taken = live if len(live) <= sample else [live[i * len(live) // sample] for i in range(sample)]
    twins = sum(
        any(cosine(g.key[n], g.key[o]) >= np.float32(duplicate_cosine) for o in live if o != n)
        for n in taken
    )
    touched = {n for s, t in edges if s != t for n in (s, t)}
    hubs = -(-len(live) // 100)
    histograms = np.zeros((2, 32), int)
    for n in live:
        histograms[0, bin_of(int(g.hits[n]))] += 1
        histograms[1, bin_of(int(now - g.created[n]))] += 1
    return {
        "num_live": len(live),
        "occupancy": len(live) / size,
        "merge_rate": g.num_merged / max(g.num_updates, 1),
        "duplicate_rate": twins / max(count, 1),
        "hits_histogram": histograms[0],
        "age_histogram": histograms[1],
        "never_read_share": sum(g.reads[n] == 0 for n in live) / max(len(live), 1),
        "num_edges": len(edges),
        "mean_out_degree": len(edges) / max(len(live), 1),
        "max_in_degree": max(into),
        "hub_share": sum(sorted(into)[::-1][:hubs]) / max(len(edges), 1),
        "isolated_share": sum(n not in touched for n in live) / max(len(live), 1),
        "dead_edges": dead,
    }


def assert_equals(report, expected):
    assert set(expected) == set(GraphHealth._fields)
    for name, value in expected.items():
        actual = getattr(report, name)
        if name in SHARES:
            np.testing.assert_allclose(actual, value, rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(actual, value, err_msg=name)


def random_graph(rng):
    """Nodes, a few freed behind the graph's back, and edges to anywhere: dead, self, repeated."""
    graph, _ = filled(rng, N, D, 16, num_edge_slots=M, threshold=float(rng.choice([0.9, 1.5])))
    ints = {
        name: rng.choice([0, 1, 2, 3, 4, 1000, 2**31 - 1], size=N).astype(np.int32)
        for name in ("hits", "reads", "created")
    }
    target = rng.integers(N + 1, size=(N, M)).astype(np.int32)
    if rng.random() < 0.5:
        target[:, 0] = 2
    live = np.asarray(graph.is_live) & (rng.random(N) < rng.choice([0.5, 1.0]))
    changed = {
        k: jnp.asarray(v) for k, v in (ints | {"edge_target": target, "is_live": live}).items()
    }
    return graph._replace(**changed)


@pytest.mark.parametrize("seed", range(20))
def test_equals_slow_counts(seed):
    rng = np.random.default_rng(seed)
    graph = random_graph(rng)
    threshold, sample = float(rng.choice([0.3, 0.9])), int(rng.choice([5, 24]))
    now = int(rng.choice([0, 900, 2**31 - 1]))
    report = health(graph, now=now, duplicate_cosine=threshold, sample=sample)
    assert_equals(report, slow_health(graph, now, threshold, sample))


def test_empty_full_and_single():
    empty = KnowledgeGraph.create(N, D, num_edge_slots=M)
    one, _ = insert(empty, np.ones((1, D)))
    full, _ = insert(empty, np.random.default_rng(0).normal(size=(N, D)), merge_threshold=1.5)
    for graph in (empty, one, full):
        now = int(graph.clock)
        assert_equals(health(graph), slow_health(graph, now, 0.9, 512))
    assert float(health(full).occupancy) == 1.0
    assert all(np.isfinite(leaf).all() for leaf in health(empty))


def test_jit_vmap_and_staying_on_the_device():
    graphs = [random_graph(np.random.default_rng(seed)) for seed in (1, 2)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *graphs)
    many = jax.jit(jax.vmap(health))(both)
    for i, graph in enumerate(graphs):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), many, health(graph))
    measure = jax.jit(health)
    measure(graphs[0])
    with jax.transfer_guard("disallow"):
        measure(graphs[1])
    assert measure._cache_size() == 1


@pytest.mark.parametrize("sample", [0, -1, 40_000])
def test_wrong_samples(sample):
    with pytest.raises(ValueError, match=f"sample must be between 1 and 32768, got {sample}"):
        health(KnowledgeGraph.create(4, 2), sample=sample)
