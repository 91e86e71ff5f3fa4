"""PageRank near the seeds: against all of it, a slow version, NetworkX and itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_shapes import AWKWARD, NUM_NODES, by_hand, edges_of, networkx_rank, random_graph

from moe_jax.graph import Hits, local_pagerank, pagerank

SIZES = ("damping", "weighted", "tol", "max_iterations")
fast_local = jax.jit(local_pagerank, static_argnames=("max_nodes", "hops", *SIZES))
fast_pagerank = jax.jit(pagerank, static_argnames=SIZES)


def spread_out(found, q=0):
    """The rank of all nodes."""
    rank = np.zeros(NUM_NODES)
    ids = np.asarray(found.ids[q])
    is_node = ids < NUM_NODES
    assert len(set(ids[is_node])) == is_node.sum()
    np.testing.assert_array_equal(ids, np.sort(ids))
    np.testing.assert_array_equal(found.rank[q][~is_node], 0.0)
    rank[ids[is_node]] = found.rank[q][is_node]
    return rank


def random_seeds(rng):
    """Seeds of three queries: copies, nodes that are not live, weights that do not count."""
    ids = rng.integers(-1, NUM_NODES + 2, size=(3, 4)).astype(np.int32)
    weight = rng.random((3, 4)) * (rng.random((3, 4)) < 0.8)
    weight[rng.random((3, 4)) < 0.1] = rng.choice([np.nan, np.inf, -1.0])
    return ids, weight.astype(np.float32)


def random_filters(rng):
    return rng.choice([{}, {"kind": rng.integers(2), "as_of": rng.integers(3)}])


@pytest.mark.parametrize("weighted", [True, False])
def test_with_room_for_all_it_is_the_pagerank(weighted):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        graph, seeds, filters = random_graph(rng), random_seeds(rng), random_filters(rng)
        options = {"weighted": weighted, **filters}
        found = fast_local(graph, seeds, max_nodes=NUM_NODES, **options)
        whole = fast_pagerank(graph, personalization=seeds, **options)
        np.testing.assert_array_equal(found.num_left_out, 0)
        np.testing.assert_allclose(found.lost, 0.0, atol=2e-6)
        for q in range(3):
            np.testing.assert_allclose(spread_out(found, q), whole[q], rtol=0, atol=1e-6)
            if whole[q].any():
                start = np.zeros(NUM_NODES)
                for n, w in zip(*(x[q] for x in seeds), strict=True):
                    if 0 <= n < NUM_NODES and w > 0 and np.isfinite(w):
                        start[n] += w
                expected = networkx_rank(graph, start, weighted, **filters)
                np.testing.assert_allclose(spread_out(found, q), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 2, 4])
def test_as_many_hops_as_steps_are_enough(steps):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        graph, seeds = random_graph(rng), random_seeds(rng)
        options = {"tol": 0.0, "max_iterations": steps}
        found = fast_local(graph, seeds, max_nodes=NUM_NODES, hops=steps, **options)
        whole = fast_pagerank(graph, personalization=seeds, **options)
        for q in range(3):
            np.testing.assert_allclose(spread_out(found, q), whole[q], rtol=0, atol=1e-6)


def slow_local(edges, ids, weight, max_nodes, hops, damping, steps):
    """(rank by node, how many were left out, what was lost), by the definition."""
    shares = {}
    for n, ends in edges.items():
        w = np.array([max(w, 0) for _, w in ends], np.float32)
        total = w.sum() or np.float32(1)
        shares[n] = [(t, x / total) for (t, _), x in zip(ends, w, strict=True) if x > 0]
    start = {}
    offers = {}
    for n, w in zip(ids.tolist(), weight, strict=True):
        if n in edges and w > 0 and np.isfinite(w):
            start[n] = start.get(n, 0.0) + float(w)
            offers[n] = max(offers.get(n, 0), w)
    kept, num_left_out = {}, 0
    for _ in range(hops + 1):
        best = sorted(offers, key=lambda n: (-offers[n], n))
        taken = {n: offers[n] for n in best[: max_nodes - len(kept)]}
        kept |= taken
        num_left_out = len(offers) - len(taken)
        if num_left_out:
            break
        offers = {}
        for n, strength in taken.items():
            for t, share in shares[n]:
                if t not in kept:
                    offers[t] = max(offers.get(t, 0), strength * share)
    whole = sum(start.values()) or 1.0
    start = {n: w / whole for n, w in start.items()}
    arriving = {n: (1 - damping) * start.get(n, 0.0) for n in kept}
    rank = dict(arriving)
    lost = now = 0.0
    for _ in range(steps):
        moved, out = dict.fromkeys(kept, 0.0), 0.0
        for n, mass in arriving.items():
            for t, share in shares[n] or start.items():
                if t in kept:
                    moved[t] += damping * mass * float(share)
                else:
                    out += damping * mass * float(share)
        now = damping * now + out
        lost += now
        arriving = moved
        rank = {n: rank[n] + moved[n] for n in kept}
    return rank, num_left_out, lost


@pytest.mark.parametrize(("max_nodes", "hops"), [(4, 1), (6, None), (7, 2)])
def test_without_room_for_all_it_equals_the_slow_one(max_nodes, hops):
    steps, num_cut = 6, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        graph, (ids, weight), filters = random_graph(rng), random_seeds(rng), random_filters(rng)
        found = fast_local(
            graph, (ids, weight), max_nodes=max_nodes, hops=hops, tol=0.0,
            max_iterations=steps, **filters,
        )  # fmt: skip
        edges = edges_of(graph, **filters)
        for q in range(3):
            rank, left_out, lost = slow_local(
                edges, ids[q], weight[q], max_nodes, steps if hops is None else hops, 0.85, steps
            )
            assert set(np.asarray(found.ids[q]).tolist()) - {NUM_NODES} == set(rank)
            assert found.num_left_out[q] == left_out
            np.testing.assert_allclose(found.lost[q], lost, rtol=0, atol=2e-6)
            expected = np.array([rank.get(n, 0.0) for n in range(NUM_NODES)])
            np.testing.assert_allclose(spread_out(found, q), expected, rtol=0, atol=1e-6)
            num_cut += left_out > 0
    assert num_cut > 0


def test_what_is_lost_bounds_the_error():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        graph, seeds = random_graph(rng), random_seeds(rng)
        found = fast_local(graph, seeds, max_nodes=6, hops=None, tol=0.0, max_iterations=6)
        whole = fast_pagerank(graph, personalization=seeds, tol=0.0, max_iterations=6)
        for q in range(3):
            short = np.asarray(whole[q]) - spread_out(found, q)
            assert short.min() > -1e-6
            assert short.max() < found.lost[q] + 2e-6


def test_long_ways():
    chain = by_hand({(n, n + 1): 0.5 for n in range(11)})
    seeds = (jnp.array([[0]]), jnp.array([[1.0]]))
    for hops in (0, 4, 20):
        found = local_pagerank(chain, seeds, max_nodes=11, hops=hops)
        assert found.ids[0].tolist() == [*range(min(hops + 1, 11)), *[12] * (10 - hops)]
        assert found.num_left_out.tolist() == [int(hops == 20)]
        assert found.lost[0] > 0.1
    hits = Hits(*seeds, jnp.array([[True]]))
    jax.tree.map(
        np.testing.assert_array_equal, local_pagerank(chain, hits, max_nodes=11, hops=20), found
    )


@pytest.mark.parametrize("graph", AWKWARD)
def test_ends_on_awkward_graphs(graph):
    seeds = (jnp.array([[0, 1, 1, 1], [2, 2, 3, 4], [5, 6, 7, 12]]), jnp.ones((3, 4)))
    found = fast_local(graph, seeds, max_nodes=NUM_NODES, weighted=True)
    whole = fast_pagerank(graph, personalization=seeds, weighted=True)
    for q in range(3):
        np.testing.assert_allclose(spread_out(found, q), whole[q], rtol=0, atol=1e-6)
    few = fast_local(graph, seeds, max_nodes=4)
    assert np.isfinite(few.rank).all()
    assert (few.rank.sum(axis=1) + few.lost < 1.0 + 1e-6).all()


def test_wrong_calls():
    graph = by_hand({})
    seeds = (jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3)))
    for options, message in (
        ({"max_nodes": 2}, r"max_nodes must be at least 3 \(seeds\), got 2"),
        ({"hops": -1}, "hops must not be negative, got -1"),
        ({"damping": 1.0}, "damping must be at least 0 and below 1, got 1.0"),
        ({"kind": jnp.zeros(2, jnp.int32)}, r"kind must have shape \(1,\), got \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            local_pagerank(graph, seeds, **options)
