"""Moments in 16 bits: what they cost in precision, and that they move."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.config import TrainConfig
from moe_jax.training import make_optimizer, store_in_bfloat16

STEPS = 400


def moments(optimizer, grads):
    """AdamW's state after a stream of gradients."""
    params = {"w": jnp.zeros((64, 64)), "b": jnp.zeros(64)}

    @jax.jit
    def step(state, key):
        own = jax.tree.map(lambda a: grads * jax.random.normal(key, a.shape), params)
        return optimizer.update(own, state, params)[1], None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.lax.scan(step, optimizer.init(params), keys)[0]


def test_moments_follow_those_of_float32():
    exact = moments(optax.adamw(0.1, b2=0.999), 1.0)
    stored = moments(store_in_bfloat16(optax.adamw(0.1, b2=0.999)), 1.0)
    assert int(stored.count) == STEPS
    for name in ("mu", "nu"):
        near, own = (optax.tree_utils.tree_get(state, name) for state in (stored, exact))
        assert near["w"].dtype == jnp.bfloat16
        np.testing.assert_allclose(near["b"], own["b"], rtol=1e-5, atol=1e-7)
        difference = near["w"].astype(jnp.float32) - own["w"]
        # Each rounding is off by up to a 128th, and the mean of many by nothing.
        assert float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(own["w"] ** 2))) < 0.05
        assert abs(float(jnp.mean(difference))) < 0.01 * float(jnp.mean(jnp.abs(own["w"])))


def test_training_reaches_what_float32_reaches():
    wanted = jax.random.normal(jax.random.key(0), (16, 16))

    def error(optimizer):
        @jax.jit
        def step(state, key):
            w, own = state
            x = jax.random.normal(key, (32, 16))
            grads = jax.grad(lambda w: jnp.mean((x @ (w - wanted)) ** 2))(w)
            updates, own = optimizer.update(grads, own, w)
            return (optax.apply_updates(w, updates), own), None

        start = jnp.zeros((16, 16)), optimizer.init(jnp.zeros((16, 16)))
        (w, _), _ = jax.lax.scan(step, start, jax.random.split(jax.random.key(2), STEPS))
        return float(jnp.linalg.norm(w - wanted) / jnp.linalg.norm(wanted))

    exact = error(optax.adam(0.02))
    assert error(store_in_bfloat16(optax.adam(0.02))) < max(1.5 * exact, 0.02)


def test_the_config_chooses():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    for dtype in ("float32", "bfloat16"):
        optimizer = make_optimizer(TrainConfig(moment_dtype=dtype))
        state = optimizer.init(params)
        assert optax.tree_utils.tree_get(state, "nu")["w"].dtype == dtype
        assert optax.tree_utils.tree_get(state, "nu")["b"].dtype == "float32"
        updates, state = optimizer.update(params, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
