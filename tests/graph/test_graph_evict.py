"""Eviction by every policy against its oracle, and what a full graph keeps to.

More trials: `EVICT_TRIALS=2000 pytest tests/graph/test_graph_evict.py -k "oracle and oldest"`.
"""

import itertools
import os

import graph_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import (
    assert_equals_oracle,
    assert_identical,
    assert_outcomes,
    padded,
    random_items,
    random_threshold,
    slices,
)

from moe_jax.graph import KnowledgeGraph, _rounds, insert, record_reads
from moe_jax.graph._leaders import Items, compare
from moe_jax.graph._rounds import solve
from moe_jax.graph._victims import pose
from moe_jax.ops.search import SCORES_AT_ONCE
from moe_jax.ops.similarity import normalize

POLICIES = ["oldest", "least_used", "lowest_confidence"]
TRIALS = int(os.environ.get("EVICT_TRIALS", 150))
# R, N, D, the optional columns and the share of the trials. A call may overwrite the whole graph
# and its own items, and a graph may have one slot.
CASES = [
    (8, 6, 3, ("value", "time"), 0.6),
    (8, 20, 2, (), 0.3),
    (4, 1, 2, ("time",), 0.1),
]


def awkward(rng, items):
    """Columns that make ties: equal times and weights, times that only grow, zeros."""
    rows = len(items["key"])
    for name, low, high in (("weight", -1, 3), ("confidence", -1, 2)):
        if rng.random() < 0.3:
            new = rng.integers(low, high, size=rows) * rng.integers(2)
            items[name] = new.astype(items[name].dtype)
    if rng.random() < 0.3:
        items["confidence"] = rng.normal(size=rows).astype(np.float32)
    if "time" in items and rng.random() < 0.7:
        items["time"] = np.sort(items["time"]) // rng.choice([1, 10, 100]).astype(np.int32)
    return items


def changed_between_calls(rng, graph, oracle):
    """Some nodes are read, and edges appear, as arrays, since no rule of linking is at stake."""
    live = sorted(oracle.nodes)
    for slot in live:
        oracle.nodes[slot]["reads"] += int(rng.integers(3))
    for _ in range(2 * len(live)):
        source, target = rng.choice(live, size=2)
        new = {"target": target, "weight": np.float32(rng.random()), "kind": 1, "time": 7}
        oracle.edges[source][rng.integers(8)] = dict(new, start=3, end=9)
    arrays = oracle.arrays()
    names = [name for name in arrays if name == "reads" or name.startswith("edge_")]
    dtypes = {name: getattr(graph, name).dtype for name in names}
    return graph._replace(**{n: jnp.asarray(arrays[n], dtypes[n]) for n in names})


def run(graph, items, threshold, **options):
    """Not jitted as a whole, so that one compiled program serves all policies."""
    items = dict(items)
    keys, values = items.pop("key"), items.pop("value", None)
    threshold = None if threshold is None else np.float32(threshold)
    return insert(graph, keys, values=values, **items, merge_threshold=threshold, **options)


