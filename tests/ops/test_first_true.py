"""Where the first true entries of a mask are, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import first_true

find = jax.jit(first_true, static_argnums=1)


@pytest.mark.parametrize("count", [0, 1, 3, 40, 300, 500])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_as_numpy(count, share):
    mask = np.random.default_rng(count).random(300) < share
    at = np.flatnonzero(mask)[:count]
    expected = np.pad(at, (0, count - at.size), constant_values=300)
    found = find(jnp.asarray(mask), count)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_of_nothing():
    assert find(jnp.zeros(0, bool), 2).tolist() == [0, 0]
