"""Search against the oracle, in long rows and on a mesh."""

import graph_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import filled, random_keys
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.graph import KnowledgeGraph, insert, search

fast_search = jax.jit(search, static_argnames="k")
FILTERS = {
    "expert_id": lambda node, value: node["expert_id"] == value,
    "kind": lambda node, value: node["kind"] == value,
    "as_of": lambda node, value: node["created"] <= value,
    "min_confidence": lambda node, value: node["confidence"] >= value,
}


def expected_hits(oracle, queries, k, threshold, filters):
    ids = np.full((len(queries), k), oracle.num_nodes)
    scores = np.zeros((len(queries), k), np.float32)
    for q, query in enumerate(queries):
        unit = graph_oracle.normalize(query)
        if unit is None:
            continue
        wanted = {name: np.broadcast_to(v, len(queries))[q] for name, v in filters.items()}

        def accept(slot, wanted=wanted):
            return all(FILTERS[name](oracle.nodes[slot], v) for name, v in wanted.items())

        for rank, (slot, score) in enumerate(oracle.search(unit, k, threshold, accept)):
            ids[q, rank], scores[q, rank] = slot, score
    return ids, scores


@pytest.mark.parametrize(
    ("names", "per_query"),
    [((), False), (("expert_id",), False), (("kind", "as_of"), True), (tuple(FILTERS), True)],
)
def test_equals_oracle(names, per_query):
    for seed in range(60):
        rng = np.random.default_rng([seed, len(names)])
        graph, oracle = filled(rng, 20, 3, 16)
        size = (8,) if per_query else ()
        values = {
            "expert_id": rng.integers(3, size=size),
            "kind": rng.integers(3, size=size),
            "as_of": rng.integers(20, size=size),
            "min_confidence": np.float32(rng.choice([0.0, 0.5], size=size)),
        }
        filters = {name: values[name] for name in names}
        threshold = np.float32(rng.choice([-1.0, 0.0, 0.6]))
        queries = random_keys(rng, 8, 3)
        hits = fast_search(graph, queries, k=4, threshold=threshold, **filters)
        ids, scores = expected_hits(oracle, queries, 4, threshold, filters)
        np.testing.assert_array_equal(hits.ids, ids)
        np.testing.assert_array_equal(hits.scores, scores)
        np.testing.assert_array_equal(hits.is_valid, ids < 20)


@pytest.fixture(scope="module")
def large():
    keys = np.random.default_rng(0).normal(size=(5000, 16)).astype(np.float32)
    keys[4000:] = keys[:1000] * 3  # equal cosines far apart
    graph = KnowledgeGraph.create(5000, 16)
    unit = jnp.asarray(np.stack([graph_oracle.normalize(key) for key in keys]))
    return graph._replace(key=unit, is_live=jnp.arange(5000) % 7 != 0)


def test_a_row_longer_than_a_chunk(large):
    queries = np.random.default_rng(1).normal(size=(4, 16)).astype(np.float32)
    hits = fast_search(large, queries, k=50)
    unit = np.stack([graph_oracle.normalize(query) for query in queries])
    score = np.where(large.is_live, unit @ np.asarray(large.key).T, -2)
    expected = np.sort(score, axis=1)[:, :-51:-1]
    np.testing.assert_allclose(hits.scores, expected, atol=1e-6)
    is_tie = hits.scores[:, 1:] == hits.scores[:, :-1]
    assert bool(is_tie.any())
    assert bool(jnp.all((hits.ids[:, 1:] > hits.ids[:, :-1]) | ~is_tie))


def test_batching_does_not_change_a_bit(large):
    queries = np.random.default_rng(2).normal(size=(32, 16)).astype(np.float32)
    whole = fast_search(large, queries, k=10)
    for i in (0, 13, 31):
        alone = fast_search(large, queries[i : i + 1], k=10)
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[0], b[i]), alone, whole)


@pytest.mark.usefixtures("eight_devices")
def test_a_mesh_does_not_change_a_bit():
    rng = np.random.default_rng(3)
    graph, _ = insert(KnowledgeGraph.create(64, 16), rng.normal(size=(24, 16)))
    queries = rng.normal(size=(8, 16)).astype(np.float32)
    expected = fast_search(graph, queries, k=7)
    mesh = Mesh(np.array(jax.devices()[:8]), ("nodes",))

    def place(x):
        axes = ("nodes",) if x.ndim else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    sharded = jax.tree.map(place, graph)
    hits = fast_search(sharded, queries, k=7)
    jax.tree.map(np.testing.assert_array_equal, hits, expected)
    more = rng.normal(size=(24, 16))
    jax.tree.map(np.testing.assert_array_equal, insert(sharded, more), insert(graph, more))


def test_bounds_of_k():
    graph, _ = insert(KnowledgeGraph.create(3, 2), jnp.eye(2))
    hits = search(graph, jnp.array([[1.0, 2.0]]), k=3)
    np.testing.assert_array_equal(hits.ids, [[1, 0, 3]])
    np.testing.assert_array_equal(hits.is_valid, [[True, True, False]])
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k must be between 1 and 3.*got {k}"):
            search(graph, jnp.ones((1, 2)), k=k)


def test_no_queries_and_no_nodes():
    graph = KnowledgeGraph.create(3, 2)
    assert search(graph, jnp.zeros((0, 2)), k=2).ids.shape == (0, 2)
    hits = search(graph, jnp.eye(2), k=2)
    np.testing.assert_array_equal(hits.ids, 3)
    np.testing.assert_array_equal(hits.scores, 0.0)
    assert not bool(hits.is_valid.any())


def test_scores_need_not_be_reproducible():
    rng = np.random.default_rng(5)
    graph, _ = insert(KnowledgeGraph.create(30, 8), rng.normal(size=(20, 8)))
    queries = rng.normal(size=(7, 8))
    exact, quick = (search(graph, queries, 3, 0.1, reproducible=r) for r in (True, False))
    np.testing.assert_array_equal(exact.ids, quick.ids)
    np.testing.assert_allclose(exact.scores, quick.scores, atol=1e-6)


@pytest.mark.parametrize("dim", [8, 64])
def test_thresholds_of_one_and_minus_one_mean_equal_and_all(dim):
    """Cosines of equal and of opposite vectors are rounded to either side."""
    keys = np.random.default_rng(0).normal(size=(100, dim)).astype(np.float32)
    graph, _ = insert(KnowledgeGraph.create(100, dim), keys)
    assert search(graph, keys, 1, threshold=1.0).is_valid.all()
    for threshold in (-1, -1.0, np.float32(-1.0)):
        assert search(graph, -keys, 100, threshold=threshold).is_valid.all()
