"""Dropout by a hash: its rate, its scale, and that nothing about a mask predicts another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.dropout import dropout

SHAPE = (256, 256)
COUNT = SHAPE[0] * SHAPE[1]


def mask(key, rate=0.5, shape=SHAPE):
    return np.asarray(dropout(jnp.ones(shape), rate, key)) > 0


def is_by_chance(mean, rate, count):
    """Within five standard deviations of what independent draws give."""
    return abs(mean - rate) < 5 * np.sqrt(rate * (1 - rate) / count)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_keeps_as_many_as_it_should(rate, seed):
    assert is_by_chance(mask(jax.random.key(seed), rate).mean(), 1 - rate, COUNT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keeps_the_mean_and_scales_the_gradient_alike(dtype):
    x = jax.random.normal(jax.random.key(0), SHAPE, dtype)
    y, pull = jax.vjp(lambda x: dropout(x, 0.25, jax.random.key(1)), x)
    kept = mask(jax.random.key(1), 0.25)
    wanted = jnp.where(kept, x * jnp.asarray(1 / 0.75, dtype), 0)
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(pull(x)[0], wanted)


def test_neighbours_are_independent():
    kept = mask(jax.random.key(2))
    for shift in (1, 2, 3, 4, 8, 16, 32, 64, 128):
        for axis in (0, 1):
            both = kept == np.roll(kept, shift, axis)
            assert is_by_chance(both.mean(), 0.5, COUNT), (shift, axis)


def test_rows_and_columns_keep_their_share():
    kept = mask(jax.random.key(3))
    for axis in (0, 1):
        share = kept.mean(axis)
        spread = share.var() / (0.25 / SHAPE[axis])
        # The variance of 256 shares has a relative standard deviation of sqrt(2 / 255).
        assert abs(spread - 1) < 5 * np.sqrt(2 / 255)


def test_keys_are_independent():
    # Keys of one step, of consecutive steps, and split ones, all pairs.
    keys = [jax.random.key(i) for i in range(4)]
    keys += list(jax.random.split(jax.random.key(0), 4))
    keys += [jax.random.fold_in(jax.random.key(9), i) for i in range(4)]
    masks = [mask(key) for key in keys]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert is_by_chance((a == b).mean(), 0.5, COUNT)
            # Nor is one the other with its places exchanged, as a key that is merely added or
            # exclusive-ored to the place would make it.
            for shift in (1, 2, 4, 8, 64, 256):
                assert is_by_chance((a == np.roll(b, shift, 1)).mean(), 0.5, COUNT)


def test_mapped_keys_give_their_own_masks():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.ones((3, 8, 8))
    each = jax.vmap(lambda x, key: dropout(x, 0.5, key))(x, keys)
    for i in range(3):
        np.testing.assert_array_equal(each[i], dropout(x[i], 0.5, keys[i]))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=f"rate must be in .* got {rate}"):
        dropout(jnp.ones(3), rate, jax.random.key(0))
