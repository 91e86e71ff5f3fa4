"""What search kernels compute of a query, as ordinary operations."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.ops._kernel_parts import code_of, direction, fine_codes_of, sum_of_fine, unit_of


def test_fine_codes_lose_two_hundred_times_less_than_codes():
    # A few large coordinates leave few steps to the others.
    x = jax.random.normal(jax.random.key(0), (1, 256)) * jnp.where(jnp.arange(256) < 4, 8, 1)[None]
    rows = jax.random.randint(jax.random.key(1), (100, 256), -127, 128)
    towards = direction(x)
    exact = np.asarray(rows @ unit_of(x, towards)[0])
    coarse = rows @ code_of(x, towards)[0] * towards.scale
    fine = sum_of_fine(rows @ fine_codes_of(x, towards).astype(jnp.int32).T) * towards.scale
    error, coarse_error = (np.linalg.norm(np.asarray(a) - exact) for a in (fine, coarse))
    assert 1e-2 * coarse_error > error
    assert coarse_error > 1e-3 * np.linalg.norm(exact)


def test_a_vector_without_direction_has_no_codes():
    for x in (jnp.zeros((1, 64)), jnp.full((1, 64), jnp.nan)):
        assert not np.any(fine_codes_of(x, direction(x)))
