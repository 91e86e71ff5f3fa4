"""The same stream as the original system, item by item, gives the same memory."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.graph import KnowledgeGraph, insert, link_similar, neighbours, search

FOLDER = Path(os.environ.get("MOE_JAX_GOLDEN", "../shared/golden"))
FILE = Path(__file__).parents[2] / FOLDER / "graph.npz"


@pytest.fixture(scope="module")
def golden():
    if not FILE.is_file():
        pytest.skip(f"the original's numbers are not here: {FILE}")
    with np.load(FILE) as file:
        return dict(file)


@pytest.fixture(scope="module")
def memory(golden):
    """The graph after the stream, and the node of each item."""
    stream = golden["stream"]
    num_edges = len(golden["edge_index"])
    graph = KnowledgeGraph.create(len(stream), stream.shape[1], num_edge_slots=num_edges)

    def step(graph, item):
        graph, info = insert(
            graph,
            item[None],
            merge_rule="ema",
            ema_decay=1.0 - golden["merge_alpha"].item(),
            merge_threshold=golden["merge_threshold"].item(),
        )
        graph, _ = link_similar(
            graph,
            info.node_id,
            queries=item[None],
            k=golden["link_top_k"].item(),
            threshold=golden["link_threshold"].item(),
            on_duplicate="append",
        )
        return graph, info.node_id[0]

    return jax.lax.scan(step, graph, jnp.asarray(stream))


def test_nodes(golden, memory):
    graph, node_ids = memory
    np.testing.assert_array_equal(node_ids, golden["node_ids"])
    num_live = len(golden["node_embeddings"])
    assert int(graph.num_live) == num_live
    np.testing.assert_allclose(graph.key[:num_live], golden["node_embeddings"], atol=1e-4)


def test_edges_in_order(golden, memory):
    graph, _ = memory
    edges = jax.tree.map(np.asarray, neighbours(graph, jnp.arange(graph.num_nodes)))
    source, slot = np.nonzero(edges.is_valid)
    # All edges of one moment leave one node, whose slots fill in order.
    order = np.lexsort((slot, edges.time[source, slot]))
    source, slot = source[order], slot[order]
    pairs = np.stack([source, edges.ids[source, slot]], axis=1)
    np.testing.assert_array_equal(pairs, golden["edge_index"])
    np.testing.assert_allclose(edges.weight[source, slot], golden["edge_weight"], atol=1e-4)


def test_hits(golden, memory):
    hits = search(memory[0], golden["queries"], k=golden["hit_ids"].shape[1])
    np.testing.assert_array_equal(hits.ids, golden["hit_ids"])
    np.testing.assert_allclose(hits.scores, golden["hit_scores"], atol=1e-4)
