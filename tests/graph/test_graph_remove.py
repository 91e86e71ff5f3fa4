"""Deletion, expiry, compaction and counted reads against dicts."""

import graph_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import assert_equals_oracle, assert_identical, filled

from moe_jax.graph import (
    FOREVER,
    KnowledgeGraph,
    compact,
    delete,
    expire,
    insert,
    link,
    record_reads,
    search,
)


def linked(seed, rows=12):
    """A graph of 10 slots and its oracle, with edges of all ages between nodes."""
    rng = np.random.default_rng(seed)
    graph, oracle = filled(rng, 10, 3, rows, num_edge_slots=3)
    live = sorted(oracle.nodes)
    for _ in range(3 * len(live)):
        source, target = rng.choice(live, size=2)
        edge = {"target": target, "weight": np.float32(rng.random()), "kind": 2, "time": 4}
        edge.update(start=0, end=int(rng.choice([1, 5, 9, FOREVER])))
        oracle.edges[source][rng.integers(3)] = edge
    arrays = oracle.arrays()
    edges = {
        name: jnp.asarray(x, getattr(graph, name).dtype)
        for name, x in arrays.items()
        if name.startswith("edge_")
    }
    return rng, graph._replace(**edges), oracle


FILTERS = {
    "node_id": lambda rng: rng.integers(-2, 13, size=4),
    "expert_id": lambda rng: rng.integers(3),
    "kind": lambda rng: rng.integers(3, size=2),
    "created_before": lambda rng: rng.integers(13),
    "updated_before": lambda rng: rng.integers(13),
    "below_confidence": lambda rng: np.float32(rng.choice([0.0, 0.5, 0.6, 2.0])),
    "is_node": lambda rng: rng.random(10) < 0.5,
}


def matches(slot, node, name, value):
    if name == "node_id":
        return slot in value
    if name == "is_node":
        return bool(value[slot])
    if name == "below_confidence":
        return node["confidence"] < value
    if name.endswith("_before"):
        return node[name.removesuffix("_before")] < value
    return node[name] in np.atleast_1d(value)


def test_delete_equals_oracle():
    names = list(FILTERS)
    pairs = [(name,) for name in names] + [("kind", "updated_before"), ("node_id", "is_node")]
    for seed in range(36):
        rng, graph, oracle = linked(seed)
        chosen = {name: FILTERS[name](rng) for name in pairs[seed % len(pairs)]}
        graph, count = delete(graph, **chosen)
        before = dict(oracle.nodes)
        for slot, node in before.items():
            if all(matches(slot, node, name, value) for name, value in chosen.items()):
                oracle.remove(slot)
        assert int(count) == len(before) - len(oracle.nodes)
        assert_equals_oracle(graph, oracle)


def test_what_is_deleted_leaves_no_trace():
    _, graph, oracle = linked(3)
    graph, count = delete(graph, is_node=np.ones(10, bool))
    assert int(count) == len(oracle.nodes) > 3
    fresh = KnowledgeGraph.create(10, 3, num_edge_slots=3)
    counters = ("clock", "num_updates", "num_merged", "num_rejected", "num_evicted")
    assert_identical(graph, fresh._replace(**{name: getattr(graph, name) for name in counters}))


def test_expire_equals_oracle():
    for seed in range(30):
        rng, graph, oracle = linked(seed)
        ttl, now = int(rng.integers(12)), rng.choice([None, 3, 8, 30])
        graph, count = expire(graph, ttl, now=now)
        now = oracle.clock if now is None else now
        gone = [slot for slot, node in oracle.nodes.items() if now - node["updated"] > ttl]
        for slot in gone:
            oracle.remove(slot)
        for row in oracle.edges.values():
            row[:] = [None if edge is None or edge["end"] < now else edge for edge in row]
        assert int(count) == len(gone)
        assert_equals_oracle(graph, oracle)


def test_nothing_expires_at_the_ends_of_time():
    graph, _ = insert(KnowledgeGraph.create(3, 2), jnp.eye(2), time=jnp.array([0, FOREVER]))
    after, count = expire(graph, FOREVER)
    assert int(count) == 0
    assert_identical(after, graph)
    after, count = expire(graph, FOREVER - 1)
    assert (int(count), after.is_live.tolist()) == (1, [False, True, False])


def test_compact_equals_oracle():
    for seed in range(20):
        rng, graph, oracle = linked(seed)
        gone = rng.random(10) < rng.choice([0.0, 0.4, 1.0])
        graph, _ = delete(graph, is_node=gone)
        for slot in np.flatnonzero(gone):
            if slot in oracle.nodes:
                oracle.remove(slot)
        # A free slot's value may be anything; a compact graph is as if just made.
        graph = graph._replace(value=jnp.where(graph.is_live[:, None], graph.value, 7.0))
        graph, new_id = compact(graph)
        names = {old: new for new, old in enumerate(sorted(oracle.nodes))}
        np.testing.assert_array_equal(new_id, [names.get(slot, 10) for slot in range(10)])
        moved = graph_oracle.Graph(10, 3, 3)
        for old, new in names.items():
            moved.nodes[new] = oracle.nodes[old]
            moved.edges[new] = [
                e and {**e, "target": names[e["target"]]} for e in oracle.edges[old]
            ]
        for name in ("clock", "num_updates", "num_merged", "num_rejected", "num_evicted"):
            setattr(moved, name, getattr(oracle, name))
        assert_equals_oracle(graph, moved)


