"""Bad data is left out and counted in compiled programs, bad calls are a ValueError outside."""

import graph_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import assert_identical

from moe_jax.graph import FOREVER, KnowledgeGraph, insert, link, link_similar, neighbours, search
from moe_jax.ops import exact_cosine, first_independent, nearest, normalize, top_k
from moe_jax.ops.search import encode

N, D, R = 20, 3, 8
LEAST, MOST = -(2**31), 2**31 - 1
NAN, INF = np.float32("nan"), np.float32("inf")
TINY = np.finfo(np.float32).tiny

fast_insert = jax.jit(insert, static_argnames=("merge_rule", "policy"))
fast_link = jax.jit(link)
fast_link_similar = jax.jit(link_similar, static_argnames="k")
fast_search = jax.jit(search, static_argnames="k")
fast_neighbours = jax.jit(neighbours)


def keys_of(seed):
    return np.random.default_rng(seed).normal(size=(R, D)).astype(np.float32)


# A full set, so that nearly every case below is one compiled program.
ARGUMENTS = {
    "values": keys_of(2),
    "confidence": np.full(R, 0.5, np.float32),
    "weight": np.ones(R, np.int32),
    "is_valid": np.ones(R, bool),
    "time": np.arange(10, 10 + R, dtype=np.int32),
    "merge_threshold": np.float32(0.95),
}
SEPARATE = {"merge_threshold": np.float32(2)}


def put(graph, keys, merge_rule="leader", **changes):
    return fast_insert(graph, keys, **ARGUMENTS | changes, merge_rule=merge_rule)


@pytest.fixture(scope="module")
def graph():
    times = np.arange(1, R + 1, dtype=np.int32)
    return put(KnowledgeGraph.create(N, D), keys_of(0), time=times, **SEPARATE)[0]


# Keys without a direction, and what is not finite in other arguments.
BAD_KEYS = [
    [NAN, 1, 1],
    [NAN, NAN, NAN],
    [1, INF, 1],
    [-INF, INF, 0],
    [0, 0, 0],
    [-0.0, 0, -0.0],
    [TINY / 2, -TINY / 4, 0],
]
BAD_ROWS = [("keys", np.float32(row)) for row in BAD_KEYS]
BAD_ROWS += [("values", np.float32([1, bad, 1])) for bad in (NAN, INF, -INF)]
BAD_ROWS += [("confidence", bad) for bad in (NAN, INF, -INF)]


@pytest.mark.parametrize("merge_rule", ["leader", "ema"])
def test_insert_leaves_out_and_counts_bad_rows(graph, merge_rule):
    for name, bad in BAD_ROWS:
        for rows in ([0], [3, 4], [1, 6, 7], list(range(R))):
            given = {"keys": keys_of(1), **jax.tree.map(np.copy, ARGUMENTS)}
            given[name][rows] = bad
            after, info = put(graph, **given, merge_rule=merge_rule)
            is_bad = np.isin(np.arange(R), rows)
            np.testing.assert_array_equal(info.rejected, is_bad)
            np.testing.assert_array_equal(np.asarray(info.node_id) == N, is_bad)
            assert not np.any(np.asarray(info.created | info.merged)[is_bad])
            assert np.all(np.isfinite(info.similarity))
            # As if the bad rows had not been there, but for the count.
            clean, _ = put(graph, keys_of(1), merge_rule, is_valid=~is_bad)
            expected = clean._replace(num_rejected=clean.num_rejected + len(rows))
            assert_identical(after, expected)


def test_invalid_rows_are_neither_stored_nor_counted(graph):
    keys = np.full((R, D), NAN, np.float32)
    after, info = put(graph, keys, is_valid=np.zeros(R, bool))
    assert_identical(after, graph)
    assert not np.any(info.rejected | info.created | info.merged)


def test_keys_of_any_length_have_a_direction():
    keys = keys_of(1)
    keys /= np.abs(keys).max(axis=1, keepdims=True)
    scale = np.float32([1e-37, TINY, 1e-30, 1e-6, 1.0, 1e30, 1e38, 3.4e38])[:, None]
    after, info = put(KnowledgeGraph.create(N, D), keys * scale, **SEPARATE)
    assert not np.any(info.rejected)
    length = np.linalg.norm(np.asarray(after.key[:R], np.float64), axis=1)
    np.testing.assert_allclose(length, 1.0, atol=1e-6)


