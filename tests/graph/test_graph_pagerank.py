"""Personalised PageRank against NetworkX, and bit for bit against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_shapes import AWKWARD, NUM_NODES, by_hand, networkx_rank, random_graph

from moe_jax.graph import Hits, incoming_edges, pagerank

fast_pagerank = jax.jit(pagerank, static_argnames=("damping", "weighted", "tol", "max_iterations"))


@pytest.mark.parametrize("weighted", [True, False])
def test_equals_networkx(weighted):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        graph = random_graph(rng)
        start = rng.random((3, NUM_NODES)) * (rng.random((3, NUM_NODES)) < 0.4)
        start[:, np.flatnonzero(graph.is_live)[0]] += 0.1
        filters = {} if seed % 2 else {"kind": rng.integers(2), "as_of": rng.integers(3)}
        rank = fast_pagerank(
            graph, personalization=start.astype(np.float32), weighted=weighted, **filters
        )
        for q in range(3):
            expected = networkx_rank(graph, start[q], weighted, **filters)
            np.testing.assert_allclose(rank[q], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("graph", AWKWARD)
def test_ends_on_awkward_graphs(graph):
    rank = fast_pagerank(graph)
    assert rank.shape == (1, NUM_NODES)
    if graph.is_live.any():
        np.testing.assert_allclose(rank[0], networkx_rank(graph, None), rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(rank, 0.0)


def large(rng):
    """A graph whose sums are long: node 0 is a hub, some nodes dangle."""
    graph = by_hand({})
    nodes, slots = 600, 4
    target = rng.integers(nodes, size=(nodes, slots))
    target[:, 0] = np.where(rng.random(nodes) < 0.7, 0, nodes)
    target[rng.random(nodes) < 0.2] = nodes
    return graph._replace(
        key=jnp.zeros((nodes, 4)),
        is_live=jnp.ones(nodes, bool),
        edge_target=jnp.asarray(target, jnp.int32),
        edge_weight=jnp.asarray(rng.random((nodes, slots)), jnp.float32),
        edge_kind=jnp.zeros((nodes, slots), jnp.int32),
    )


def test_a_query_is_the_same_bits_alone_and_among_others():
    rng = np.random.default_rng(0)
    edges = incoming_edges(large(rng))
    start = rng.random((5, 600)).astype(np.float32)
    whole = fast_pagerank(edges, personalization=start)
    np.testing.assert_allclose(whole.sum(axis=1), 1.0, atol=1e-5)
    for q in range(5):
        alone = fast_pagerank(edges, personalization=start[q : q + 1])
        np.testing.assert_array_equal(alone[0], whole[q])


def test_seeds_may_be_ids_and_weights_or_hits():
    graph = random_graph(np.random.default_rng(3))
    ids = jnp.array([[4, 0, 4, 12, -1, 2], [1, 12, 12, 12, 12, 12]])
    weight = jnp.array([[0.5, 0.25, 0.5, 9.0, 9.0, np.nan], [-1.0, 0, 0, 0, 0, 0]])
    start = np.zeros((2, NUM_NODES))
    start[0, 4], start[0, 0] = 1.0, 0.25
    expected = pagerank(graph, personalization=start)
    np.testing.assert_array_equal(pagerank(graph, personalization=(ids, weight)), expected)
    hits = Hits(ids, weight, ids < 12)
    np.testing.assert_array_equal(pagerank(graph, personalization=hits), expected)
    np.testing.assert_array_equal(expected[1], 0.0)


def test_caps_and_tolerance():
    graph = by_hand({(0, 1): 1.0, (1, 0): 1.0})
    start = jnp.zeros((1, NUM_NODES)).at[0, 0].set(1.0)
    rank = pagerank(graph, personalization=start, damping=0.5, max_iterations=2)
    np.testing.assert_array_equal(rank[0, :2], [0.625, 0.25])
    for tol in (0.1, 1e-3):
        left = 1.0 - pagerank(graph, personalization=start, damping=0.5, tol=tol).sum()
        assert tol / 4 < left <= tol
    for options in ({"damping": 0.0}, {"max_iterations": 0, "damping": 0.0}):
        np.testing.assert_array_equal(pagerank(graph, personalization=start, **options), start)


def test_weights_of_any_size():
    huge = by_hand({(0, 1): 3e38, (0, 2): 3e38, (0, 3): -1.0})
    rank = pagerank(huge, personalization=(jnp.array([[0]]), jnp.array([[3e38]])))
    np.testing.assert_allclose(rank[0, 1], rank[0, 2])
    np.testing.assert_allclose(rank.sum(), 1.0, atol=1e-6)
    assert rank[0, 3] == 0.0
