"""The fused search of cells against the plain one; kernels run as ordinary operations here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.graph import KnowledgeGraph, build_cells, insert, search, search_cells
from moe_jax.ops import normalize

N, D, ROWS = 320, 64, 300


@pytest.fixture(scope="module")
def graph():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, D))
    keys = centres[rng.integers(12, size=ROWS)] + 0.7 * rng.normal(size=(ROWS, D))
    keys[50:60] = keys[:10]  # copies, which tie
    graph, _ = jax.jit(lambda g, k, e: insert(g, k, expert_id=e, merge_threshold=2.0))(
        KnowledgeGraph.create(N, D), keys.astype(np.float32), rng.integers(3, size=ROWS)
    )
    return graph._replace(is_live=graph.is_live & jnp.asarray(rng.random(N) < 0.9))


@pytest.fixture(scope="module", params=[(7, 150, 40), (3, 100, 100)], ids=["parts", "spill"])
def cells(graph, request):
    """Cells of more than one tile of places, or so small that the overflow list has two tiles."""
    num_cells, slots, spare = request.param
    return build_cells(graph, num_cells, slots_per_cell=slots, overflow_slots=spare,
                       iterations=3, key=jax.random.key(0))  # fmt: skip


def queries(rows=5):
    x = np.random.default_rng(1).normal(size=(rows, D)).astype(np.float32)
    x[2], x[3, 5] = 0, np.nan
    return x * np.array([1, 1e30, 1, 1, 1e-30] + [1] * (rows - 5), np.float32)[:, None]


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_the_kernels_find_what_plain_operations_find(graph, cells, probes):
    options = {"k": 6, "probes": probes, "threshold": np.float32(-0.2)}
    ours = search_cells(graph, cells, queries(), implementation="pallas", **options)
    want = search_cells(graph, cells, queries(), implementation="xla", **options)
    jax.tree.map(np.testing.assert_array_equal, ours, want)
    assert ours.is_valid[0].any()
    assert not ours.is_valid[2:4].any()
    quick = search_cells(
        graph, cells, queries(), implementation="pallas", reproducible=False, **options
    )
    np.testing.assert_array_equal(quick.is_valid, want.is_valid)
    np.testing.assert_allclose(quick.scores, want.scores, atol=1e-6)
    away = np.asarray(quick.ids != want.ids)
    np.testing.assert_allclose(quick.scores[away], np.asarray(want.scores)[away], atol=1e-6)


def test_a_query_alone_finds_what_it_finds_among_others(graph, cells):
    """One query takes another way to its cells."""
    find = functools.partial(
        search_cells, graph, cells, k=6, probes=2, implementation="pallas", reproducible=False
    )
    together = find(queries())
    for i, alone in enumerate(find(row[None]) for row in queries()):
        np.testing.assert_array_equal(alone.ids[0], together.ids[i])
        np.testing.assert_allclose(alone.scores[0], together.scores[i], atol=1e-6)


def test_with_all_cells_probed_a_filtered_search_is_exact(graph, cells):
    found = search_cells(graph, cells, queries(20), k=4, probes=99, expert_id=1,
                         implementation="pallas")  # fmt: skip
    want = search(graph, queries(20), k=4, expert_id=1)
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize("k", [25, 32, 48])
@pytest.mark.parametrize("cells", [(3, 100, 100)], ids=["spill"], indirect=True)
def test_a_larger_k_finds_the_same(graph, cells, k):
    """With all cells probed the search is exact; in the second graph fewer than k can be found."""
    for now in (graph, graph._replace(is_live=graph.is_live & (jnp.arange(N) < 60))):
        found = search_cells(now, cells, queries(20), k=k, probes=99, expert_id=1,
                             implementation="pallas")  # fmt: skip
        want = search(now, queries(20), k=48, expert_id=1)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[:, :k]), found, want)
    assert 0 < int(found.is_valid[0].sum()) < 25


def test_a_cell_is_probed_once_and_ties_go_to_the_lower_cell():
    keys = normalize(np.eye(D, dtype=np.float32)[:8])
    graph, _ = insert(KnowledgeGraph.create(128, D), keys)
    cells = build_cells(graph, 8, slots_per_cell=16, overflow_slots=8, key=jax.random.key(0))
    cells = cells._replace(centroids=jnp.zeros_like(cells.centroids))  # all cosines are equal
    found = search_cells(graph, cells, keys[:2], k=8, probes=3, implementation="pallas")
    inside = set(np.asarray(cells.members)[:3].ravel()) | set(np.asarray(cells.overflow))
    for ids in np.asarray(found.ids):
        assert set(ids) - {128} == inside - {128}


def test_wrong_calls(graph, cells):
    def find(**options):
        return search_cells(graph, cells, queries(), implementation="pallas", **options)

    with pytest.raises(ValueError, match="k=49"):
        find(k=49)
    with pytest.raises(ValueError, match="first_pass='keys'"):
        find(first_pass="keys")
    with pytest.raises(ValueError, match=r"'kind': \(5,\)"):
        find(kind=np.zeros(5, np.int32))
    with pytest.raises(ValueError, match="got 'triton'"):
        search_cells(graph, cells, queries(), implementation="triton")
