"""Activations against jax's own, and their gradients against automatic differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.activations import activate, sigmoid

BY_JAX = {
    None: lambda x: x,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "swiglu": lambda x: jax.nn.silu(x[..., :4]) * x[..., 4:],
}


@pytest.mark.parametrize("activation", BY_JAX)
def test_values_and_gradients_are_those_of_jax(activation):
    keys = jax.random.split(jax.random.key(0))
    x = 3 * jax.random.normal(keys[0], (50, 8))
    # Up to one, since a gradient's error grows with what it is multiplied by.
    grad = jax.random.uniform(keys[1], (50, 8), minval=-1.0)
    for dtype, tolerance in ((jnp.float32, 2e-6), (jnp.bfloat16, 2**-7)):
        out, pull = jax.vjp(lambda x: activate(x, activation), x.astype(dtype))
        wide = x.astype(dtype).astype(jnp.float32)
        wanted, pull_wanted = jax.vjp(BY_JAX[activation], wide)
        weight = grad[:, : out.shape[1]].astype(dtype)
        pairs = (out, wanted), (pull(weight)[0], pull_wanted(weight.astype(jnp.float32))[0])
        for got, right in pairs:
            assert got.dtype == dtype
            got = np.asarray(got, np.float32)
            np.testing.assert_allclose(got, right, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_large_numbers_stay_finite(activation):
    x = jnp.array([-1e4, -300.0, -20.0, 0.0, 20.0, 300.0, 1e4])
    out, pull = jax.vjp(lambda x: activate(x, activation), x)
    np.testing.assert_allclose(out, jnp.maximum(x, 0), atol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0], jnp.where(x == 0, 0.5, x > 0), atol=1e-6)


def test_the_sigmoid_keeps_its_relative_precision_far_out():
    x = jnp.linspace(-60.0, 60.0, 241)
    np.testing.assert_allclose(sigmoid(x), jax.nn.sigmoid(x), rtol=1e-5)
