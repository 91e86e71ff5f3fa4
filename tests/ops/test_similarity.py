"""Exact cosines: accuracy, and the same bits in every shape and order."""

import doctest
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax.ops
from moe_jax.ops import (
    exact_cosine,
    exact_cosine_at,
    exact_cosine_pairs,
    limbs,
    nearest,
    normalize,
)


@pytest.mark.parametrize("module", ["similarity", "top_k", "search.nearest", "independent"])
def test_examples_run(module):
    names = {**vars(moe_jax.ops), "jnp": jnp}
    module = importlib.import_module(f"moe_jax.ops.{module}")
    result = doctest.testmod(module, extraglobs=names)
    assert result.attempted > 0
    assert result.failed == 0


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("dim", [1, 512, 1500])
def test_cosine_is_accurate(dim):
    a, b = random(20, dim), random(9, dim, seed=1)
    a[1], b[1] = 1.0, 1.0  # every product positive: the largest sums
    b[2] = a[2]
    exact = exact_cosine(normalize(a), normalize(b))
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    assert np.abs(exact - a @ b.T / norms).max() < 2e-7 + 2.0**-24 * dim**0.5
    assert np.abs(exact - a @ b.T / norms).mean() < 1e-7


@pytest.mark.parametrize("dim", [512, 700])
def test_cosine_has_the_same_bits_in_every_order(dim):
    a, b = normalize(random(17, dim)), normalize(random(40, dim, seed=1))
    whole = np.asarray(exact_cosine(a, b))
    np.testing.assert_array_equal(np.asarray(exact_cosine(b, a)).T, whole)
    np.testing.assert_array_equal(exact_cosine(a[3:4], b)[0], whole[3])
    tiled = jnp.broadcast_to(a[:, None, :], (17, 40, dim))
    pairs = exact_cosine_pairs(tiled, jnp.broadcast_to(b[None], (17, 40, dim)))
    np.testing.assert_array_equal(pairs, whole)
    if dim <= 512:  # beyond, blocks are added in order
        shuffle = np.random.default_rng(2).permutation(dim)
        np.testing.assert_array_equal(exact_cosine(a[:, shuffle], b[:, shuffle]), whole)


def cosines_in_integers(a, b):
    """The definition, slowly: sums of whole numbers, which are then rounded one after another."""

    def parts(x):
        found, rest = [], np.asarray(x, np.float64)
        for _ in range(3):
            rest = rest * 256
            found.append(np.round(rest).astype(np.int64))
            rest = rest - found[-1]
        return found

    totals = np.zeros((4, len(a)), np.float32)
    for start in range(0, a.shape[1], 512):
        x, y = parts(a[:, start : start + 512]), parts(b[:, start : start + 512])
        for i in range(4):
            sums = sum(np.sum(x[j] * y[i - j], axis=1) for j in range(3) if 0 <= i - j < 3)
            assert np.abs(sums).max() <= 2**24
            totals[i] += sums.astype(np.float32)
    score = np.zeros(len(a), np.float32)
    for total, power in zip(totals, (16, 24, 32, 40), strict=True):
        score += total * np.float32(2.0**-power)
    return score


