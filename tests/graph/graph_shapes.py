"""Small graphs written by hand, and the awkward shapes that every walk must end on."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.graph import KnowledgeGraph

NUM_NODES, DIM, NUM_EDGE_SLOTS = 12, 4, 3


def by_hand(edges, live=range(NUM_NODES)):
    """A graph with the edges of a dict from (source, target) to weight, or to (weight, kind)."""
    graph = KnowledgeGraph.create(NUM_NODES, DIM, num_edge_slots=NUM_EDGE_SLOTS)
    target = np.full((NUM_NODES, NUM_EDGE_SLOTS), NUM_NODES)
    weight, kind = np.zeros(target.shape), np.zeros(target.shape, int)
    used = np.zeros(NUM_NODES, int)
    for (source, end), value in edges.items():
        slot = used[source]
        target[source, slot] = end
        weight[source, slot], kind[source, slot] = value if isinstance(value, tuple) else (value, 0)
        used[source] += 1
    key = np.random.default_rng(0).normal(size=(NUM_NODES, DIM))
    is_live = np.isin(np.arange(NUM_NODES), list(live))
    key = key / np.linalg.norm(key, axis=1, keepdims=True) * is_live[:, None]
    return graph._replace(
        key=jnp.asarray(key, jnp.float32),
        is_live=jnp.asarray(is_live),
        edge_target=jnp.asarray(target, jnp.int32),
        edge_weight=jnp.asarray(weight, jnp.float32),
        edge_kind=jnp.asarray(kind, jnp.int32),
    )


def random_graph(rng):
    """Hubs, ties, self loops, edges of several kinds, edges to and from free slots."""
    graph = by_hand({}, np.flatnonzero(rng.random(NUM_NODES) < 0.85))
    shape = (NUM_NODES, NUM_EDGE_SLOTS)
    target = rng.integers(NUM_NODES, size=shape)
    target[rng.random(shape) < 0.3] = 1
    target[rng.random(shape) < rng.choice([0.2, 0.7])] = NUM_NODES
    return graph._replace(
        edge_target=jnp.asarray(target, jnp.int32),
        edge_weight=jnp.asarray(rng.choice([0.25, 0.5, 0.7, 1.0, 1.5, -0.5], size=shape), "f4"),
        edge_kind=jnp.asarray(rng.integers(2, size=shape), jnp.int32),
        edge_start=jnp.asarray(rng.integers(3, size=shape), jnp.int32),
    )


def edges_of(graph, kind=None, as_of=None):
    """{source: [(target, weight), ...]} in slot order, for live nodes."""
    graph = KnowledgeGraph(*map(np.asarray, graph))
    out = {int(n): [] for n in np.flatnonzero(graph.is_live)}
    for source, slot in np.argwhere(graph.edge_target < len(graph.is_live)):
        target = int(graph.edge_target[source, slot])
        wanted = kind is None or graph.edge_kind[source, slot] == kind
        if as_of is not None:
            first = max(graph.edge_start[source, slot], graph.edge_time[source, slot])
            wanted &= first <= as_of <= graph.edge_end[source, slot]
        if int(source) in out and target in out and wanted:
            out[int(source)].append((target, graph.edge_weight[source, slot]))
    return out


def networkx_rank(graph, start, weighted=True, damping=0.85, **filters):
    """PageRank by NetworkX; edges of one pair count together."""
    nx = pytest.importorskip("networkx")
    edges = edges_of(graph, **filters)
    theirs = nx.DiGraph()
    theirs.add_nodes_from(edges)
    for source, ends in edges.items():
        for target, weight in ends:
            weight = float(weight) if weighted else 1.0
            if weight > 0:
                before = theirs.get_edge_data(source, target, {"weight": 0.0})["weight"]
                theirs.add_edge(source, target, weight=before + weight)
    start = None if start is None else {n: float(start[n]) for n in edges}
    rank = nx.pagerank(theirs, damping, start, max_iter=2000, tol=1e-12)
    return np.array([rank.get(n, 0.0) for n in range(NUM_NODES)])


def _full():
    rng = np.random.default_rng(1)
    graph = by_hand({})
    others = np.stack([rng.permutation(NUM_NODES)[:NUM_EDGE_SLOTS] for _ in range(NUM_NODES)])
    return graph._replace(
        edge_target=jnp.asarray(others, jnp.int32),
        edge_weight=jnp.ones(others.shape),
    )


AWKWARD = [
    pytest.param(by_hand({(0, 1): 1.0, (1, 0): 1.0}), id="two nodes pointing at each other"),
    pytest.param(KnowledgeGraph.create(NUM_NODES, DIM, num_edge_slots=NUM_EDGE_SLOTS), id="empty"),
    pytest.param(_full(), id="full"),
    pytest.param(by_hand({(0, 0): 1.0, (0, 1): 1.0, (1, 1): 1.0, (2, 2): 0.5}), id="self-loops"),
]