def test_what_free_slots_hold_never_matters(graph):
    free = ~np.asarray(graph.is_live)
    poison = {"value": NAN, "confidence": INF, "kind": 1, "hits": MOST, "created": LEAST}
    poison |= {"expert_id": 1, "reads": MOST, "updated": MOST, "symbol": 3, "source": 4}
    fields = {}
    for name, bad in poison.items():
        field = np.array(getattr(graph, name))
        field[free] = bad
        fields[name] = jnp.asarray(field)
    poisoned = graph._replace(**fields)
    filters = {"expert_id": jnp.int32(-1), "min_confidence": jnp.float32(0), "as_of": jnp.int32(99)}
    hits = [fast_search(g, keys_of(1), k=5, **filters) for g in (graph, poisoned)]
    jax.tree.map(np.testing.assert_array_equal, *hits)
    (after, info), (other, other_info) = (put(g, keys_of(1)) for g in (graph, poisoned))
    jax.tree.map(np.testing.assert_array_equal, info, other_info)
    live = np.asarray(after.is_live)
    assert live.sum() > R
    for name, a, b in zip(after._fields, after, other, strict=True):
        same = ... if a.ndim == 0 or name.startswith("edge_") else live
        np.testing.assert_array_equal(np.asarray(a)[same], np.asarray(b)[same], err_msg=name)


@pytest.mark.parametrize("threshold", [NAN, -INF, INF, np.float32(-2), np.float32(7)])
def test_a_strange_traced_merge_threshold_stores_no_nonsense(graph, threshold):
    for start in (KnowledgeGraph.create(N, D), graph):
        after, info = put(start, keys_of(1), merge_threshold=np.float32(threshold))
        outcome = np.sum([info.created, info.merged, info.rejected], axis=0)
        np.testing.assert_array_equal(outcome, 1)
        stored = np.asarray(info.node_id)[np.asarray(info.created | info.merged)]
        assert np.all(np.asarray(after.is_live)[stored])
        assert int(after.num_live) == int(start.num_live) + int(info.created.sum())
        assert np.all(np.isfinite(after.key))
        assert np.all(np.isfinite(after.value))


def test_counters_and_clock_stop_at_their_maximum(graph):
    keys = keys_of(1)
    keys[0] = 0
    last = jnp.int32(MOST)
    counters = {"num_updates": last, "num_merged": last, "num_rejected": last}
    after, _ = fast_insert(graph._replace(clock=last, **counters), keys)
    assert {name: int(getattr(after, name)) for name in counters} == dict.fromkeys(counters, MOST)
    assert int(after.clock) == MOST == FOREVER
    assert np.all(np.asarray(after.updated) >= 0)


def test_a_full_graph_rejects_and_counts(graph):
    full = put(put(graph, keys_of(1), **SEPARATE)[0], keys_of(3), **SEPARATE)[0]
    assert int(full.num_live) == N
    assert int(full.num_rejected) == 3 * R - N
    after, info = put(full, keys_of(4), **SEPARATE)
    assert np.all(info.rejected)
    assert_identical(after, full._replace(num_rejected=full.num_rejected + R))


def test_search_gives_bad_queries_no_hits_and_spoils_no_others(graph):
    clean = fast_search(graph, keys_of(1), k=5)
    assert np.all(clean.is_valid)
    for bad in BAD_KEYS:
        queries = keys_of(1)
        queries[[0, 5]] = bad
        hits = fast_search(graph, queries, k=5)
        is_bad = np.isin(np.arange(R), [0, 5])[:, None]
        np.testing.assert_array_equal(hits.ids, np.where(is_bad, N, clean.ids))
        np.testing.assert_array_equal(hits.scores, np.where(is_bad, 0, clean.scores))
        np.testing.assert_array_equal(hits.is_valid, np.broadcast_to(~is_bad, (R, 5)))


NO_HITS = [
    {"as_of": 0},
    {"as_of": -1},
    {"as_of": LEAST},
    {"min_confidence": NAN},
    {"min_confidence": INF},
    {"expert_id": LEAST},
    {"kind": MOST},
    {"threshold": NAN},
    {"threshold": INF},
    {"threshold": 1.5},
]


