"""Spherical k-means against a slow version, in chunks, masked, and on awkward rows."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import nearest_centroids, normalize, spherical_kmeans

# The package's attribute of this name is the function.
MODULE = importlib.import_module("moe_jax.ops.spherical_kmeans")
KEY = jax.random.key(0)


def blobs(seed, rows=200, dim=8, count=6, spread=0.15):
    """Unit rows around `count` directions, and the direction of each."""
    rng = np.random.default_rng(seed)
    own = rng.integers(count, size=rows)
    x = rng.normal(size=(count, dim))[own] * 2 + spread * rng.normal(size=(rows, dim))
    return normalize(jnp.asarray(x, jnp.float32)), own


def slow(x, centroids, iterations, weight):
    """Lloyd's rounds in float64; an empty cluster moves to the row that fits worst."""
    x, centroids = np.asarray(x, np.float64), np.asarray(centroids, np.float64)
    for _ in range(iterations):
        score = x @ centroids.T
        own, fit = score.argmax(1), np.where(weight > 0, score.max(1), np.inf)
        empty = [c for c in range(len(centroids)) if not weight[own == c].sum() > 0]
        for c in set(range(len(centroids))) - set(empty):
            total = (weight[own == c, None] * x[own == c]).sum(0)
            centroids[c] = total / np.linalg.norm(total)
        for c, row in zip(empty, np.argsort(fit, kind="stable"), strict=False):
            centroids[c] = x[row]
    return centroids, (x @ centroids.T).argmax(1)


@pytest.mark.parametrize("chunk", [2**24, 6 * 64])
def test_equals_the_slow_version(chunk, monkeypatch):
    monkeypatch.setattr(MODULE, "_PAIRS_AT_ONCE", chunk)
    jax.clear_caches()
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x, _ = blobs(seed, spread=rng.choice([0.1, 1.0]))
        weight = rng.choice([0.0, 0.5, 2.0], size=200).astype(np.float32)
        is_valid = rng.random(200) < 0.9
        start = x[:6].at[5].set(x[0]) if seed % 2 else x[:6]  # a copy gets no rows
        found = spherical_kmeans(
            x, 6, key=KEY, iterations=4, is_valid=is_valid, weight=jnp.asarray(weight), init=start
        )
        weight = np.where(is_valid, weight, 0)
        centroids, own = slow(x, start, 4, weight)
        np.testing.assert_allclose(found.centroids, centroids, atol=1e-5)
        np.testing.assert_array_equal(found.assignment, np.where(weight > 0, own, 6))
        np.testing.assert_array_equal(found.sizes, np.bincount(own[weight > 0], minlength=6))
    jax.clear_caches()


@pytest.mark.parametrize("init", ["random", "k-means++"])
def test_finds_well_separated_blobs_and_masks_rows(init):
    x, own = blobs(3)
    is_valid = jnp.arange(200) % 3 != 0
    poisoned = jnp.where(is_valid[:, None], x, jnp.roll(x, 1, axis=1))
    found = spherical_kmeans(x, 12, key=KEY, is_valid=is_valid, init=init)
    masked = spherical_kmeans(poisoned, 12, key=KEY, is_valid=is_valid, init=init)
    jax.tree.map(np.testing.assert_array_equal, found, masked)
    np.testing.assert_array_equal(np.asarray(found.assignment) == 12, ~is_valid)
    for cluster in range(12):
        assert len(set(own[np.asarray(found.assignment) == cluster])) <= 1
    assert float(found.scores[np.asarray(is_valid)].min()) > 0.9
    assert int(found.sizes.sum()) == int(is_valid.sum())


def test_a_sample_is_enough_and_all_rows_are_assigned():
    x, own = blobs(4)
    found = spherical_kmeans(x, 6, key=KEY, init="k-means++", sample=60)
    assert int(found.sizes.sum()) == 200
    assert all(len(set(own[np.asarray(found.assignment) == c])) == 1 for c in range(6))


def test_fewer_rows_than_clusters_and_no_rows():
    x = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    for init in ("random", "k-means++"):
        found = spherical_kmeans(x, 6, key=KEY, init=init)
        assert found.assignment[0] == found.assignment[3] != found.assignment[1]
        assert found.assignment[2] == 6
        np.testing.assert_allclose(found.scores, [1, 1, 0, 1], atol=1e-6)
        none = spherical_kmeans(x, 6, key=KEY, init=init, is_valid=jnp.zeros(4, bool))
        np.testing.assert_array_equal(none.assignment, 6)
        np.testing.assert_array_equal(none.centroids, 0)
        assert spherical_kmeans(x[:0], 6, key=KEY, init=init).sizes.tolist() == [0] * 6


def test_balance_splits_heavy_clusters():
    rng = np.random.default_rng(0)
    crowd = rng.normal(size=(960, 4)) + 5 * np.eye(4)[:1]
    x = np.concatenate([crowd, -np.eye(4)[np.arange(40) % 4]])
    x = normalize(jnp.asarray(x, jnp.float32))
    sizes = {
        balance: spherical_kmeans(
            x, 20, key=KEY, iterations=12, init="k-means++", balance=balance
        ).sizes
        for balance in (None, 1.5)
    }
    assert int(sizes[1.5].max()) < int(sizes[None].max())
    assert int(sizes[1.5].sum()) == 1000


def test_nearest_centroids_in_order():
    x, _ = blobs(5)
    centroids = jnp.concatenate([x[:3], x[:1], jnp.zeros((1, 8))])
    ids, scores = nearest_centroids(x, centroids, 5)
    expected = np.asarray(x @ centroids[:4].T)
    order = np.argsort(-expected, axis=1, kind="stable")
    np.testing.assert_allclose(scores[:, :4], np.take_along_axis(expected, order, 1), atol=1e-6)
    assert np.all(np.asarray(ids[:, 4]) == 5)
    is_both = np.asarray(ids[:, :-1] == 0)
    np.testing.assert_array_equal(np.asarray(ids[:, 1:])[is_both], 3)  # the tie: 0 before 3


WRONG = [
    ({"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
    ({"iterations": -1}, "iterations must be at least 0, got -1"),
    ({"sample": 0}, "sample must be at least 1, got 0"),
    ({"init": "best"}, "init must be 'random'.*got 'best'"),
    ({"init": jnp.ones((3, 8))}, r"init must have shape \(6, 8\), got \(3, 8\)"),
    ({"balance": 1.0}, "balance must be above 1, got 1.0"),
    ({"weight": jnp.ones(3)}, r"weight must have shape \(200,\), got \(3,\)"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_calls(change, message):
    options = {"num_clusters": 6, "key": KEY} | change
    with pytest.raises(ValueError, match=message):
        spherical_kmeans(blobs(0)[0], options.pop("num_clusters"), **options)
    with pytest.raises(ValueError, match="k must be between 1 and 6"):
        nearest_centroids(blobs(0)[0], jnp.ones((6, 8)), 7)
