"""k-hop and cheapest paths against slow, obvious versions."""

import heapq
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_shapes import AWKWARD, NUM_NODES, by_hand, edges_of, random_graph

from moe_jax.graph import Hits, k_hop, path_to, shortest_paths

fast_k_hop = jax.jit(k_hop, static_argnums=2, static_argnames=("fan_out", "max_nodes"))
fast_paths = jax.jit(shortest_paths, static_argnames=("cost", "max_hops"))
fast_path_to = jax.jit(path_to, static_argnames="max_nodes")


def slow_k_hop(edges, start, hops, fan_out, max_nodes):
    """[(node, distance)] in the order that they are found."""
    found = {n: 0 for n in start if n in edges}
    frontier = list(found)
    for hop in range(1, hops + 1):
        offers = [
            (-weight, rank, slot, target)
            for rank, node in enumerate(frontier)
            for slot, (target, weight) in enumerate(
                sorted(edges[node], key=lambda edge: -edge[1])[:fan_out]
            )
        ]
        frontier = []
        for *_, target in sorted(offers):
            if target not in found and len(found) < max_nodes:
                found[target] = hop
                frontier.append(target)
    return list(found.items())


@pytest.mark.parametrize(("hops", "fan_out", "max_nodes"), [(0, 2, 5), (1, 3, 12), (3, 2, 6)])
def test_k_hop_equals_the_slow_one(hops, fan_out, max_nodes):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng)
        start = rng.integers(-1, NUM_NODES + 1, size=(4, 3)).astype(np.int32)
        kind, as_of = rng.integers(2, size=4), rng.integers(3, size=4)
        filters = rng.choice([{}, {"kind": kind}, {"kind": kind, "as_of": as_of}])
        out = fast_k_hop(graph, start, hops, fan_out=fan_out, max_nodes=max_nodes, **filters)
        for q in range(4):
            edges = edges_of(graph, **{name: value[q] for name, value in filters.items()})
            expected = slow_k_hop(edges, start[q].tolist(), hops, fan_out, max_nodes)
            rest = [(NUM_NODES, -1)] * (max_nodes - len(expected))
            actual = np.stack([out.ids[q], out.distance[q]], axis=1)
            np.testing.assert_array_equal(actual, expected + rest)
            np.testing.assert_array_equal(out.is_valid[q], actual[:, 0] < NUM_NODES)


def slow_paths(edges, start, cost):
    """Distances by Dijkstra's algorithm, in float32."""
    distance = dict.fromkeys(edges, np.inf)
    heap = [(np.float32(0), n) for n in start if n in edges]
    while heap:
        so_far, node = heapq.heappop(heap)
        if so_far < distance[node]:
            distance[node] = so_far
            for target, weight in edges[node]:
                toll = np.float32(1) if cost == "hops" else max(np.float32(1) - weight, 0)
                heapq.heappush(heap, (np.float32(so_far + toll), target))
    return np.array([distance.get(n, np.inf) for n in range(NUM_NODES)], np.float32)


def cost_of(edges, ids, cost):
    total = np.float32(0)
    for source, target in itertools.pairwise(ids):
        tolls = [1 - w if cost == "weight" else 1 for t, w in edges[source] if t == target]
        total += max(np.float32(min(tolls)), np.float32(0))
    return total


@pytest.mark.parametrize("cost", ["weight", "hops"])
def test_paths_equal_the_slow_ones(cost):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng)
        start = rng.integers(-1, NUM_NODES + 1, size=(4, 2)).astype(np.int32)
        filters = {} if seed % 2 else {"kind": rng.integers(2), "as_of": rng.integers(3)}
        edges = edges_of(graph, **filters)
        paths = fast_paths(graph, start, cost=cost, max_hops=NUM_NODES, **filters)
        ends = rng.integers(-1, NUM_NODES + 1, size=4)
        ways = fast_path_to(paths, ends, max_nodes=NUM_NODES)
        for q in range(4):
            starts = start[q].tolist()
            np.testing.assert_array_equal(paths.distance[q], slow_paths(edges, starts, cost))
            ids = np.asarray(ways.ids[q])[np.asarray(ways.is_valid[q])].tolist()
            if ends[q] in edges and np.isfinite(paths.distance[q, ends[q]]):
                assert ids[0] in starts
                assert ids[-1] == ends[q]
                np.testing.assert_allclose(
                    cost_of(edges, ids, cost), paths.distance[q, ends[q]], atol=1e-6
                )
            else:
                assert ids == []


def test_caps():
    chain = by_hand({(n, n + 1): 0.5 for n in range(6)})
    start = jnp.array([[0]])
    paths = shortest_paths(chain, start, max_hops=3)
    np.testing.assert_array_equal(paths.distance[0, :5], [0, 0.5, 1, 1.5, np.inf])
    np.testing.assert_array_equal(paths.previous[0, :5], [12, 0, 1, 2, 12])
    assert path_to(paths, 3, max_nodes=4).ids.tolist() == [[0, 1, 2, 3]]
    assert path_to(paths, 0, max_nodes=4).ids.tolist() == [[0, 12, 12, 12]]
    for end, max_nodes in ((3, 3), (4, 4), (12, 4), (-1, 4)):
        assert not path_to(paths, end, max_nodes=max_nodes).is_valid.any()
    paths = shortest_paths(chain, start, max_hops=0)
    assert np.isfinite(paths.distance).sum() == 1


def test_cost_is_never_negative():
    graph = by_hand({(0, 1): 1.5, (1, 2): 1.0, (2, 0): 7.0})
    paths = shortest_paths(graph, jnp.array([[0]]), max_hops=12)
    np.testing.assert_array_equal(paths.distance[0, :4], [0, 0, 0, np.inf])
    np.testing.assert_array_equal(paths.previous[0, :3], [12, 0, 1])


def test_hits_are_starts():
    graph = by_hand({(0, 1): 1.0})
    hits = Hits(jnp.array([[0, 12]]), jnp.array([[0.9, 0.0]]), jnp.array([[True, False]]))
    assert k_hop(graph, hits, 1, max_nodes=3).ids.tolist() == [[0, 1, 12]]
    assert shortest_paths(graph, hits).distance[0, 1] == 0


@pytest.mark.parametrize("graph", AWKWARD)
def test_ends_on_awkward_graphs(graph):
    start = jnp.array([[0, 1], [2, 2]])
    live = np.flatnonzero(graph.is_live)
    reached = fast_k_hop(graph, start, 4, fan_out=3, max_nodes=12)
    paths = fast_paths(graph, start, cost="weight", max_hops=20)
    for q in range(2):
        ids = np.asarray(reached.ids[q])[np.asarray(reached.is_valid[q])]
        assert len(set(ids)) == len(ids)
        assert set(ids) >= set(start[q].tolist()) & set(live)
        assert set(ids) <= set(live)
        assert set(np.flatnonzero(np.isfinite(paths.distance[q]))) >= set(ids)
