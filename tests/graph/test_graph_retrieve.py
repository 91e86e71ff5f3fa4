"""Retrieval by graph: what it finds, what it falls back on, and where it ends."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_shapes import AWKWARD, NUM_NODES, by_hand, edges_of, random_graph

from moe_jax.graph import KnowledgeGraph, incoming_edges, insert, link, retrieve, search

STATIC = ("k", "seeds", "sharpness", "damping", "iterations", "max_nodes", "hops")
fast_retrieve = jax.jit(retrieve, static_argnames=STATIC)


def slow_retrieve(graph, query, k, seeds, mix):
    """{node: score} of the k best, by the definition."""
    key, query = np.asarray(graph.key, float), query / np.linalg.norm(query)
    cosine = key @ query
    found = search(graph, query[None], max(seeds, k), 0.0)
    listed = [int(n) for n in found.ids[0] if n < NUM_NODES]
    start = np.zeros(NUM_NODES)
    for n in listed[:seeds]:
        start[n] = cosine[n] ** 8
    start /= start.sum() or 1.0
    received, arriving = np.zeros(NUM_NODES), 0.5 * start
    for _ in range(8):
        moved = np.zeros(NUM_NODES)
        for source, ends in edges_of(graph).items():
            total = sum(max(weight, 0.0) for _, weight in ends)
            for target, weight in ends:
                moved[target] += arriving[source] * max(weight, 0.0) / (total or 1.0)
            if total == 0.0:
                moved += arriving[source] * start
        arriving = 0.5 * moved
        received += arriving
    most = received.max() or 1.0
    reached = np.argsort(-received, kind="stable")[: k + seeds]
    nodes = set(listed) | set(reached[received[reached] > 0].tolist())
    score = {n: mix * received[n] / most + (1 - mix) * cosine[n] for n in nodes}
    return dict(sorted(score.items(), key=lambda item: -item[1])[:k])


def test_no_power_of_a_small_cosine_vanishes():
    graph, _ = insert(KnowledgeGraph.create(3, 4), np.eye(4, dtype=np.float32)[:3])
    graph, _ = link(graph, np.array([0]), np.array([2]), weight=1.0)
    query = np.array([[0.2, 0.0, 0.0, 0.98]])
    assert retrieve(graph, query, 3, sharpness=60.0).ids.tolist() == [[2, 0, 1]]


def test_a_walk_of_the_whole_graph_takes_queries_in_blocks(monkeypatch):
    graph = random_graph(np.random.default_rng(3))
    queries = np.random.default_rng(4).normal(size=(5, graph.dim)).astype(np.float32)
    find = functools.partial(retrieve, graph, queries, 4, max_nodes=None)
    whole, module = find(), importlib.import_module("moe_jax.graph.retrieve")
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 2 * graph.edge_target.size)
    module._retrieve.clear_cache()
    found = find()
    module._retrieve.clear_cache()
    for ours, theirs in zip(found, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("max_nodes", [None, NUM_NODES - 1])
@pytest.mark.parametrize(("k", "seeds"), [(4, 2), (12, 3)])
def test_equals_the_definition(k, seeds, max_nodes):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng)
        if max_nodes is not None:  # so that all live nodes fit
            graph = graph._replace(is_live=graph.is_live.at[-1].set(False))
        queries = rng.normal(size=(3, 4)).astype(np.float32)
        mix = np.float32(rng.choice([0.0, 0.5, 0.8, 1.0]))
        hits = fast_retrieve(graph, queries, k=k, seeds=seeds, mix=mix, max_nodes=max_nodes)
        for q in range(3):
            expected = slow_retrieve(graph, queries[q], k, seeds, float(mix))
            valid = np.asarray(hits.is_valid[q])
            ids, scores = np.asarray(hits.ids[q]), np.asarray(hits.scores[q])
            assert valid.sum() == len(expected)
            np.testing.assert_allclose(scores[valid], list(expected.values()), atol=1e-4)
            assert len(set(ids[valid])) == valid.sum()
            for n, score in zip(ids[valid], scores[valid], strict=True):
                if n in expected:  # near ties may fall on either side of the last place
                    np.testing.assert_allclose(score, expected[n], atol=1e-4)
            np.testing.assert_array_equal(ids[~valid], NUM_NODES)
            np.testing.assert_array_equal(scores[~valid], 0.0)


def test_finds_what_cosine_cannot():
    graph = by_hand({(0, 1): 1.0, (1, 2): 1.0})
    key = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0].astype(np.float32)
    graph = graph._replace(
        key=jnp.zeros((NUM_NODES, 4)).at[:4].set(key),
        is_live=jnp.arange(NUM_NODES) < 4,
    )
    query = key[:1] + 0.2 * key[3:4]
    by_cosine = search(graph, query, 4, 0.1)
    assert by_cosine.ids.tolist() == [[0, 3, 12, 12]]
    hits = retrieve(graph, query, 4, threshold=0.1)
    assert hits.ids.tolist() == [[1, 2, 0, 3]]
    assert retrieve(graph, query, 4, threshold=0.1, kind=5).ids.tolist() == [[0, 3, 12, 12]]
    assert retrieve(graph, query, 4, threshold=0.1, mix=0.0).ids[0, :2].tolist() == [0, 3]
    near = {"threshold": 0.1, "seeds": 2, "max_nodes": 5}
    assert retrieve(graph, query, 4, **near).ids.tolist() == [[1, 2, 0, 3]]
    assert retrieve(graph, query, 4, hops=1, **near).ids.tolist() == [[1, 0, 3, 12]]
    assert retrieve(graph, query, 4, kind=5, **near).ids.tolist() == [[0, 3, 12, 12]]
    assert retrieve(graph, query, 4, as_of=-1, **near).ids.tolist() == [[12] * 4]


def test_without_edges_it_is_a_search():
    graph = by_hand({})
    queries = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    hits, plain = retrieve(graph, queries, 6, mix=0.0), search(graph, queries, 6, 0.0)
    jax.tree.map(np.testing.assert_array_equal, hits, plain)


def test_a_query_is_the_same_bits_alone_and_among_others():
    rng = np.random.default_rng(2)
    graph = random_graph(rng)
    queries = rng.normal(size=(5, 4)).astype(np.float32)
    edges = incoming_edges(graph)
    for options, fewer in (({"edges": edges}, {}), ({"max_nodes": 9}, {"max_nodes": 9})):
        whole = fast_retrieve(graph, queries, k=5, **options)
        for q in range(5):
            alone = fast_retrieve(graph, queries[q : q + 1], k=5, **fewer)
            jax.tree.map(lambda a, b, q=q: np.testing.assert_array_equal(a[0], b[q]), alone, whole)


@pytest.mark.parametrize("max_nodes", [None, 9])
@pytest.mark.parametrize("graph", AWKWARD)
def test_ends_on_awkward_graphs(graph, max_nodes):
    queries = np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32)
    queries[2] = 0.0
    hits = fast_retrieve(graph, queries, k=5, max_nodes=max_nodes)
    assert np.isfinite(hits.scores).all()
    np.testing.assert_array_equal(hits.is_valid[:2].any(axis=1), bool(graph.is_live.any()))
    assert not hits.is_valid[2].any()
