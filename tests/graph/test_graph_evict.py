"""Eviction by every policy against its oracle, and what a full graph keeps to.

More trials: `EVICT_TRIALS=2000 pytest tests/graph/test_graph_evict.py -k "oracle and oldest"`.
"""

import os

import graph_oracle
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import (
    assert_equals_oracle,
    assert_outcomes,
    random_items,
    random_threshold,
    run_insert,
    slices,
)

from moe_jax.graph import KnowledgeGraph

POLICIES = ["oldest", "least_used", "lowest_confidence"]
TRIALS = int(os.environ.get("EVICT_TRIALS", 300))
# R, N, D and the optional columns. A call may overwrite the whole graph, or its own items.
CASES = [
    (1, 6, 2, ()),
    (16, 6, 3, ("value",)),
    (16, 20, 8, ()),
    (16, 20, 2, ("time",)),
    (5, 1, 2, ()),
]


def awkward(rng, items):
    """Columns that make ties: equal times and weights, times that only grow, zeros."""
    rows = len(items["key"])
    for name, low, high in (("weight", 0, 3), ("confidence", -1, 2)):
        if rng.random() < 0.3:
            new = rng.integers(low, high, size=rows) * rng.integers(2)
            items[name] = new.astype(items[name].dtype)
    if rng.random() < 0.3:
        items["confidence"] = rng.normal(size=rows).astype(np.float32)
    if "time" in items and rng.random() < 0.7:
        items["time"] = np.sort(items["time"]) // rng.choice([1, 10, 100]).astype(np.int32)
    return items


def with_reads(rng, graph, oracle):
    """Some nodes are read between two calls."""
    reads = rng.integers(0, 3, size=graph.num_nodes) * np.asarray(graph.is_live)
    for slot, node in oracle.nodes.items():
        node["reads"] += int(reads[slot])
    return graph._replace(reads=graph.reads + reads.astype(np.int32))


def with_edges(rng, graph, oracle):
    """A few edges between any two nodes, as arrays, since no rule of linking is at stake."""
    live = sorted(oracle.nodes)
    for _ in range(2 * len(live)):
        source, target, slot = rng.choice(live), rng.choice(live), rng.integers(8)
        new = {"target": target, "weight": np.float32(rng.random()), "kind": 1, "time": 7}
        oracle.edges[source][slot] = dict(new, start=3, end=9)
    arrays = {k: jnp.asarray(v, getattr(graph, k).dtype) for k, v in oracle.arrays().items()}
    return graph._replace(**{k: v for k, v in arrays.items() if k.startswith("edge_")})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_oracle(policy, case):
    rows, num_nodes, dim, optional = case
    for seed in range(TRIALS // len(CASES)):
        rng = np.random.default_rng([seed, rows, num_nodes, dim])
        graph = KnowledgeGraph.create(num_nodes, dim)
        oracle = graph_oracle.Graph(num_nodes, dim)
        items = awkward(rng, random_items(rng, rows * 3, dim, optional))
        threshold = random_threshold(rng, items["key"])
        threshold = None if rng.random() < 0.15 else threshold
        for part in slices(items, [0, rows, 2 * rows, 3 * rows]):
            graph, info = run_insert(graph, part, threshold, policy=policy)
            assert_outcomes(info, oracle.insert(part, threshold, policy=policy))
            assert_equals_oracle(graph, oracle)
            graph = with_reads(rng, graph, oracle)
            if oracle.nodes:
                graph = with_edges(rng, graph, oracle)