@pytest.mark.parametrize("filters", NO_HITS)
def test_no_node_passes(graph, filters):
    assert int(graph.created.min(where=graph.is_live, initial=9)) == 1
    hits = fast_search(graph, keys_of(1), k=5, **filters)
    assert not np.any(hits.is_valid)
    np.testing.assert_array_equal(hits.ids, N)
    np.testing.assert_array_equal(hits.scores, 0)


def test_as_of_sees_what_was_there(graph):
    for as_of, count in ((1, 1), (3, 3), (MOST, 5)):
        hits = fast_search(graph, keys_of(1), k=5, as_of=as_of)
        np.testing.assert_array_equal(hits.is_valid.sum(axis=1), count)
        assert np.all(np.asarray(graph.created)[np.asarray(hits.ids)[:, :count]] <= as_of)


BAD_IDS = np.int32([-1, N, N + 1, LEAST, MOST, R, N - 1, MOST - 1])  # R and N - 1 are free slots


def test_edges_of_no_node_are_left_out(graph):
    inside = np.arange(R, dtype=np.int32)
    for source, target in ((BAD_IDS, inside), (inside, BAD_IDS), (BAD_IDS, BAD_IDS[::-1])):
        after, count = fast_link(graph, source, target, weight=np.ones(R, np.float32))
        assert int(count) == 0
        assert_identical(after, graph)
    after, count = fast_link_similar(graph, BAD_IDS, k=3, threshold=-1.0)
    assert int(count) == 0
    assert_identical(after, graph)
    out = fast_neighbours(graph, BAD_IDS)
    assert not np.any(out.is_valid)
    np.testing.assert_array_equal(out.ids, N)


def test_edges_without_a_weight_are_left_out(graph):
    source, target = np.arange(R, dtype=np.int32), np.roll(np.arange(R, dtype=np.int32), 1)
    weight = np.float32([NAN, INF, -INF, 0.5, -0.5, 0.0, 3e38, -3e38])
    after, count = fast_link(graph, source, target, weight=weight)
    assert int(count) == 5
    np.testing.assert_array_equal(after.edge_target[:3], N)
    np.testing.assert_array_equal(after.edge_weight[3:R, 0], weight[3:])


def test_link_similar_of_bad_queries(graph):
    queries = keys_of(1)
    queries[: len(BAD_KEYS)] = BAD_KEYS
    node_id = np.arange(R, dtype=np.int32)
    after, count = fast_link_similar(graph, node_id, queries=queries, k=3, threshold=-1.0)
    assert int(count) == 3
    assert np.all(np.asarray(after.edge_target)[: len(BAD_KEYS)] == N)
    after, count = fast_link_similar(graph, node_id, queries=queries, k=3, threshold=NAN)
    assert int(count) == 0
    assert_identical(after, graph)


def test_nothing_given(graph):
    none, no_ids = np.zeros((0, D), np.float32), np.zeros(0, np.int32)
    for rule in ("leader", "ema"):
        after, info = insert(graph, none, merge_rule=rule)
        assert_identical(after, graph)
        assert all(field.shape == (0,) for field in info)
    for queries in (None, none):
        assert_identical(link_similar(graph, no_ids, queries=queries)[0], graph)
    assert_identical(link(graph, no_ids, no_ids)[0], graph)
    hits = search(graph, none, k=5, kind=no_ids, as_of=0)
    assert all(field.shape == (0, 5) for field in hits)
    assert neighbours(graph, no_ids).is_valid.shape == (0, graph.num_edge_slots)