def awkward(rows, dim, seed):
    """Vectors of every length with copies, opposites, near copies, zeros and single entries."""
    generator = np.random.default_rng(seed)
    x = random(rows, dim, seed=seed) * 10.0 ** generator.integers(-30, 30, (rows, 1))
    x[1], x[2], x[3] = x[0], -x[0], np.nextafter(x[0].astype(np.float32), np.inf)
    x[4], x[5] = 0.0, 1.0
    x[6] = np.where(np.arange(dim) == dim // 2, -2.0, 0.0)
    return normalize(x.astype(np.float32))


@pytest.mark.parametrize(("rows", "many", "dim"), [(70, 8, 513), (9, 7, 512), (9, 40, 3)])
def test_cosines_have_the_bits_of_sums_of_integers(rows, many, dim):
    """The first shape is taken in several blocks on CPUs."""
    generator = np.random.default_rng(dim)
    queries, keys = awkward(rows, dim, 0), awkward(50, dim, 0)
    at = generator.integers(0, 50, (rows, many))
    at[:, :7] = np.arange(7)
    at = jnp.asarray(at)
    chosen, tiled = keys[at], jnp.broadcast_to(queries[:, None, :], (rows, many, dim))
    flat = (np.asarray(x).reshape(-1, dim) for x in (tiled, chosen))
    expected = cosines_in_integers(*flat).reshape(rows, many)
    forms = [
        exact_cosine_at(queries, keys, at),
        exact_cosine_pairs(tiled, chosen),
        jax.vmap(lambda x, i: exact_cosine_at(x[None], keys, i[None])[0])(queries, at),
        jnp.take_along_axis(exact_cosine(queries, keys), at, axis=1),
    ]
    if dim < 512:
        with jax.disable_jit():
            forms.append(exact_cosine_at(queries, keys, at))
    for form in forms:
        bits = np.asarray(form).view(np.int32)
        np.testing.assert_array_equal(bits, expected.view(np.int32))
    assert expected[0, 0] == expected[0, 1] == -expected[0, 2] > 0.999
    assert not np.any(expected[4])
    assert not np.any(expected[:, 4])


def test_sums_stay_exact_in_the_worst_case():
    """Limbs as large as they get, with one sign: partial sums stay within 2**24."""
    for dim in (512, 511, 256):
        parts = [np.abs(np.asarray(a, np.int64)) for a in limbs(normalize(np.ones((1, dim))))]
        a0, a1, a2 = (part.ravel() for part in parts)
        a1, a2 = np.full(dim, 128), np.full(dim, 128)
        assert max(a0 @ a0, 2 * (a0 @ a1), 2 * (a0 @ a2) + a1 @ a1, 2 * (a1 @ a2)) <= 2**24


def test_limbs_rebuild_the_number():
    x = np.linspace(-1, 1, 1001, dtype=np.float32)
    a0, a1, a2 = (np.asarray(a, np.float64) for a in limbs(jnp.asarray(x)))
    np.testing.assert_allclose(a0 / 2**8 + a1 / 2**16 + a2 / 2**24, x, rtol=0, atol=2.0**-25)
    assert np.abs(a0).max() <= 256
    assert max(np.abs(a1).max(), np.abs(a2).max()) <= 128


@pytest.mark.parametrize("scale", [1e-34, 1.0, 1e37])
def test_normalize_at_every_scale(scale):
    x = random(50, 7) * np.float32(scale)
    unit = np.asarray(normalize(x), np.float64)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, atol=2e-7)
    x = x.astype(np.float64)
    np.testing.assert_allclose(unit, x / np.linalg.norm(x, axis=1, keepdims=True), atol=2e-7)


@pytest.mark.parametrize("dim", [513])
def test_normalize_has_the_same_bits_in_every_shape(dim):
    x = random(24, dim)
    whole = np.asarray(normalize(x))
    np.testing.assert_array_equal(normalize(x.reshape(2, 3, 4, dim)).reshape(24, dim), whole)
    for i in range(3):
        np.testing.assert_array_equal(normalize(x[i]), whole[i])
    in_scan = jax.lax.scan(lambda c, row: (c, normalize(row)), 0, x)[1]
    np.testing.assert_array_equal(in_scan, whole)
    np.testing.assert_array_equal(jax.vmap(normalize)(x), whole)
    with jax.disable_jit():
        np.testing.assert_array_equal(normalize(x[:2]), whole[:2])
    np.testing.assert_array_equal(normalize(x * 8), whole)
    shuffle = np.random.default_rng(2).permutation(dim)
    np.testing.assert_array_equal(normalize(x[:, shuffle]), whole[:, shuffle])


def test_normalize_of_what_has_no_direction():
    x = np.array([[0, 0], [np.nan, 1], [np.inf, 1], [-np.inf, np.nan], [1e-40, 0]], np.float32)
    np.testing.assert_array_equal(normalize(x), 0.0)
    assert normalize(jnp.ones((2, 4), jnp.bfloat16)).dtype == jnp.float32


def test_normalize_rejects_what_it_could_not_sum():
    with pytest.raises(ValueError, match=r"x must be .* got shape \(16385,\)"):
        normalize(np.ones(16385))
    with pytest.raises(ValueError, match=r"x must be .* got shape \(\)"):
        normalize(1.0)


@pytest.mark.parametrize("k", [1, 3, 30])
def test_nearest_equals_scoring_everything(k):
    """Half of the keys are copies, so that ties are common and the rough pick is too close."""
    queries = normalize(random(6, 5))
    keys = np.array(normalize(random(30, 5, seed=1)))
    keys[:20] = keys[0]
    is_candidate = np.random.default_rng(2).random((6, 30)) < 0.8
    hits = nearest(queries, jnp.asarray(keys), jnp.asarray(is_candidate), k)
    full = np.where(is_candidate, exact_cosine(queries, jnp.asarray(keys)), -np.inf)
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    expected = np.take_along_axis(full, order, axis=1)
    is_there = expected > -np.inf
    np.testing.assert_array_equal(hits.scores, np.where(is_there, expected, 0.0))
    np.testing.assert_array_equal(hits.ids, np.where(is_there, order, 30))
    np.testing.assert_array_equal(hits.is_valid, is_there)
