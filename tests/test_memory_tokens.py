"""Context vectors, and the ring of seen positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import KnowledgeGraph
from moe_jax.memory import ContextVectors, read_tokens, shuffle_symbols, signature, write_tokens
from moe_jax.ops import normalize

N, D, R, S = 8, 4, 5, 20
VECTORS = ContextVectors(hidden_dim=3, signature_dim=64, lengths=(2, 4), hidden_share=0.4)


@functools.cache
def text():
    tokens = np.random.default_rng(0).integers(5, size=(2, S))
    tokens[1, 12:18] = tokens[0, 3:9]
    return jnp.asarray(tokens, jnp.int32)


@functools.cache
def hidden():
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, S, 6)), jnp.float32)


@functools.cache
def projection():
    return VECTORS.fit(hidden().reshape(-1, 6))


def test_signatures_count_how_many_lengths_agree():
    lengths = (1, 2, 3, 5)
    signs = np.asarray(jax.jit(signature, static_argnums=(1, 2))(text(), lengths, 2048))
    tokens = np.asarray(text())

    def past(row, at, n):
        return tuple(tokens[row, i] if i >= 0 else None for i in range(at - n + 1, at + 1))

    places = [(row, at) for row in range(2) for at in range(S)]
    for i, a in enumerate(places):
        for b in places[: i + 1]:
            same = np.mean([past(*a, n) == past(*b, n) for n in lengths])
            # Vectors of other contexts are about 1 / sqrt(2048) off; six times that never happens.
            assert abs(float(signs[a] @ signs[b]) - same) < 6 / 2048**0.5


def test_context_vectors_are_causal_unit_vectors():
    compiled = jax.jit(VECTORS)

    def run(*inputs):
        return np.asarray(compiled(*inputs))

    before = run(projection(), hidden(), text())
    np.testing.assert_allclose(np.linalg.norm(before, axis=-1), 1.0, rtol=1e-5)
    for t in (0, 7, S - 1):
        changed = run(projection(), hidden().at[:, t].add(1.0), text().at[:, t].add(1))
        np.testing.assert_array_equal(changed[:, :t], before[:, :t])
        assert not np.any(np.all(changed[:, t] == before[:, t], axis=-1))


def test_full_whitening_makes_components_equal_and_uncorrelated():
    skewed = hidden().reshape(-1, 6) * jnp.array([[9.0, 1.0, 4.0, 0.5, 2.0, 1.0]])
    mean, matrix = ContextVectors(hidden_dim=3, signature_dim=0, whitening=1.0).fit(skewed)
    mapped = (skewed - mean[None]) @ matrix
    np.testing.assert_allclose(np.cov(mapped.T), np.eye(3), atol=1e-3)
    # What is left are the three largest: their span holds the most variance.
    kept = np.linalg.qr(matrix)[0]
    top = np.linalg.svd(np.asarray(skewed - mean[None]), full_matrices=False)[2][:3]
    np.testing.assert_allclose(np.abs(np.linalg.det(kept.T @ top.T)), 1.0, atol=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_dim": 0},
        {"signature_dim": 33},
        {"signature_dim": -32},
        {"hidden_share": 0.0},
        {"lengths": ()},
        {"lengths": (0, 2)},
    ],
)
def test_wrong_sizes_are_refused(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} must"):
        ContextVectors(**fields)


def test_hidden_states_that_are_too_narrow_are_refused():
    with pytest.raises(ValueError, match="at least hidden_dim=3 wide"):
        VECTORS.fit(jnp.zeros((4, 2)))


def ring(slots, items):
    """A list of slots; an item takes the first free one, else the one written longest ago."""
    clock = 0
    for key, symbol, source in items:
        if not np.isfinite(key).all() or not key.any():
            continue
        clock += 1
        free = [i for i in range(N) if i not in slots]
        at = free[0] if free else min(slots, key=lambda i: (slots[i][0], i))
        slots[at] = (clock, key, symbol, source)
    return slots


@pytest.mark.parametrize("split", [(5, 5, 5, 5, 5), (25,), (3, 13, 9)])
def test_writing_is_a_ring(split):
    rng = np.random.default_rng(2)
    keys = rng.normal(size=(25, D)).astype(np.float32)
    keys[3], keys[11, 1], keys[20, 0] = 0.0, np.nan, np.inf
    is_valid = rng.uniform(size=25) < 0.8
    symbols, source = rng.integers(9, size=25), rng.integers(99, size=(25, 2))
    graph = KnowledgeGraph.create(N, D)
    start = 0
    for size in split:
        part = slice(start, start + size)
        graph = write_tokens(
            graph, *map(jnp.asarray, (keys[part], symbols[part], source[part])),
            is_valid=jnp.asarray(is_valid[part]),
        )  # fmt: skip
        start += size
    items = zip(keys[is_valid], symbols[is_valid], source[is_valid], strict=True)
    slots = ring({}, items)
    assert sorted(slots) == np.flatnonzero(graph.is_live).tolist()
    for slot, (clock, key, symbol, origin) in slots.items():
        np.testing.assert_array_equal(graph.key[slot], normalize(key[None])[0])
        assert int(graph.symbol[slot]) == symbol
        assert int(graph.created[slot]) == int(graph.updated[slot]) == clock
        assert graph.source[slot].tolist() == origin.tolist()
    assert int(graph.clock) == int(graph.num_updates) == max(s[0] for s in slots.values())
    assert int(graph.num_evicted) == int(graph.clock) - N
    assert int(graph.num_rejected) == is_valid[[3, 11, 20]].sum() > 0


def test_reading_gives_what_followed():
    graph = KnowledgeGraph.create(N, D)
    graph = write_tokens(graph, jnp.eye(D), jnp.arange(4) + 5, jnp.zeros((4, 2), int))
    hits = read_tokens(graph, jnp.array([[0.0, 3.0, 1.0, 0.0], [0.0] * 4]), k=2)
    assert hits.symbols.tolist() == [[6, 7], [-1, -1]]
    assert hits.is_valid.tolist() == [[True, True], [False, False]]
    assert read_tokens(graph, jnp.ones((1, D)), k=100).symbols.shape == (1, N)


def test_shuffling_deals_the_live_symbols_out():
    graph = KnowledgeGraph.create(64, D)
    keys = jnp.asarray(np.random.default_rng(3).normal(size=(40, D)), jnp.float32)
    graph = write_tokens(graph, keys, jnp.arange(40), jnp.zeros((40, 2), int))
    graph = graph._replace(is_live=graph.is_live.at[7].set(False))
    after = shuffle_symbols(graph, jax.random.key(0)).symbol
    live = np.asarray(graph.is_live)
    assert sorted(after[live].tolist()) == sorted(graph.symbol[live].tolist())
    np.testing.assert_array_equal(after[~live], graph.symbol[~live])
    assert np.mean(np.asarray(after[live] == graph.symbol[live])) < 0.2
