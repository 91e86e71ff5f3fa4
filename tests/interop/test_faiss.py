"""The faiss index against the graph's own search, and in step with a changing graph."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import random_items, random_keys, run_insert

from moe_jax.graph import KnowledgeGraph, insert, search
from moe_jax.graph.state import with_keys
from moe_jax.interop.faiss import FaissIndex, SyncCounts
from moe_jax.ops import normalize

faiss = pytest.importorskip("faiss")

KINDS = ("flat", "ivf", "hnsw")
N, D = 200, 8
# What differs by less than the rounding of an inner product may come in another order.
ROUNDING = 1e-6
fast_search = jax.jit(search, static_argnames="k")


def assert_same_hits(hits, expected, threshold=-1.0):
    """Equal but for the order, and the choice at the end, of what scores alike."""
    for ids, scores, valid, want, best, is_wanted in zip(
        *map(np.asarray, hits), *map(np.asarray, expected), strict=True
    ):
        is_close = np.abs(best - threshold) < ROUNDING
        assert np.all((valid == is_wanted) | is_close)
        both = valid & is_wanted
        np.testing.assert_allclose(scores[both], best[both], rtol=0, atol=ROUNDING)
        for slot, score in zip(ids[both], scores[both], strict=True):
            is_tied = np.any(is_wanted & (np.abs(best - score) < ROUNDING))
            assert slot in want or is_tied
        distinct = both & (np.min(np.abs(best[:, None] - best) + np.eye(len(best)), 1) > ROUNDING)
        np.testing.assert_array_equal(ids[distinct][:-1], want[distinct][:-1])
        assert np.all(np.diff(scores[valid]) <= 0)
        assert len(set(ids[valid].tolist())) == valid.sum()


def having(graph, slots, keys):
    """The graph with these keys in these slots, live; zero keys free their slots."""
    keys = np.asarray(normalize(keys))
    key, is_live = np.array(graph.key), np.array(graph.is_live)
    key[slots], is_live[slots] = keys, np.any(keys != 0, axis=1)
    graph = with_keys(graph, jnp.arange(len(key)), jnp.asarray(key))
    return graph._replace(is_live=jnp.asarray(is_live))


def without(graph, slots):
    return having(graph, slots, np.zeros((len(slots), graph.dim)))


def graph_of(rng):
    """Live nodes with free slots in between, all fields set."""
    slots = rng.choice(N, size=140, replace=False)
    graph = having(KnowledgeGraph.create(N, D), slots, rng.normal(size=(140, D)))
    return graph._replace(
        expert_id=jnp.asarray(rng.integers(3, size=N), jnp.int32),
        kind=jnp.asarray(rng.integers(3, size=N), jnp.int32),
        created=jnp.asarray(rng.integers(200, size=N), jnp.int32),
        confidence=jnp.asarray(rng.choice([0.0, 0.5, 0.9], size=N), jnp.float32),
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Builds of HNSW repeat, and small searches do not wait for threads."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def graph():
    return graph_of(np.random.default_rng(0))


@pytest.fixture(scope="module")
def queries():
    return random_keys(np.random.default_rng(1), 24, D)


def test_flat_equals_the_graphs_search_on_awkward_keys():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        items = random_items(rng, 16, 3)
        graph, _ = run_insert(KnowledgeGraph.create(20, 3), items, rng.choice([0.9, 1.5]))
        queries = random_keys(rng, 8, 3)
        threshold = float(rng.choice([-1.0, 0.0, 0.6]))
        size = rng.choice([0, 8])
        filters = {
            "expert_id": rng.integers(3, size=size or None),
            "kind": rng.integers(3, size=size or None),
            "as_of": rng.integers(20, size=size or None),
            "min_confidence": np.float32(rng.choice([0.0, 0.5], size=size or None)),
        }
        chosen = rng.choice(list(filters), size=rng.integers(3), replace=False)
        filters = {name: filters[name] for name in chosen}
        hits = FaissIndex(graph).search(queries, 4, threshold, **filters)
        expected = search(graph, queries, 4, threshold, **filters)
        assert_same_hits(hits, expected, threshold)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_its_nodes(graph, queries, kind):
    # Every cell and a wide search: what the kinds leave out otherwise is theirs to choose.
    index = FaissIndex(graph, kind, probes=1000, search_width=N)
    assert_same_hits(index.search(queries, 10), fast_search(graph, queries, k=10))
    some = {"expert_id": 1, "kind": np.arange(24) % 3, "as_of": 100, "min_confidence": 0.5}
    hits = index.search(queries, 10, 0.2, **some)
    assert_same_hits(hits, fast_search(graph, queries, k=10, threshold=0.2, **some), 0.2)
    assert 0 < int(hits.is_valid.sum()) < hits.is_valid.size


def test_equal_scores_come_lowest_id_first():
    # 150 copies of one key and 10 of a better one: more ties than the first fetch holds.
    keys = np.repeat(np.eye(2), [150, 10], axis=0)
    graph = having(KnowledgeGraph.create(N, 2), np.arange(160), keys)
    index = FaissIndex(graph)
    query = np.float32([[0.1, 1.0]])
    np.testing.assert_array_equal(index.search(query, 14).ids[0], [*range(150, 160), 0, 1, 2, 3])
    # Back in its slot, but now the last of faiss's rows.
    index.sync(without(graph, [1, 2]))
    np.testing.assert_array_equal(index.search(query, 14).ids[0], [*range(150, 160), 0, 3, 4, 5])
    assert index.sync(graph).added == 2
    np.testing.assert_array_equal(index.search(query, 14).ids[0], [*range(150, 160), 0, 1, 2, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_few_nodes_no_nodes_and_no_direction(kind):
    index = FaissIndex(KnowledgeGraph.create(N, D), kind)
    queries = np.ones((3, D), np.float32)
    queries[1], queries[2, 0] = 0.0, np.nan
    for _ in range(2):
        hits = index.search(queries, N)
        num_live = index.num_live
        np.testing.assert_array_equal(hits.is_valid.sum(1), [num_live, 0, 0])
        assert np.all(np.asarray(hits.ids)[~np.asarray(hits.is_valid)] == N)
        assert np.all(np.asarray(hits.scores)[~np.asarray(hits.is_valid)] == 0)
        assert index.search(queries[:0], 3).ids.shape == (0, 3)
        assert index.search(queries, 3, as_of=-1).is_valid.sum() == 0
        assert index.search(queries, 3, float("nan")).is_valid.sum() == 0
        index.sync(having(KnowledgeGraph.create(N, D), [0, 7], np.eye(D)[:2]))
    assert num_live == 2


def changed(rng, graph):
    """A later state at the same logical time: nodes added, removed, moved and replaced."""
    live, free = np.flatnonzero(graph.is_live), np.flatnonzero(~np.asarray(graph.is_live))
    graph = without(graph, rng.choice(live, size=9, replace=False))
    slots = np.concatenate([rng.choice(live, size=6), rng.choice(free, size=9, replace=False)])
    keys = np.asarray(graph.key)[slots] * 2 + rng.normal(size=(15, D))
    return having(graph, *last_of_each(slots, keys))


def last_of_each(slots, keys):
    slots, first = np.unique(slots[::-1], return_index=True)
    return slots, keys[::-1][first]


def expected_counts(old, new):
    was, now = np.asarray(old.is_live), np.asarray(new.is_live)
    is_other = np.any(np.asarray(old.key) != np.asarray(new.key), axis=1)
    return (now & ~was).sum(), (was & ~now).sum(), (was & now & is_other).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_stays_in_step(graph, queries, kind):
    rng = np.random.default_rng(2)
    index = FaissIndex(graph, kind, probes=1000, search_width=N)
    was_rebuilt = []
    for _ in range(8):
        before, graph = graph, changed(rng, graph)
        counts = index.sync(graph)
        assert counts[:3] == expected_counts(before, graph)
        was_rebuilt.append(counts.rebuilt)
        assert index.num_live == int(graph.num_live)
        assert_same_hits(index.search(queries, 10), fast_search(graph, queries, k=10))
    assert any(was_rebuilt) == (kind == "hnsw")
    assert not all(was_rebuilt)
    assert index.sync(jax.tree.map(jnp.copy, graph)) == SyncCounts(0, 0, 0, False)


def test_what_filters_read_follows_without_a_changed_key(graph, queries):
    index = FaissIndex(graph)
    other = graph._replace(kind=graph.kind + 5)
    assert index.sync(other) == SyncCounts(0, 0, 0, False)
    assert not index.search(queries, 5, kind=1).is_valid.any()
    assert_same_hits(index.search(queries, 5, kind=6), fast_search(other, queries, k=5, kind=6))


def test_arrays_of_the_host_may_change_in_place(queries):
    graph = jax.tree.map(np.array, graph_of(np.random.default_rng(3)))
    index = FaissIndex(graph)
    slot = int(np.flatnonzero(graph.is_live)[0])
    graph.key[slot] = -graph.key[slot]
    assert index.sync(graph).replaced == 1


def test_a_sign_or_one_bit_is_a_change(graph):
    index = FaissIndex(graph)
    slot = int(np.flatnonzero(graph.is_live)[0])
    key = np.array(graph.key)
    for at, value in ((0, -key[slot, 0]), (3, np.nextafter(key[slot, 3], np.float32(2)))):
        key[slot, at] = value
        assert index.sync(graph._replace(key=jnp.asarray(key))).replaced == 1
    key[slot, 1], key[slot, 2] = key[slot, 2], key[slot, 1]
    assert index.sync(graph._replace(key=jnp.asarray(key))).replaced == 1


def test_cells_are_trained_anew_as_the_graph_grows():
    rng = np.random.default_rng(4)
    graph = KnowledgeGraph.create(N, D)
    index = FaissIndex(graph, "ivf")
    rebuilt = []
    for step in range(8):
        graph = having(graph, np.arange(12) + 12 * step, rng.normal(size=(12, D)))
        rebuilt.append(index.sync(graph).rebuilt)
    assert rebuilt == [True, False, False, False, True, False, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(graph, queries, kind, tmp_path):
    rng = np.random.default_rng(5)
    path = tmp_path / "index"
    index = FaissIndex(graph, kind)
    later = changed(rng, graph)
    index.sync(later)
    index.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    again = FaissIndex.load(path, later, search_width=N, probes=1000)
    assert again.kind == kind
    assert_same_hits(again.search(queries, 10), fast_search(later, queries, k=10))
    # What happened between saving and loading is caught up with.
    last = changed(rng, later)
    again = FaissIndex.load(path, last, search_width=N, probes=1000)
    assert_same_hits(again.search(queries, 10), fast_search(last, queries, k=10))
    again.sync(later)
    assert_same_hits(again.search(queries, 10), fast_search(later, queries, k=10))
    slot = int(np.flatnonzero(later.is_live)[-1])
    _, ids = faiss.read_index(str(path)).search(np.asarray(later.key[slot : slot + 1]), 1)
    assert ids[0, 0] == slot


def test_what_cannot_be_loaded(graph, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        FaissIndex.load(tmp_path / "none", graph)
    path = tmp_path / "index"
    FaissIndex(graph).save(path)
    with pytest.raises(ValueError, match="graph must have keys of width 8, got 3"):
        FaissIndex.load(path, KnowledgeGraph.create(N, 3))
    with pytest.raises(ValueError, match="must hold distinct ids below 20"):
        FaissIndex.load(path, KnowledgeGraph.create(20, D))
    faiss.write_index(faiss.IndexFlatL2(D), str(path))
    with pytest.raises(ValueError, match="must hold an index that was saved here, got IndexFlat"):
        FaissIndex.load(path, graph)


WRONG = [
    ({"kind": "lsh"}, "kind must be one of 'flat', 'ivf', 'hnsw', got 'lsh'"),
    ({"kind": "hnsw", "gpu": True}, "kind must be 'flat' or 'ivf' with gpu=True, got 'hnsw'"),
    ({"probes": 0}, "probes must be at least 1, got 0"),
    ({"num_cells": 0}, "num_cells must be at least 1, got 0"),
    ({"links": 1}, "links must be at least 2, got 1"),
    ({"search_width": -1}, "search_width must be at least 1, got -1"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options(graph, options, message):
    with pytest.raises(ValueError, match=message):
        FaissIndex(graph, **options)


def test_wrong_calls(graph):
    index = FaissIndex(graph)
    for k in (0, -1, N + 1):
        with pytest.raises(ValueError, match=f"k must be between 1 and {N}.*got {k}"):
            index.search(np.ones((1, D)), k)
    with pytest.raises(ValueError, match=r"queries must have shape \[rows, 8\].*got \(1, 5\)"):
        index.search(np.ones((1, 5)))
    with pytest.raises(ValueError, match=r"kind must have shape \(2,\), got \(3,\)"):
        index.search(np.ones((2, D)), kind=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"keys of shape \(200, 8\), got \(4, 8\)"):
        index.sync(KnowledgeGraph.create(4, D))


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss has a GPU part")
def test_a_gpu_needs_faiss_for_gpus(graph):
    with pytest.raises(ImportError, match="no GPU part: pip install"):
        FaissIndex(graph, gpu=True)


def test_without_faiss(graph, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match="faiss is not installed: pip install"):
        FaissIndex(graph)


@pytest.fixture
def stand_in(monkeypatch):
    """Indexes of the host in place of the GPU's, which remove nothing and return few rows."""
    for name, value in {
        "StandardGpuResources": object,
        "index_cpu_to_gpu": lambda resources, device, index: index,
        "index_gpu_to_cpu": faiss.clone_index,
    }.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    monkeypatch.setattr("moe_jax.interop._faiss_store._GPU_MOST", 30)

    def refuse(*_):
        raise RuntimeError("not on a GPU")

    monkeypatch.setattr(faiss, "IDSelectorBatch", refuse)
    monkeypatch.setattr(faiss, "IDSelectorBitmap", refuse)


