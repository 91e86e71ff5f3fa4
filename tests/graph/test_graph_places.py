"""Places in cells: nobody goes without one while there is room, however alike the keys are."""

import functools
import importlib

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
    V,
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

from moe_jax.graph import KnowledgeGraph, build_cells, num_missing, refine_cells
from moe_jax.ops import normalize

places_module = importlib.import_module("moe_jax.graph._places")

# 12 cells of 5 places and 4 more are 64 places for 60 nodes.
tight = functools.partial(
    build_cells, num_cells=12, slots_per_cell=5, overflow_slots=4, iterations=3, key=KEY
)


def crowded(seed):
    """A full graph, nine tenths of it near copies of one key, and cells that are far from alike."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(N, D))
    keys[6:] = keys[0] + 1e-3 * rng.normal(size=(N - 6, D))
    graph = write_all(all_alike(), np.asarray(normalize(jnp.asarray(keys, jnp.float32))))
    apart = normalize(jnp.asarray(rng.normal(size=(12, D)), jnp.float32))
    return graph, tight(KnowledgeGraph.create(N, D))._replace(centroids=apart)


def assert_nearest_with_room(graph, cells):
    """Every cell nearer to a node than its own is full, and four are where it has none."""
    cosine = np.asarray(graph.key) @ np.asarray(cells.centroids).T
    slots, is_full = cells.members.shape[1], np.asarray(cells.counts) == cells.members.shape[1]
    for node in np.flatnonzero(graph.is_live):
        cell = int(cells.place[node]) // slots
        order = np.argsort(-cosine[node], kind="stable")
        ahead = order[:4] if cell >= len(is_full) else order[: list(order).index(cell)]
        assert is_full[ahead].all()


@pytest.mark.parametrize("at_once", [7, 4096])
def test_nobody_goes_without_a_place_while_there_is_room(at_once, monkeypatch):
    monkeypatch.setattr(places_module, "_SEEKERS", at_once)
    jax.clear_caches()
    for seed in range(4):
        graph, cells = crowded(seed)
        found = refine_cells(graph, cells, key=KEY, iterations=0)
        assert_sound(graph, found, slots=5)
        assert_nearest_with_room(graph, found)
        assert int(num_missing(graph, found)) == 0
        np.testing.assert_array_equal(found.centroids, cells.centroids)
        again = refine_cells(graph, cells, key=KEY, iterations=0)
        jax.tree.map(np.testing.assert_array_equal, again, found)
        for part in np.random.default_rng(seed).permutation(N).reshape(3, 20).astype(np.int32):
            cells = update(graph, cells, part)
        assert_sound(graph, cells, slots=5)
        assert int(num_missing(graph, cells)) == 0
        assert_nearest_with_room(graph, cells)
        queries = random_keys(np.random.default_rng(seed), 8, D)
        hits = probe(graph, found, queries, k=K, probes=12, first_pass="keys")
        jax.tree.map(np.testing.assert_array_equal, hits, exact(graph, queries, k=K))
    jax.clear_caches()


def test_every_place_may_be_taken():
    graph = all_alike()
    cells = tight(graph, overflow_slots=1, num_cells=12)  # 61 places
    assert int(num_missing(graph, cells)) == 0
    cells = build(graph, slots_per_cell=11, overflow_slots=5)
    assert_sound(graph, cells, slots=11)
    assert int(num_missing(graph, cells)) == 0
    assert int(cells.members.max()) < N
    assert int(cells.overflow.max()) < N


def test_nodes_without_a_cell_open_unused_ones():
    graph = random_graph(4)
    cells = tight(KnowledgeGraph.create(N, D))
    cells = update(graph, cells, np.arange(20, dtype=np.int32))
    live = np.flatnonzero(graph.is_live)
    live = live[live < 20]
    opened = live[4:16]  # four are in the overflow list, twelve open cells
    np.testing.assert_array_equal(cells.centroids, np.asarray(graph.key)[opened])
    assert_sound(graph, cells, slots=5)
    assert int(cells.counts.min()) >= 1
    assert int(cells.counts.sum()) == len(live) - 4
    queries = graph.key[opened]
    hits = probe(graph, cells, queries, k=1, probes=1, first_pass="keys")
    np.testing.assert_allclose(hits.scores, 1.0, atol=1e-6)


def test_what_has_no_place_is_counted_and_gets_one_later():
    graph, everyone = all_alike(), np.resize(np.arange(N), 80).astype(np.int32)
    cells = build(KnowledgeGraph.create(N, D), slots_per_cell=8)
    cells = update(graph, cells, everyone)
    assert_sound(graph, cells, slots=8)
    assert cells.counts.tolist() == [8] * L
    assert int(num_missing(graph, cells)) == N - 8 * L - V
    graph = graph._replace(is_live=jnp.arange(N) >= 50)
    cells = update(graph, cells, everyone)
    assert_sound(graph, cells, slots=8)
    assert int(num_missing(graph, cells)) == 0