def random_stream(seed, case, num_calls=3):
    rows, num_nodes, dim, optional = case
    rng = np.random.default_rng([seed, rows, num_nodes, dim])
    items = awkward(rng, random_items(rng, rows * num_calls, dim, optional))
    graph, oracle = KnowledgeGraph.create(num_nodes, dim), graph_oracle.Graph(num_nodes, dim)
    return rng, graph, oracle, items


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_equals_oracle(policy, case):
    rows, share = case[0], case[-1]
    num_evicted = 0
    for seed in range(int(TRIALS * share)):
        rng, graph, oracle, items = random_stream(seed, case[:-1])
        threshold = random_threshold(rng, items["key"])
        for part in slices(items, [0, rows, 2 * rows, 3 * rows]):
            graph, info = run(graph, part, threshold, policy=policy)
            assert_outcomes(info, oracle.insert(part, threshold, policy=policy))
            assert_equals_oracle(graph, oracle)
            graph = changed_between_calls(rng, graph, oracle)
        num_evicted += oracle.num_evicted
    assert num_evicted > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_append_equals_oracle(policy):
    for seed in range(TRIALS // 10):
        rng, graph, oracle, items = random_stream(seed, CASES[0][:-1])
        for part in slices(items, [0, 8, 16, 24]):
            graph, info = run(graph, part, None, policy=policy)
            assert_outcomes(info, oracle.insert(part, None, policy=policy))
            assert not bool(info.merged.any())
            assert_equals_oracle(graph, oracle)
            graph = changed_between_calls(rng, graph, oracle)


@pytest.mark.parametrize("policy", POLICIES)
def test_ema_equals_oracle(policy):
    for seed in range(15):
        rng, graph, oracle, items = random_stream(seed, CASES[0][:-1], num_calls=1)
        items["key"] += rng.normal(size=items["key"].shape).astype(np.float32)  # no ties
        threshold = float(rng.choice([0.3, 0.8, 0.95]))
        graph, info = run(graph, items, threshold, policy=policy, merge_rule="ema")
        outcomes = oracle.insert(items, threshold, "ema", policy=policy)
        assert_outcomes(info, outcomes, approximate=True)
        assert_equals_oracle(graph, oracle, approximate=("key", "value"))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_split_of_the_stream_does_not_matter(policy):
    for seed in range(20):
        rng, graph, _, items = random_stream(seed, CASES[0][:-1], num_calls=4)
        threshold = random_threshold(rng, items["key"])
        whole = graph
        for part in slices(items, [0, 8, 16, 24, 32]):
            whole, _ = run(whole, part, threshold, policy=policy)
        cuts = np.sort(np.concatenate([[0, 8, 16, 24, 32], rng.integers(33, size=6)]))
        for part in slices(items, cuts):
            graph, _ = run(graph, padded(part, 8), threshold, policy=policy)
        assert_identical(graph, whole)


@jax.jit
def ask_rounds(graph, items, threshold, policy):
    like = compare(graph, items, threshold, 4)
    return solve(pose(graph, items, like, threshold, policy), policy)


@pytest.mark.parametrize(
    ("policy", "scores_at_once"), [*((p, SCORES_AT_ONCE) for p in POLICIES), ("oldest", 40)]
)
def test_rounds_suffice_where_no_merge_lowers_a_node(monkeypatch, policy, scores_at_once):
    """The sequential way would hide a mistake of the rounds, so they are asked directly."""
    monkeypatch.setattr(_rounds, "SCORES_AT_ONCE", scores_at_once)
    ask_rounds.clear_cache()
    for seed in range(40):
        rng, graph, oracle, items = random_stream(seed, CASES[0][:-1])
        items["time"] = np.sort(items["time"])
        items["confidence"] = np.nan_to_num(items["confidence"])
        items["value"] = np.nan_to_num(items["value"], posinf=0.0)
        items["weight"] = np.abs(items["weight"])
        threshold = max(random_threshold(rng, items["key"]), 0.5)
        for part in slices(items, [0, 8, 16, 24]):
            unit = normalize(part["key"])
            is_valid = part["is_valid"] & np.any(unit != 0, axis=1)
            ready = {**part, "key": unit, "is_valid": is_valid}
            ready = Items(**{name: jnp.asarray(x) for name, x in ready.items()})
            limit = np.float32(min(threshold, 1 - 1e-5) if threshold <= 1 else threshold)
            asked = ask_rounds(graph, ready, limit, POLICIES.index(policy))
            (guess, _), num_rounds, is_right = asked
            outcomes = oracle.insert(part, threshold, policy=policy)
            graph, _ = run(graph, part, threshold, policy=policy)
            if oracle.num_evicted:
                assert bool(is_right)
                assert int(num_rounds) <= 9
                np.testing.assert_array_equal(guess.slot, [o[0] for o in outcomes])


@pytest.mark.parametrize("cuts", [[0, 2], [0, 1, 2]])
def test_uses_stop_at_the_largest_integer(cuts):
    """A node used as often as can be counted stays, however the stream is split."""
    unit, most = np.eye(3, dtype=np.float32), 2**31 - 1
    graph, _ = insert(KnowledgeGraph.create(2, 3), unit[:2], weight=np.array([most, 1]))
    ids = []
    for start, end in itertools.pairwise(cuts):
        graph, info = insert(graph, unit[[0, 2]][start:end], policy="least_used")
        ids += info.node_id.tolist()
    assert ids == [0, 1]
    assert graph.hits.tolist() == [most, 1]


def test_a_sum_of_weights_stops_there_too():
    key = np.ones((4, 2), np.float32)
    for weight, want in ((2**30, 2**31 - 1), (2**28, 2**30), (2**16 - 1, 2**18 - 4)):
        graph, _ = insert(KnowledgeGraph.create(2, 2), key, weight=weight)
        assert graph.hits.tolist() == [want, 0]


def small(keys, **columns):
    """Items of the first case's shapes, so that its program serves: 8 of them, 3 wide, timed."""
    items = {"key": np.asarray(keys, np.float32)} | columns
    items.setdefault("time", np.arange(1, len(keys) + 1))
    items.setdefault("is_valid", np.ones(len(keys), bool))
    return padded({name: np.asarray(x) for name, x in items.items()}, 8)


def test_policies_by_hand():
    angle = np.linspace(0, np.pi, 7)
    keys = np.stack([np.cos(angle), np.sin(angle), 0 * angle], 1)
    confidence = np.array([0.9, 0.5, 0.2, 0.9, 0.9, 0.9], np.float32)
    columns = {"confidence": confidence, "weight": np.array([3, 2, 2, 3, 3, 3])}
    items = small(keys[:6], time=np.array([1, 5, 2, 6, 6, 6]), **columns)
    graph, _ = run(KnowledgeGraph.create(6, 3), items, 0.95, policy="oldest")
    graph = record_reads(graph, np.array([2, 2]))
    new = small(keys[6:], time=np.array([9]))
    for policy, victim in (("oldest", 0), ("least_used", 1), ("lowest_confidence", 2)):
        after, info = run(graph, new, 0.95, policy=policy)
        assert (int(info.node_id[0]), int(after.num_evicted)) == (victim, 1)
    assert int(graph.reads[2]) == 2
    after, info = run(graph, small(keys[6:].repeat(3, 0)), None, policy="oldest")
    np.testing.assert_array_equal(info.node_id[:3], [0, 0, 0])  # times 1, 2 and 3
    np.testing.assert_array_equal(info.is_current[:3], [False, False, True])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("threshold", [0.95, None])
def test_malformed_items_evict_nothing(policy, threshold):
    full, _ = run(KnowledgeGraph.create(6, 3), small(np.eye(3)[[0, 1, 2] * 2]), None)
    keys = [[np.nan, 1, 0], [0, 0, 0], [np.inf, 0, 0], [0, 0, 1]] * 2
    items = small(keys, confidence=np.array([0, 0, 0, np.nan] * 2, np.float32))
    after, info = run(full, items, threshold, policy=policy)
    assert bool(info.rejected.all())
    assert (int(after.num_rejected), int(after.num_evicted)) == (8, 0)
    assert_identical(after._replace(num_rejected=full.num_rejected), full)


def test_a_ring_buffer_keeps_the_last_items():
    keys = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    graph = KnowledgeGraph.create(6, 3)
    for start in (0, 8, 16, 24):
        items = small(keys[start : start + 8], time=np.arange(start + 1, start + 9))
        graph, info = run(graph, items, None, policy="oldest")
        np.testing.assert_array_equal(info.node_id, np.arange(start, start + 8) % 6)
        np.testing.assert_array_equal(info.is_current, np.arange(8) >= 2)
    np.testing.assert_array_equal(np.sort(graph.created), np.arange(27, 33))
    assert (int(graph.num_evicted), int(graph.num_live)) == (26, 6)


def test_under_vmap_and_donated():
    """Three graphs at once, each with its own number of evictions."""
    streams = [random_stream(seed, CASES[2][:-1], num_calls=2) for seed in range(3)]
    halves = [list(slices(items, [0, 4, 8])) for *_, items in streams]
    graphs = [
        run(s[1], h[0], 0.9, policy="least_used")[0] for s, h in zip(streams, halves, strict=True)
    ]
    parts = [h[1] for h in halves]
    alone = [run(g, p, 0.9, policy="least_used") for g, p in zip(graphs, parts, strict=True)]

    def stacked(trees):
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    def step(graph, items):
        return run(graph, items, 0.9, policy="least_used")

    many = jax.jit(jax.vmap(step), donate_argnums=0)(stacked(graphs), stacked(parts))
    jax.tree.map(np.testing.assert_array_equal, many, stacked(alone))
