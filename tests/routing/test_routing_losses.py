"""Balance losses and statistics where their values are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import (
    make_plan,
    router_z_loss,
    routing_stats,
    switch_balance_loss,
    topk,
    usage_mse_loss,
)

E = 4
fast_switch_loss = jax.jit(switch_balance_loss)


@jax.jit
def measure(logits, is_valid):
    """Losses and statistics of two choices in two slots."""
    plan = make_plan(topk(logits, 2), num_experts=E, capacity=2, is_valid=is_valid)
    losses = (
        switch_balance_loss(logits, plan.expert, is_valid),
        usage_mse_loss(logits, is_valid),
        router_z_loss(logits, is_valid),
    )
    return losses, routing_stats(logits, plan, is_valid)


@jax.jit
def stats_of(logits):
    return routing_stats(logits, make_plan(topk(logits, 1), num_experts=E, capacity=8))


def one_hot_logits(scale):
    """Each expert is the clear favourite of a quarter of the tokens."""
    return scale * jnp.tile(jnp.eye(E), (2, 3, 1))


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_switch_loss_is_one_at_balance(scale, k):
    logits = one_hot_logits(scale)
    # Neighbours in a ring, so that second choices are balanced as well.
    expert = (jnp.argmax(logits, axis=-1)[..., None] + jnp.arange(k)[None, None]) % E
    np.testing.assert_allclose(fast_switch_loss(logits, expert), 1.0, rtol=1e-6)


def test_losses_of_a_collapsed_router():
    logits = jnp.zeros((2, 3, E)).at[..., 1].set(50.0)
    np.testing.assert_allclose(switch_balance_loss(logits, topk(logits, 1).expert), E, rtol=1e-6)
    np.testing.assert_allclose(usage_mse_loss(logits), (0.75**2 + 3 * 0.25**2) / 4, rtol=1e-6)
    np.testing.assert_allclose(router_z_loss(logits), 2500.0, rtol=1e-6)


def test_usage_mse_is_zero_at_balance():
    np.testing.assert_allclose(usage_mse_loss(one_hot_logits(3.0)), 0.0, atol=1e-12)


@pytest.mark.parametrize("loss", ["switch", "mse"])
def test_a_gradient_step_evens_the_use(loss):
    logits = jax.random.normal(jax.random.key(0), (2, 16, E)) + jnp.array([[[1.0, 0, 0, -1]]])

    def value(logits):
        if loss == "mse":
            return usage_mse_loss(logits)
        return switch_balance_loss(logits, topk(logits, 1).expert)

    run = jax.jit(jax.value_and_grad(value))
    before, gradient = run(logits)
    total = gradient.sum(axis=(0, 1))
    assert total[0] > 0 > total[3]
    assert run(logits - 10 * gradient)[0] < before


def test_z_loss_shrinks_logits():
    logits = 3 + jax.random.normal(jax.random.key(0), (1, 4, E))
    assert np.all(jax.jit(jax.grad(router_z_loss))(logits) > 0)


@pytest.mark.parametrize("fill", [1e4, np.nan])
def test_padding_counts_for_nothing(fill):
    logits = np.random.default_rng(0).normal(size=(2, 6, E)).astype(np.float32)
    is_valid = np.arange(6)[None] < np.array([[4], [4]])
    padded = np.where(is_valid[..., None], logits, np.float32(fill))

    short = measure(logits[:, :4], None)
    assert short[1].dropped_fraction > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), measure(padded, is_valid), short
    )
    nothing = measure(padded, np.zeros_like(is_valid))
    zero = jax.tree.leaves(nothing)
    # The mean use of no tokens is zero, which is 1/E away from balance.
    expected = [0.0, 1 / E**2, 0.0, np.zeros(E), 0.0, 0.0, 0.0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), zero, expected)


def test_stats_of_known_routings():
    logits = one_hot_logits(0.0)
    stats = stats_of(logits)
    np.testing.assert_allclose(stats.load, [1, 0, 0, 0])
    np.testing.assert_allclose(stats.max_over_mean, E)
    np.testing.assert_allclose(stats.dropped_fraction, 4 / 12, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy, np.log(E), rtol=1e-6)
    logits = one_hot_logits(100.0)
    stats = stats_of(logits)
    np.testing.assert_allclose(stats.load, 0.25)
    np.testing.assert_allclose(stats.max_over_mean, 1.0)
    np.testing.assert_allclose(stats.dropped_fraction, 0.0)
    np.testing.assert_allclose(stats.entropy, 0.0, atol=1e-6)
