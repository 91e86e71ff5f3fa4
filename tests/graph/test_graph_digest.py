"""The state hash: equal to a slow one, sensitive to every bit, blind to sharding."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import filled

from moe_jax.graph import KnowledgeGraph, digest, digest_hex, link_similar, row_digest

MASK = 2**32 - 1
GOLDEN = 0x9E3779B9


def mix(x, which):
    """One 32-bit integer at a time."""
    factors = [(0x85EBCA6B, 0xC2B2AE35), (0x7FEB352D, 0x846CA68B)][which]
    for shift, factor in zip([(16, 13), (16, 15)][which], factors, strict=True):
        x = ((x ^ (x >> shift)) * factor) & MASK
    return x ^ (x >> 16)


def words(x):
    x = np.ascontiguousarray(x)
    kind = np.uint8 if x.dtype == bool else f"u{x.dtype.itemsize}"
    return [int(v) for v in x.view(kind).ravel()]


def slow_rows(graph):
    rows = []
    for n in range(graph.num_nodes):
        sums = [0, 0]
        for name, leaf in zip(graph._fields, graph, strict=True):
            if leaf.ndim:
                seed = zlib.crc32(name.encode())
                for w, word in enumerate(words(np.asarray(leaf)[n])):
                    for which in (0, 1):
                        sums[which] += mix(word ^ ((w * GOLDEN + seed) & MASK), which)
        rows.append([s & MASK for s in sums])
    return rows


def slow_digest(graph):
    single = {n: words(x)[0] for n, x in zip(graph._fields, graph, strict=True) if x.ndim == 0}
    single |= {"N": graph.num_nodes, "D": graph.dim, "M": graph.num_edge_slots}
    lanes = []
    for lane in range(4):
        salt, total = zlib.crc32(f"lane {lane}".encode()), 0
        for n, (first, second) in enumerate(slow_rows(graph)):
            first = mix(first ^ ((n * GOLDEN + salt) & MASK), 0)
            total += mix((first + second * (salt | 1)) & MASK, 1)
        for name, word in single.items():
            total += mix(word ^ zlib.crc32(name.encode()) ^ salt, lane % 2)
        lanes.append(total & MASK)
    return lanes


@pytest.fixture(scope="module")
def graph():
    graph, _ = filled(np.random.default_rng(3), 8, 3, 6, num_edge_slots=2, threshold=0.99)
    return link_similar(graph, np.arange(8), k=2, threshold=-1.0)[0]


def test_equals_the_slow_hash(graph):
    for case in (graph, KnowledgeGraph.create(8, 3, num_edge_slots=2)):
        assert row_digest(case).tolist() == slow_rows(case)
        assert digest(case).tolist() == slow_digest(case)
    assert digest_hex(graph) == "".join(f"{word:08x}" for word in slow_digest(graph))


def flip(leaf, at, bit):
    """The leaf with one bit of one entry turned."""
    leaf = np.array(leaf)
    if leaf.dtype == bool:
        leaf[at] = not leaf[at]
        return jnp.asarray(leaf)
    bits = leaf.view(f"u{leaf.dtype.itemsize}")
    bits[at] ^= np.asarray(1 << bit, bits.dtype)
    return jnp.asarray(leaf)


@pytest.mark.parametrize("field", KnowledgeGraph._fields)
def test_every_bit_of_every_field_counts(graph, field):
    rng = np.random.default_rng(zlib.crc32(field.encode()))
    leaf, before, rows = getattr(graph, field), digest(graph), row_digest(graph)
    for _ in range(4):
        at = tuple(int(rng.integers(size)) for size in leaf.shape)
        bit = int(rng.integers(8 * leaf.dtype.itemsize))
        other = graph._replace(**{field: flip(leaf, at, bit)})
        assert (digest(other) != before).all()
        changed = np.flatnonzero((row_digest(other) != rows).any(axis=1))
        assert changed.tolist() == list(at[:1])


def test_signs_of_zero_and_bits_of_nan_count(graph):
    patterns = np.array([0x0, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32)
    seen = set()
    for value in patterns.view(np.float32):
        weight = np.array(graph.edge_weight)
        weight[5, 1] = value
        seen.add(digest_hex(graph._replace(edge_weight=jnp.asarray(weight))))
    assert len(seen) == len(patterns)


def test_the_place_and_the_sizes_count(graph):
    order = np.array([1, 0, *range(2, 8)])
    swapped = jax.tree.map(lambda x: x[order] if x.ndim else x, graph)
    np.testing.assert_array_equal(row_digest(swapped), row_digest(graph)[order])
    assert digest_hex(swapped) != digest_hex(graph)
    sizes = [(8, 3, 2), (3, 8, 2), (8, 2, 3), (9, 3, 2)]
    empty = [KnowledgeGraph.create(n, d, num_edge_slots=m) for n, d, m in sizes]
    assert len({digest_hex(g) for g in empty}) == len(sizes)


@pytest.mark.usefixtures("eight_devices")
def test_no_sharding_changes_it(graph):
    mesh = jax.make_mesh((4, 2), ("n", "d"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf, name):
        names = {0: (), 1: ("n",), 2: ("n", None)}[leaf.ndim]
        names = ("d", None) if name == "value" else names
        spec = jax.sharding.PartitionSpec(*names)
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    spread = KnowledgeGraph(*map(place, graph, graph._fields))
    np.testing.assert_array_equal(digest(spread), digest(graph))
    np.testing.assert_array_equal(row_digest(spread), row_digest(graph))


def test_under_vmap(graph):
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), graph, graph._replace(hits=graph.hits + 1))
    one, two = jax.vmap(digest)(both)
    np.testing.assert_array_equal(one, digest(graph))
    assert (two != one).all()
