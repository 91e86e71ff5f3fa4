"""Random streams full of awkward cases, and comparison of a graph with its oracle."""

import functools
import itertools

import graph_oracle
import jax
import numpy as np

from moe_jax.graph import KnowledgeGraph, insert

# R, N, D and the optional columns: few kinds, so that few programs are compiled. N = 20 exceeds
# the over-fetch of the nearest-neighbour search, N = 6 does not.
CASES = [
    (1, 6, 2, ()),
    (5, 6, 3, ("value",)),
    (16, 20, 2, ()),
    (16, 20, 8, ("value", "time")),
    (5, 20, 8, ("time",)),
]

fast_insert = jax.jit(insert, static_argnames=("merge_rule", "policy"))


def random_keys(rng, rows, dim):
    """Clusters, grid points with exact ties, copies, scaled copies and malformed vectors."""
    centres = rng.normal(size=(3, dim))
    spread = rng.choice([0.02, 0.2, 1.0])
    keys = centres[rng.integers(3, size=rows)] + spread * rng.normal(size=(rows, dim))
    is_grid = rng.random(rows) < rng.choice([0.0, 0.3, 1.0])
    keys[is_grid] = rng.integers(-2, 3, size=(int(is_grid.sum()), dim))
    for i in range(1, rows):
        if rng.random() < 0.25:
            keys[i] = keys[rng.integers(i)] * rng.choice([1.0, 2.0, 3.0, 1e-15, 1e15])
    keys = keys.astype(np.float32)
    for i in np.flatnonzero(rng.random(rows) < 0.08):
        keys[i, rng.integers(dim)] = rng.choice([np.nan, np.inf, -np.inf])
    keys[rng.random(rows) < 0.04] = 0.0
    return keys


def random_items(rng, rows, dim, optional=()):
    items = {
        "key": random_keys(rng, rows, dim),
        "confidence": rng.choice([0.0, 0.5, 0.9], size=rows).astype(np.float32),
        "expert_id": rng.integers(3, size=rows).astype(np.int32),
        "kind": rng.integers(3, size=rows).astype(np.int32),
        "source": rng.integers(100, size=(rows, 2)).astype(np.int32),
        "symbol": rng.integers(9, size=rows).astype(np.int32),
        "weight": rng.integers(1, 4, size=rows).astype(np.int32),
        "is_valid": rng.random(rows) < 0.9,
    }
    if rng.random() < 0.05:
        items["confidence"][rng.integers(rows)] = np.nan
    if "value" in optional:
        items["value"] = rng.normal(size=(rows, dim)).astype(np.float32)
        if rng.random() < 0.1:
            items["value"][rng.integers(rows), 0] = np.inf
    if "time" in optional:
        items["time"] = rng.integers(50, size=rows).astype(np.int32)
    return items


def random_threshold(rng, keys):
    """Often the very cosine of two of the keys, or its neighbour among float32 numbers."""
    units = [u for u in map(graph_oracle.normalize, keys) if u is not None]
    if len(units) < 2 or rng.random() < 0.4:
        return float(rng.choice([-0.5, 0.0, 0.5, 0.8, 0.95, 1.0, 1.5]))
    i, j = rng.choice(len(units), size=2, replace=False)
    threshold = graph_oracle.cosine(units[i], units[j])
    if threshold != 0:  # the neighbours of zero are subnormal, and flushed to zero
        threshold = np.nextafter(threshold, np.float32(rng.choice([-2, threshold, 2])))
    return float(max(threshold, np.float32(-0.99)))


def run_insert(graph, items, threshold, **options):
    """The fast insert of a dict of columns."""
    items = dict(items)
    if "value" in items:
        items["values"] = items.pop("value")
    keys = items.pop("key")
    threshold = None if threshold is None else np.float32(threshold)
    return fast_insert(graph, keys, **items, merge_threshold=threshold, **options)


def slices(items, bounds):
    """The columns cut at the bounds."""
    for start, stop in itertools.pairwise(bounds):
        yield {name: column[start:stop] for name, column in items.items()}


def padded(items, rows):
    """The columns with invalid, NaN rows appended up to a number of rows."""
    extra = rows - len(items["key"])

    def pad(name, column):
        fill = {"is_valid": False, "key": np.nan}.get(name, 7)
        return np.concatenate([column, np.full((extra, *column.shape[1:]), fill, column.dtype)])

    return {name: pad(name, column) for name, column in items.items()}


def assert_equals_oracle(graph, oracle, approximate=()):
    for name, expected in oracle.arrays().items():
        actual = np.asarray(getattr(graph, name))
        if name in approximate:
            np.testing.assert_allclose(actual, expected, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(actual, expected.astype(actual.dtype), err_msg=name)


def assert_outcomes(info, outcomes, approximate=False):
    np.testing.assert_array_equal(info.node_id, [o[0] for o in outcomes])
    for what in ("merged", "created", "rejected"):
        np.testing.assert_array_equal(getattr(info, what), [o[1] == what for o in outcomes])
    compare = np.testing.assert_array_equal
    if approximate:
        compare = functools.partial(np.testing.assert_allclose, atol=1e-5)
    compare(info.similarity, np.array([o[2] for o in outcomes], np.float32))
    slots = [(o[0], o[1] == "created") for o in outcomes]
    is_current = [
        o[1] in ("merged", "created") and (o[0], True) not in slots[i + 1 :]
        for i, o in enumerate(outcomes)
    ]
    np.testing.assert_array_equal(info.is_current, is_current)


def assert_identical(graph, other):
    for name, a, b in zip(KnowledgeGraph._fields, graph, other, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def filled(rng, num_nodes, dim, rows, num_edge_slots=8, threshold=0.9):
    """A graph and its oracle after one random insert."""
    graph = KnowledgeGraph.create(num_nodes, dim, num_edge_slots=num_edge_slots)
    oracle = graph_oracle.Graph(num_nodes, dim, num_edge_slots)
    items = random_items(rng, rows, dim)
    graph, _ = run_insert(graph, items, threshold)
    oracle.insert(items, threshold)
    return graph, oracle
