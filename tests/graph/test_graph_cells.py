"""Cells: every live node in one place, searches equal to exact ones where all is probed."""

import importlib

import graph_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cells_cases import (
    KEY,
    D,
    K,
    L,
    N,
    P,
    V,
    add,
    all_alike,
    assert_sound,
    build,
    exact,
    probe,
    random_graph,
    update,
    write_all,
)  # fmt: skip
from graph_cases import random_keys

from moe_jax.graph import (
    KnowledgeGraph,
    build_cells,
    insert,
    num_missing,
    refine_cells,
    search_cells,
    update_cells,
)
from moe_jax.ops import encode, normalize

probe_module = importlib.import_module("moe_jax.graph.probe")
in_cells_module = importlib.import_module("moe_jax.ops.search.in_cells")


@pytest.mark.parametrize("first_pass", ["keys", "codes"])
def test_probing_every_cell_equals_exact_search(first_pass):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        graph = random_graph(seed)
        if first_pass == "codes":  # equal keys are no more than the first pass can hold
            graph = write_all(graph, np.asarray(normalize(rng.normal(size=(N, D)))))
        cells = build(graph)
        assert_sound(graph, cells)
        assert int(num_missing(graph, cells)) == 0
        queries = random_keys(rng, 8, D)
        options = {"k": K, "threshold": np.float32(rng.choice([-1.0, 0.3]))}
        hits = probe(graph, cells, queries, probes=L, first_pass=first_pass, **options)
        jax.tree.map(np.testing.assert_array_equal, hits, exact(graph, queries, **options))


def test_filters_are_those_of_search():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        graph = random_graph(seed)
        cells, queries = build(graph), random_keys(rng, 8, D)
        filters = {
            "expert_id": rng.integers(3, size=8),
            "kind": int(rng.integers(3)),
            "as_of": rng.integers(20, 60, size=8),
            "min_confidence": np.float32(rng.choice([0.0, 0.5], size=8)),
        }
        filters = dict(list(filters.items())[: 4 if seed % 2 else 2])
        hits = probe(graph, cells, queries, k=K, probes=L, first_pass="keys", **filters)
        jax.tree.map(np.testing.assert_array_equal, hits, exact(graph, queries, k=K, **filters))


def test_few_probes_find_what_is_in_those_cells():
    graph = random_graph(1)
    cells = build(graph)
    queries = np.random.default_rng(1).normal(size=(8, D)).astype(np.float32)
    hits = probe(graph, cells, queries, k=K, probes=2, first_pass="keys")
    for q, query in enumerate(queries):
        cosine = np.where(cells.counts > 0, np.asarray(cells.centroids) @ query, -np.inf)
        near = np.argsort(-cosine, kind="stable")[:2]
        seen = set(np.asarray(cells.members)[near].ravel()) | set(np.asarray(cells.overflow))
        unit = graph_oracle.normalize(query)
        scored = sorted((-graph_oracle.cosine(unit, np.asarray(graph.key[n])), n)
                        for n in seen - {N})  # fmt: skip
        expected = [n for _, n in scored[:K]] + [N] * (K - len(scored[:K]))
        np.testing.assert_array_equal(hits.ids[q], expected)


def test_equal_scores_go_to_the_lowest_ids():
    cells = build(all_alike())
    # Positions in another order than ids.
    cells = cells._replace(members=cells.members[::-1, ::-1], centroids=cells.centroids[::-1])
    hits = probe(all_alike(), cells, jnp.ones((8, D)), k=K, probes=L, first_pass="keys")
    np.testing.assert_array_equal(hits.ids, np.tile(np.arange(K), (8, 1)))


def changed(rng, graph, free):
    """The graph after nodes were deleted, moved and added, and the ids to tell of, some twice."""
    gone = rng.integers(-2, N + 3, size=10)  # some out of range
    live, key = np.array(graph.is_live), np.array(graph.key)
    live[gone[(gone >= 0) & (gone < N)]] = False
    moved = np.flatnonzero(live)[:2]  # slots taken over by other keys
    key[moved] = np.eye(D)[: len(moved)]
    graph = write_all(graph, key)._replace(is_live=jnp.asarray(live))
    graph, info = add(graph, random_keys(rng, 50, D), is_valid=np.arange(50) < free)
    told = rng.permutation(np.concatenate([info.node_id, gone, moved, gone]))
    return graph, np.resize(told, 80).astype(np.int32)


def test_updates_keep_up_with_a_changing_graph():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        graph = random_graph(seed)
        cells = build(graph)
        if seed == 0:  # from nothing, by cells of another graph
            graph = KnowledgeGraph.create(N, D)
        cells = update(graph, cells, np.resize(np.arange(N), 80).astype(np.int32))
        for _ in range(5):
            graph, told = changed(rng, graph, 10)
            cells = update(graph, cells, told)
            assert_sound(graph, cells)
            assert int(num_missing(graph, cells)) == 0
        queries = random_keys(rng, 8, D)
        hits = probe(graph, cells, queries, k=K, probes=L, first_pass="keys")
        jax.tree.map(np.testing.assert_array_equal, hits, exact(graph, queries, k=K))


