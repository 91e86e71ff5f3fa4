"""The leader rule in rounds equals the leader rule one item at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import first_independent

fast = jax.jit(first_independent)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
def test_equals_one_at_a_time(density):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        is_near = np.tril(rng.random((24, 24)) < density, k=-1)
        may_lead = rng.random(24) < 0.8
        leads = np.zeros(24, bool)
        for i in range(24):
            leads[i] = may_lead[i] and not (is_near[i] & leads).any()
        np.testing.assert_array_equal(fast(jnp.asarray(is_near), jnp.asarray(may_lead)), leads)


def test_a_chain_takes_every_second_item():
    chain = jnp.eye(9, k=-1, dtype=bool)
    np.testing.assert_array_equal(fast(chain, jnp.ones(9, bool)), np.arange(9) % 2 == 0)
