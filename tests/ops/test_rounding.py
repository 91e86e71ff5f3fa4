"""Stochastic rounding: to a neighbour, right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.rounding import stochastic_round

COUNT = 4096


def neighbours(x):
    """The bfloat16 numbers that enclose x, by cutting its bits."""
    bits = np.float32(x).view(np.uint32)
    return [np.uint32(b).view(np.float32) for b in (bits >> 16 << 16, (bits >> 16) + 1 << 16)]


@pytest.mark.parametrize("x", [1.001, -3.14159, 1e-30, 7e-39, -2.5e30, 0.1])
def test_goes_to_a_neighbour_and_keeps_the_mean(x):
    rounded = np.asarray(stochastic_round(jnp.full(COUNT, x, jnp.float32), jax.random.key(0)))
    rounded = rounded.astype(np.float64)
    low, high = (float(a) for a in neighbours(x))
    assert set(rounded.tolist()) <= {low, high}
    up = (np.float64(np.float32(x)) - low) / (high - low)
    share = (rounded == high).mean()
    assert abs(share - up) < 5 * np.sqrt(max(up * (1 - up), 1e-9) / COUNT) + 2**-16


@pytest.mark.parametrize("x", [0.0, 1.0, -2.5, np.inf, -np.inf, np.nan, 3.3895314e38])
def test_what_bfloat16_holds_stays(x):
    rounded = stochastic_round(jnp.full(64, x, jnp.float32), jax.random.key(1))
    np.testing.assert_array_equal(rounded.astype(jnp.float32), np.full(64, x, np.float32))


def test_keys_decide():
    x = jnp.full(COUNT, 1 + 2**-9, jnp.float32)
    one, same, other = (stochastic_round(x, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert abs(float((one == other).mean()) - 0.625) < 0.05  # both up or both down: 1/16 + 9/16


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="x must be float32, got bfloat16"):
        stochastic_round(jnp.ones(3, jnp.bfloat16), jax.random.key(0))