def test_an_update_puts_nodes_where_a_build_does():
    graph = random_graph(3)
    everyone = np.resize(np.arange(N), 80).astype(np.int32)
    emptied = update(graph._replace(is_live=jnp.zeros(N, bool)), build(graph), everyone)
    assert int(emptied.counts.sum()) == 0
    assert np.all(np.asarray(emptied.overflow) == N)
    again = update(graph, emptied, everyone)
    jax.tree.map(np.testing.assert_array_equal, again, build(graph))


def test_refining_improves_stale_cells():
    rng = np.random.default_rng(0)
    keys = np.repeat(rng.normal(size=(6, D)), 10, axis=0) + 0.05 * rng.normal(size=(N, D))
    keys = np.asarray(normalize(jnp.asarray(keys, jnp.float32)))
    graph = write_all(all_alike(), keys)
    stale = build(write_all(graph, np.roll(keys, 1, axis=1)))
    stale = update(graph, stale, np.resize(np.arange(N), 80).astype(np.int32))
    refined = refine_cells(graph, stale, key=KEY, iterations=5)
    assert_sound(graph, refined)

    def fit(cells):
        place = np.asarray(cells.place)
        own = np.asarray(cells.centroids)[np.minimum(place // P, L - 1)]
        return np.mean(np.sum(own * keys, axis=1)[place < L * P])

    assert fit(refined) > fit(stale) + 0.01


def test_an_empty_graph_and_queries_without_direction():
    graph = KnowledgeGraph.create(N, D)
    cells = build(graph)
    hits = probe(graph, cells, jnp.eye(D), k=3, probes=2)
    np.testing.assert_array_equal(hits.ids, N)
    assert int(num_missing(graph, cells)) == 0
    graph = random_graph(0)
    for k in (3, N):  # N is more than the cells probed hold
        bad = jnp.array([[0.0] * D, [jnp.nan] * D, [1.0] * D])
        hits = probe(graph, build(graph), bad, k=k, probes=1)
        np.testing.assert_array_equal(hits.is_valid.any(axis=1), [False, False, True])
        assert hits.ids.shape == (3, k)
        assert bool(jnp.all(jnp.where(hits.is_valid, 0.0, hits.scores) == 0))


def test_recall_of_few_probes_on_clusters():
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(40, 16))
    points = centre[rng.integers(40, size=1064)] + 0.4 * rng.normal(size=(1064, 16))
    points = np.asarray(normalize(jnp.asarray(points, jnp.float32)))
    keys, queries = points[:1000], points[1000:]
    graph = write_all(KnowledgeGraph.create(1000, 16), keys)
    graph = graph._replace(is_live=jnp.ones(1000, bool))
    cells = build_cells(graph, 64, key=KEY, iterations=5)
    truth = np.argsort(-queries @ keys.T, axis=1)[:, :10]
    found = np.asarray(probe(graph, cells, queries, k=10, probes=16).ids)
    assert np.mean((truth[:, :, None] == found[:, None]).any(2)) > 0.95


def test_a_young_graph_has_as_few_cells_as_nodes_fill():
    rng = np.random.default_rng(0)
    keys = np.asarray(normalize(jnp.asarray(rng.normal(size=(480, 16)), jnp.float32)))
    full = write_all(KnowledgeGraph.create(2000, 16), keys)
    young = full._replace(is_live=jnp.arange(2000) < 80)
    cells = build_cells(young, key=KEY, iterations=3)
    assert (cells.num_cells, int(np.sum(np.any(cells.centroids != 0, axis=1)))) == (179, 8)
    assert int(num_missing(young, cells)) == 0
    found = np.asarray(probe(young, cells, keys[:80], k=10).ids)  # eight probes are all there are
    wanted = np.argsort(-keys[:80] @ keys[:80].T, axis=1)[:, :10]
    np.testing.assert_array_equal(np.sort(found), np.sort(wanted))

    # What comes later has a place, opens more cells, and gets them in better order by and by.
    older = full._replace(is_live=jnp.arange(2000) < 480)
    cells = update_cells(older, cells, np.arange(80, 480))
    assert int(num_missing(older, cells)) == 0
    assert np.any(cells.counts[8:] > 0)
    refined = refine_cells(older, cells, key=KEY)
    assert int(np.sum(np.any(refined.centroids != 0, axis=1))) == 43
    assert int(num_missing(older, refined)) == 0


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_the_first_pass_keeps_three_times_as_many_as_are_asked_for(implementation):
    rng = np.random.default_rng(0)
    crowd = rng.normal(size=(1, 64)) + 0.15 * rng.normal(size=(500, 64))  # codes mix them up
    keys = np.asarray(normalize(jnp.asarray(crowd, jnp.float32)))
    graph = write_all(KnowledgeGraph.create(500, 64), keys)
    graph = graph._replace(is_live=jnp.ones(500, bool))
    queries = keys[:20] + 2e-2 * rng.normal(size=(20, 64)).astype(np.float32)
    cells = build_cells(graph, 4, key=KEY, iterations=1)
    found = search_cells(graph, cells, queries, k=10, probes=4, implementation=implementation)
    unit, code = normalize(queries), encode(graph.key)
    coded = encode(unit)  # the kernels multiply codes by codes
    by_code = unit if implementation == "xla" else coded.code * coded.scale[:, None]
    by_code = np.asarray(by_code @ (code.code * code.scale[:, None]).T)
    truth, kept = np.argsort(-np.asarray(unit) @ keys.T, axis=1)[:, :10], []
    for count in (16, 32):
        best = np.argsort(-by_code, axis=1)[:, :count]
        kept.append(np.mean((truth[:, :, None] == best[:, None]).any(2)))
    recall = np.mean((truth[:, :, None] == np.asarray(found.ids)[:, None]).any(2))
    assert kept[0] + 0.01 < recall
    assert abs(recall - kept[1]) <= 0.01


def test_many_queries_are_searched_in_parts(monkeypatch):
    graph = random_graph(2)
    cells, queries = build(graph), random_keys(np.random.default_rng(2), 8, D)
    kind = np.arange(8) % 3
    whole = search_cells(graph, cells, queries, k=K, probes=L, kind=kind)
    monkeypatch.setattr(probe_module, "_CODES_AT_ONCE", 3 * (L * P + V) * D)
    jax.clear_caches()
    parts = search_cells(graph, cells, queries, k=K, probes=L, kind=kind)
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_two_stages_find_the_largest(dtype):
    rng = np.random.default_rng(0)
    for size, k in ((5000, 8), (1030, 40), (2049, 16)):
        x = rng.integers(-300, 300, size=(3, size)).astype(dtype)
        if dtype == np.float32:
            x[:, 20:] = -np.inf if size == 1030 else x[:, 20:]  # fewer than k are candidates
        values, at = jax.jit(in_cells_module._top_k, static_argnums=1)(jnp.asarray(x), k)
        np.testing.assert_array_equal(values, -np.sort(-x, axis=1)[:, :k])
        np.testing.assert_array_equal(values, np.take_along_axis(x, np.asarray(at), axis=1))
        is_real = np.asarray(values) > -np.inf
        assert all(len(set(a[m])) == m.sum() for a, m in zip(np.asarray(at), is_real, strict=True))


def test_no_gradient_flows_through():
    graph = random_graph(0)
    cells = build(graph)
    grad = jax.grad(lambda q: search_cells(graph, cells, q, k=3).scores.sum())(jnp.ones((2, D)))
    np.testing.assert_array_equal(grad, 0)


def test_wrong_calls():
    graph = random_graph(0)
    cells = build(graph)
    other = KnowledgeGraph.create(N + 1, D)
    for call, message in (
        (lambda: build_cells(graph, 0, key=KEY), "num_cells must be at least 1, got 0"),
        (lambda: build(graph, slots_per_cell=0), "slots_per_cell must be at least 1, got 0"),
        (lambda: build(graph, init="best"), "init must be 'random'.*'best'"),
        (lambda: search_cells(other, cells, jnp.eye(D)), "cells must be of a graph of 61 nodes"),
        (lambda: update_cells(other, cells, jnp.arange(2)), "cells must be of a graph of 61"),
        (lambda: refine_cells(other, cells, key=KEY), "cells must be of a graph of 61 nodes"),
        (lambda: update_cells(graph, cells, jnp.ones(2)), "node_id must be a list of integers"),
        (lambda: update_cells(graph, cells, np.array([2**32])), "node_id must fit int32"),
        (lambda: search_cells(graph, cells, jnp.eye(3)), r"queries must have shape \[rows, 4\]"),
        (lambda: search_cells(graph, cells, jnp.eye(D), k=N + 1), "k must be between 1 and 60"),
        (lambda: search_cells(graph, cells, jnp.eye(D), probes=0), "probes must be at least 1"),
        (lambda: search_cells(graph, cells, jnp.eye(D), first_pass="x"), "first_pass must be one"),
        (lambda: search_cells(graph, cells, jnp.eye(D), kind=jnp.ones(3, int)), "kind must have"),
        (
            lambda: search_cells(graph, cells, jnp.eye(D), 3, jnp.ones(D)),
            "threshold must be a scal",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_no_probe_is_spent_on_a_cell_without_members(implementation):
    """One node among many cells that are still empty, and queries on its far side."""
    dim = 64
    graph, _ = insert(KnowledgeGraph.create(256, dim), np.eye(1, dim, dtype=np.float32))
    cells = build_cells(graph, 32, key=KEY)
    queries = np.random.default_rng(0).normal(size=(16, dim)).astype(np.float32)
    hits = search_cells(graph, cells, queries, 1, probes=1, implementation=implementation)
    assert hits.is_valid.all()