def follow_on_a_gpu(graph, queries, kind, path):
    rng = np.random.default_rng(6)
    index = FaissIndex(graph, kind, gpu=True, probes=64)
    rebuilt = []
    for _ in range(8):
        some = {"expert_id": 1, "as_of": np.arange(24) * 9}
        assert_same_hits(index.search(queries, 10), fast_search(graph, queries, k=10))
        hits = index.search(queries, 10, **some)
        assert_same_hits(hits, fast_search(graph, queries, k=10, **some))
        graph = changed(rng, graph)
        rebuilt.append(index.sync(graph).rebuilt)
    assert len(set(rebuilt)) == 2
    assert index.search(queries, N).is_valid.sum(1).max() == int(graph.num_live)
    index.save(path)
    for gpu in (False, True):
        again = FaissIndex.load(path, graph, gpu=gpu, probes=64)
        assert_same_hits(again.search(queries, 10), fast_search(graph, queries, k=10))


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss has a GPU part")
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_as_on_a_gpu(graph, queries, kind, tmp_path):
    follow_on_a_gpu(graph, queries, kind, tmp_path / "index")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_on_a_gpu(graph, queries, kind, tmp_path):
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("the faiss installed here has no GPU part")
    follow_on_a_gpu(graph, queries, kind, tmp_path / "index")


def test_opposite_vectors_reach_the_default_threshold():
    keys = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)
    graph, _ = insert(KnowledgeGraph.create(100, 64), keys)
    assert FaissIndex(graph).search(-keys, 100).is_valid.all()