def test_a_compacted_graph_finds_the_same():
    rng, graph, _ = linked(5)
    graph, _ = delete(graph, node_id=np.array([1, 2]))
    queries = rng.normal(size=(4, 3)).astype(np.float32)
    before, (after, new_id) = search(graph, queries, k=3), compact(graph)
    hits = search(after, queries, k=3)
    np.testing.assert_array_equal(hits.scores, before.scores)
    names = np.append(new_id, 10)
    np.testing.assert_array_equal(hits.ids, names[np.asarray(before.ids)])


def test_reads_are_counted():
    graph, _ = insert(KnowledgeGraph.create(5, 3), np.eye(3, dtype=np.float32))
    ids = np.array([[0, 1, 1], [4, 5, -1]])  # a free slot, none, and none
    graph = record_reads(graph, ids)
    np.testing.assert_array_equal(graph.reads, [1, 2, 0, 0, 0])
    graph = record_reads(graph, ids, is_valid=np.array([[False, True, False]] * 2))
    np.testing.assert_array_equal(graph.reads, [1, 3, 0, 0, 0])
    hits = search(graph, np.eye(3, dtype=np.float32)[:2], k=2, threshold=0.5)
    graph = record_reads(graph, hits)
    np.testing.assert_array_equal(graph.reads, [2, 4, 0, 0, 0])
    graph = record_reads(graph, hits, is_valid=np.array([[False, True], [True, True]]))
    np.testing.assert_array_equal(graph.reads, [2, 5, 0, 0, 0])
    graph = graph._replace(reads=graph.reads.at[0].set(FOREVER - 1))
    graph = record_reads(graph, np.array([0, 0, 0]))
    assert int(graph.reads[0]) == FOREVER


def test_a_deleted_slot_is_used_again():
    graph, _ = insert(KnowledgeGraph.create(3, 3), np.eye(3, dtype=np.float32))
    graph, _ = link(graph, np.array([0, 1]), np.array([1, 2]))
    graph, _ = delete(graph, node_id=1)
    graph, info = insert(graph, np.array([[-1.0, 0.0, 0.0]]))
    assert int(info.node_id[0]) == 1
    np.testing.assert_array_equal(graph.edge_target, 3)


WRONG = [
    (lambda g: delete(g), "one of node_id, expert_id, .*is_node must be given"),
    (
        lambda g: delete(g, kind=np.zeros((1, 2), int)),
        r"kind must be one value or a list.*\(1, 2\)",
    ),
    (lambda g: delete(g, kind=0.5), "kind must be of integers, got dtype float64"),
    (
        lambda g: delete(g, created_before=np.zeros(2, int)),
        r"created_before must be one value.*\(2,\)",
    ),
    (lambda g: delete(g, is_node=np.ones(9, bool)), r"is_node must be bool of shape \(10,\)"),
    (lambda g: delete(g, is_node=np.ones(10)), "is_node must be bool.*got float32"),
    (lambda g: delete(g, node_id=np.array([2**32])), "node_id must fit int32, got 4294967296"),
    (lambda g: delete(g, created_before=2**31), "created_before must fit int32, got 2147483648"),
    (lambda g: expire(g, -1), "ttl must be at least 0, got -1"),
    (lambda g: expire(g, np.int64(-5)), "ttl must be at least 0, got -5"),
    (lambda g: expire(g, np.array(-1)), "ttl must be at least 0, got -1"),
    (lambda g: expire(g, jnp.int32(-1)), "ttl must be at least 0, got -1"),
    (lambda g: expire(g, 3.9), "ttl must be of integers"),
    (lambda g: expire(g, np.int64(3_000_000_000)), "ttl must fit int32, got 3000000000"),
    (lambda g: expire(g, 1, now=2**31), "now must fit int32, got 2147483648"),
    (lambda g: record_reads(g, np.array([2**32])), "read must fit int32, got 4294967296"),
    (lambda g: record_reads(g, np.ones(2)), "read must be of integers, got dtype float64"),
    (lambda g: record_reads(g, np.arange(2), np.ones(3, bool)), r"is_valid must have shape \(2,\)"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(KnowledgeGraph.create(10, 3))


def test_an_empty_list_is_no_node():
    graph, _ = insert(KnowledgeGraph.create(3, 3), np.eye(3, dtype=np.float32))
    after, num_deleted = delete(graph, node_id=np.zeros(0))
    assert int(num_deleted) == 0
    assert_identical(after, graph)
    assert_identical(record_reads(graph, np.zeros(0)), graph)


def test_jit_vmap_and_donation():
    def tidy(graph, ttl):
        graph, count = delete(graph, expert_id=1, below_confidence=0.6)
        graph, more = expire(graph, ttl)
        graph, new_id = compact(graph)
        return record_reads(graph, jnp.array([0, 0])), count + more, new_id

    graphs = [linked(seed)[1] for seed in range(3)]
    alone = [tidy(graph, 6) for graph in graphs]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *graphs)
    many = jax.jit(jax.vmap(tidy, in_axes=(0, None)), donate_argnums=0)(stacked, 6)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    jax.tree.map(np.testing.assert_array_equal, many, expected)