ONES = np.ones((R, D), np.float32)
WRONG = [
    (lambda g: insert(g, np.ones((R, D + 1))), r"keys must have shape \[rows, 3\].*got \(8, 4\)"),
    (lambda g: insert(g, np.ones((R, D, 1))), r"keys must have shape \[rows, 3\].*\(8, 3, 1\)"),
    (lambda g: insert(g, ONES, values=ONES[:, :2]), r"values must have shape \[rows, 3\]"),
    (lambda g: insert(g, ONES, values=ONES[1:]), r"values must have shape \(8, 3\)"),
    (lambda g: insert(g, ONES, weight=np.ones(R + 1, int)), r"weight must have shape \(8,\)"),
    (lambda g: search(g, ONES[:, :2]), r"queries must have shape \[rows, 3\]"),
    (lambda g: search(g, ONES, 0), "k must be between 1 and 20.*got 0"),
    (lambda g: search(g, ONES, -3), "k must be between 1 and 20.*got -3"),
    (lambda g: search(g, ONES, N + 1), "k must be between 1 and 20.*got 21"),
    (lambda g: search(g, ONES, as_of=np.zeros(3, int)), r"as_of must have shape \(8,\)"),
    (lambda g: link_similar(g, BAD_IDS, k=-1), "k must be at least 1, got -1"),
    (lambda g: link_similar(g, BAD_IDS, queries=np.ones((R, 2))), "queries must have shape"),
    (lambda g: link(g, BAD_IDS, BAD_IDS * 1.5), "target must be a list of integers.*float"),
    (lambda g: neighbours(g, BAD_IDS[:, None]), r"node_id must be a list of integers.*\(8, 1\)"),
    (lambda g: neighbours(g, BAD_IDS > 0), "node_id must be a list of integers.*bool"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_calls_are_refused_eager_and_traced(graph, call, message):
    with pytest.raises(ValueError, match=message):
        call(graph)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, graph)


def test_normalize_on_bad_rows():
    unit = normalize(np.float32(BAD_KEYS))
    np.testing.assert_array_equal(unit, 0)
    mixed = np.concatenate([np.float32(BAD_KEYS), keys_of(3)])
    expected = np.stack([graph_oracle.normalize(key) for key in keys_of(3)])
    np.testing.assert_array_equal(normalize(mixed)[len(BAD_KEYS) :], expected)
    assert normalize(np.zeros((0, D))).shape == (0, D)
    assert normalize(np.zeros((2, 0))).shape == (2, 0)
    gradient = jax.grad(lambda x: normalize(x).sum())(jnp.zeros((2, D)))
    np.testing.assert_array_equal(gradient, 0)
    with pytest.raises(ValueError, match="x must be"):
        normalize(np.float32(1))
    with pytest.raises(ValueError, match=r"at most 16384, got shape \(1, 16385\)"):
        normalize(np.zeros((1, 16385)))


def test_cosines_of_zeros_and_of_nothing():
    unit = np.concatenate([np.asarray(normalize(keys_of(3))), np.zeros((2, D), np.float32)])
    cosine = np.asarray(exact_cosine(unit, unit))
    np.testing.assert_array_equal(cosine[R:], 0)
    assert not np.any(np.signbit(cosine[R:]))
    assert exact_cosine(unit[:0], unit).shape == (0, R + 2)
    assert exact_cosine(unit, unit[:0]).shape == (R + 2, 0)


def test_nearest_without_candidates():
    unit = normalize(keys_of(3))
    mask = np.zeros((R, R), bool)
    mask[0, 2] = True
    hits = nearest(unit, unit, mask, 3)
    assert hits.ids[0].tolist() == [2, R, R]
    np.testing.assert_array_equal(hits.ids[1:], R)
    assert hits.is_valid.sum() == 1
    assert (np.asarray(hits.scores)[~np.asarray(hits.is_valid)] == 0).all()


def test_top_k_of_infinities():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(6, 700)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = -INF
    x[0, ::50] = INF
    x[2] = -INF
    x = jnp.asarray(x)
    for k in (1, 5):
        for ours, theirs in zip(top_k(x, k), jax.lax.top_k(x, k), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    for k in (-1, 701):
        with pytest.raises(ValueError, match=f"k must be between 0 and 700.*got {k}"):
            top_k(x, k)
    assert top_k(x[:0], 5)[0].shape == (0, 5)


def test_a_code_of_zeros_and_no_items():
    code, scale, error = encode(jnp.zeros((2, D)))
    np.testing.assert_array_equal(code, 0)
    np.testing.assert_array_equal(scale, 0)
    np.testing.assert_array_equal(error, 0)
    assert first_independent(jnp.zeros((0, 0), bool), jnp.zeros(0, bool)).shape == (0,)
