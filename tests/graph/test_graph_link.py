"""Edges against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import assert_equals_oracle, assert_identical, filled, random_keys

from moe_jax.graph import (
    FOREVER,
    SEMANTIC,
    TEMPORAL,
    USER,
    KnowledgeGraph,
    StreamTail,
    insert,
    link,
    link_similar,
    link_stream,
    neighbours,
)

fast_link = jax.jit(link, static_argnames=("symmetric", "on_duplicate"))
fast_link_similar = jax.jit(link_similar, static_argnames=("k", "symmetric", "on_duplicate"))
fast_link_stream = jax.jit(link_stream)


@pytest.mark.parametrize(
    ("on_duplicate", "has_weight", "symmetric"),
    [("update", True, False), ("append", False, False), ("update", True, True)],
)
def test_link_equals_oracle(on_duplicate, has_weight, symmetric):
    for seed in range(60):
        rng = np.random.default_rng(seed)
        graph, oracle = filled(rng, 6, 3, 5, num_edge_slots=2, threshold=0.9)
        for _ in range(2):
            # Few sources, so that one of them needs several turns of the batched form.
            source = rng.choice([-1, 0, 1, 6, 7, 0, 1, rng.integers(6)], size=30).astype(np.int32)
            target = rng.integers(-1, 8, size=30).astype(np.int32)
            weight = rng.choice([0.1, 0.2, 0.3, -0.0, 0.0, -0.4, np.nan], size=30)
            weight = weight.astype(np.float32)
            kind, time = rng.integers(-1, 3, size=30), rng.integers(9, size=30)
            start, end = rng.integers(9, size=30), rng.choice([3, 8, FOREVER], size=30)
            is_valid = rng.random(30) < 0.9
            graph, count = fast_link(
                graph,
                *(source, target),
                weight=weight if has_weight else None,
                kind=kind,
                time=time,
                start=start,
                end=end,
                is_valid=is_valid,
                symmetric=symmetric,
                on_duplicate=on_duplicate,
            )
            weight = weight if has_weight else [None] * 30
            columns = zip(source, target, weight, kind, time, start, end, is_valid, strict=True)
            edges = [edge for *edge, valid in columns if valid]
            assert int(count) == oracle.link(edges, symmetric, on_duplicate)
            assert_equals_oracle(graph, oracle)


@pytest.mark.parametrize(
    ("on_duplicate", "has_queries", "symmetric"),
    [("update", False, False), ("append", True, False), ("update", False, True)],
)
def test_link_similar_equals_oracle(on_duplicate, has_queries, symmetric):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        graph, oracle = filled(rng, 20, 3, 16, num_edge_slots=4, threshold=0.95)
        for _ in range(2):
            threshold = np.float32(rng.choice([-1.0, 0.0, 0.3, 0.7]))
            node_id = rng.integers(-1, 22, size=8).astype(np.int32)
            queries = random_keys(rng, 8, 3) if has_queries else None
            graph, count = fast_link_similar(
                *(graph, node_id),
                queries=queries,
                k=6,
                threshold=threshold,
                symmetric=symmetric,
                on_duplicate=on_duplicate,
            )
            args = node_id, queries, 6, threshold, on_duplicate, symmetric
            assert int(count) == oracle.link_similar(*args)
            assert_equals_oracle(graph, oracle)


def test_link_stream_equals_oracle_over_calls():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        graph, oracle = filled(rng, 6, 3, 5, num_edge_slots=2, threshold=0.9)
        tail, last = StreamTail.create(graph, 2), {}
        for _ in range(3):
            node_id = rng.integers(-1, 8, size=7).astype(np.int32)
            stream = rng.integers(-1, 4, size=7)
            position = rng.integers(3, size=7)
            weight = rng.choice([0.5, 0.7, 1.0], size=7).astype(np.float32)
            is_valid = rng.random(7) < 0.9
            graph, count, tail = fast_link_stream(
                *(graph, node_id, stream),
                position=position,
                weight=weight,
                is_valid=is_valid,
                tail=tail,
            )
            args = node_id, stream, position, weight, is_valid, last, 2
            assert int(count) == oracle.link_stream(*args)
            assert_equals_oracle(graph, oracle)
            expected = [last.get(s, graph.num_nodes) for s in range(2)]
            np.testing.assert_array_equal(tail.node_id, expected)


@pytest.fixture(scope="module")
def grid():
    """Six orthogonal nodes and two free slots."""
    return insert(KnowledgeGraph.create(8, 6, num_edge_slots=2), jnp.eye(6))[0]


def test_the_strongest_edges_stay(grid):
    target = jnp.array([1, 2, 3, 4, 5])
    weight = jnp.array([0.3, 0.2, 0.2, 0.9, 0.1])
    graph, count = link(grid, jnp.zeros(5, jnp.int32), target, weight=weight)
    out = neighbours(graph, jnp.array([0, 1]))
    np.testing.assert_array_equal(out.ids, [[1, 4], [8, 8]])
    np.testing.assert_array_equal(out.weight, np.float32([[0.3, 0.9], [0, 0]]))
    assert int(count) == 3


def test_a_node_of_many_entries_is_linked_once(grid):
    _, count = link_similar(
        *(grid, jnp.array([0, 0, 1, 0])), k=2, threshold=-1.0, is_valid=jnp.arange(4) > 0
    )
    assert int(count) == 4


def test_distinct_nodes_are_linked_without_a_loop(grid):
    def loops(**options):
        jaxpr = jax.make_jaxpr(lambda g, i: link_similar(g, i, **options))(grid, jnp.arange(4))
        return str(jaxpr).count("while[")

    assert loops(symmetric=True) - loops() == 1


def test_a_tail_does_not_outlive_its_node(grid):
    _, _, tail = link_stream(grid, jnp.array([2]), 0, tail=StreamTail.create(grid, 1))
    reused = grid._replace(created=grid.created.at[2].set(9))
    freed = grid._replace(is_live=grid.is_live.at[2].set(False))
    for after, expected in ((grid, 1), (reused, 0), (freed, 0)):
        _, count, _ = link_stream(after, jnp.array([3]), 0, tail=tail)
        assert int(count) == expected


def test_streams_go_by_position_and_both_ways(grid):
    graph, count, tail = link_stream(
        *(grid, jnp.array([0, 1, 2, 2, 3]), jnp.array([7, 8, 7, 7, 8])),
        position=jnp.array([5, 1, 1, 2, 0]),
        symmetric=True,
    )
    out = neighbours(graph, jnp.arange(4))
    np.testing.assert_array_equal(out.ids, [[2, 8], [3, 8], [0, 8], [1, 8]])
    np.testing.assert_array_equal(out.kind[:, 0], TEMPORAL)
    assert (int(count), tail.node_id.shape) == (4, (0,))


def test_no_edges_to_itself_or_to_nothing(grid):
    source, target = jnp.array([0, 0, 7, -1, 8]), jnp.array([0, 7, 0, 0, 1])
    after, count = link(grid, source, target, weight=1.0)
    assert int(count) == 0
    assert_identical(after, grid)


def test_nothing_to_link(grid):
    none = jnp.zeros(0, jnp.int32)
    results = link(grid, none, none), link_similar(grid, none), link_stream(grid, none, none)
    for after, count, *_ in results:
        assert_identical(after, grid)
        assert int(count) == 0
    assert neighbours(grid, none).ids.shape == (0, 2)


def test_neighbours_of_no_node(grid):
    graph, _ = link(grid, jnp.arange(5), jnp.arange(5) + 1, weight=1.0)
    out = neighbours(graph, jnp.array([1, 7, 8, -1]))
    np.testing.assert_array_equal(out.is_valid, [[True, False]] + [[False, False]] * 3)
    for name, value in out._asdict().items():
        np.testing.assert_array_equal(value[1:], 8 if name == "ids" else 0)


def test_neighbours_by_kind_and_time():
    graph, _ = link(
        KnowledgeGraph.create(4, 1, num_edge_slots=4)._replace(is_live=jnp.ones(4, bool)),
        jnp.zeros(4, jnp.int32),
        jnp.array([1, 2, 3, 1]),
        weight=1.0,
        kind=jnp.array([SEMANTIC, TEMPORAL, USER, 7]),
        time=jnp.array([1, 2, 3, 4]),
        start=jnp.array([0, 5, 0, 0]),
        end=jnp.array([FOREVER, 6, 4, FOREVER]),
    )

    def found(**filters):
        out = neighbours(graph, jnp.array([0, 0]), **filters)
        return [row[valid].tolist() for row, valid in zip(out.ids, out.is_valid, strict=True)]

    assert found(kind=7) == [[1], [1]]
    assert found(kind=jnp.array([TEMPORAL, 3])) == [[2], []]
    assert found(as_of=jnp.array([0, 1])) == [[], [1]]
    assert found(as_of=jnp.array([3, 4])) == [[1, 3], [1, 3, 1]]
    assert found(as_of=jnp.array([5, 7])) == [[1, 2, 1], [1, 1]]
    assert found(kind=SEMANTIC, as_of=FOREVER) == [[1], [1]]
