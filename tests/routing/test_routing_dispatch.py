"""Dispatch and combine: inverse to each other, differentiable, and deaf to empty slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle
from routing_cases import slots_of

from moe_jax.routing import combine, dispatch, dispatch_index, gather_choices, make_plan, topk

B, S, E, K, D = 2, 9, 4, 2, 3


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnames="capacity")
def fast_plan(logits, is_valid, capacity):
    return make_plan(topk(logits, K), num_experts=E, capacity=capacity, is_valid=is_valid)


@functools.cache
def skewed_plan(capacity):
    """Expert 0 overflows, expert 3 stays empty, two tokens are padding."""
    logits = random(0, B, S, E) + jnp.array([2.0, 0, 0, -100])[None, None]
    is_valid = np.ones((B, S), bool)
    is_valid[0, 4] = is_valid[1, 8] = False
    return fast_plan(logits, is_valid, capacity)


@functools.partial(jax.jit, static_argnames="capacity")
def there_and_back(x, plan, capacity):
    index = dispatch_index(plan, E, capacity)
    return combine(dispatch(x, index).x, plan.weight, index)


def test_combine_undoes_dispatch_when_nothing_is_dropped():
    x = random(1, B, S, D)
    plan = skewed_plan(16)
    is_valid = np.asarray(plan.is_kept).all(axis=-1, keepdims=True)
    assert is_valid.sum() == B * S - 2  # all but padding
    np.testing.assert_allclose(there_and_back(x, plan, 16), x * is_valid, rtol=1e-6)


def test_dropped_choices_contribute_zero():
    x, plan = random(1, B, S, D), skewed_plan(4)
    kept = np.where(plan.is_kept, plan.weight, 0.0).sum(axis=-1, keepdims=True)
    assert np.any(kept == 0)
    assert np.any((kept > 0) & (kept < 0.99))
    back = there_and_back(x, plan, 4)
    np.testing.assert_allclose(back, x * kept, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.asarray(back)[kept[..., 0] == 0], 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype):
    plan = skewed_plan(4)
    index = dispatch_index(plan, E, 4)
    inputs = dispatch(jnp.asarray(random(1, B, S, D), dtype), index)
    assert inputs.x.dtype == combine(inputs.x, plan.weight, index).dtype == dtype
    assert np.all(np.asarray(inputs.x)[~np.asarray(inputs.is_valid)] == 0)


@pytest.fixture(params=[3, 16], ids=["drops", "no drops"])
def routed(request):
    capacity = request.param
    plan = skewed_plan(capacity)
    slots = slots_of(plan)
    dense = oracle.one_hot(np.asarray(plan.expert), slots, E, capacity)
    return plan, dispatch_index(plan, E, capacity), dense, capacity


def test_gradients_equal_those_of_a_dense_one_hot(routed):
    plan, index, dense, capacity = routed
    x, kernel = random(1, B, S, D), random(2, E, D, D)
    outputs, target = random(3, E, B, capacity, D), random(4, B, S, D)

    def fast(x, weight, outputs):
        hidden = jnp.tanh(jnp.einsum("ebcd,edo->ebco", dispatch(x, index).x, kernel))
        return jnp.sum(combine(hidden * outputs, weight, index) * target)

    def slow(x, weight, outputs):
        buffer = jnp.einsum("bskec,bsd->ebcd", dense, x)
        hidden = jnp.tanh(jnp.einsum("ebcd,edo->ebco", buffer, np.asarray(kernel, np.float64)))
        total = jnp.einsum("bskec,bsk,ebco->bso", dense, weight, hidden * outputs)
        return jnp.sum(total * target)

    arguments = (x, np.asarray(plan.weight), outputs)
    actual = jax.jit(jax.value_and_grad(fast, (0, 1, 2)))(*arguments)
    with jax.enable_x64(True):
        arguments = [jnp.asarray(a, jnp.float64) for a in arguments]
        expected = jax.tree.map(
            np.asarray, jax.jit(jax.value_and_grad(slow, (0, 1, 2)))(*arguments)
        )
    assert expected[1][0].dtype == np.float64
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected
    )


def test_nan_in_empty_slots_reaches_nothing(routed):
    plan, index, _, capacity = routed
    x, kernel = random(1, B, S, D), random(2, E, 1, 1, D)
    empty = ~dispatch(x, index).is_valid[..., None]
    assert np.any(np.all(empty, axis=(1, 2, 3)))

    def loss(x, weight, outputs, poison):
        filled = jnp.where(empty, poison, dispatch(x, index).x * kernel + outputs)
        total = combine(filled, weight, index)
        return jnp.sum(total**2), total

    outputs = random(3, E, B, capacity, D)
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    clean = run(x, plan.weight, outputs, 0.0)
    poisoned = run(x, plan.weight, outputs, np.nan)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(clean))
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


def test_gradients_into_empty_slots_are_zero(routed):
    plan, index, _, capacity = routed
    gradient = jax.grad(lambda o: combine(o, plan.weight, index).sum())(
        jnp.ones((E, B, capacity, D))
    )
    is_valid = np.asarray(dispatch(random(1, B, S, D), index).is_valid)
    np.testing.assert_array_equal(np.asarray(gradient)[~is_valid], 0.0)
    assert np.all(np.asarray(gradient)[is_valid] > 0)


def test_nan_in_a_dropped_tokens_gradient_stays_there():
    x, plan = random(1, B, S, D), skewed_plan(3)
    _, pull = jax.vjp(lambda x: there_and_back(x, plan, 3), x)
    lost = ~np.any(np.asarray(plan.is_kept), axis=-1)
    assert lost.any()
    incoming = jnp.where(lost[..., None], jnp.nan, jnp.ones((1, 1, D)))
    (gradient,) = pull(incoming)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(np.asarray(gradient)[lost], 0.0)


def test_gather_choices_picks_the_chosen():
    outputs = random(1, E, B, S, D)
    expert = np.random.default_rng(2).integers(E, size=(B, S, K)).astype(np.int32)
    picked = gather_choices(outputs, jnp.asarray(expert))
    for b, s, k in np.ndindex(B, S, K):
        np.testing.assert_array_equal(picked[b, s, k], outputs[expert[b, s, k], b, s])
