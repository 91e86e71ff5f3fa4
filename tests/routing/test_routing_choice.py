"""What every router keeps to, and what each adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import balanced_bias, dense, noisy_topk, topk

E = 5
ROUTERS = {
    "topk": (lambda logits: topk(logits, 3), 3),
    "topk of one": (lambda logits: topk(logits, 1), 1),
    "topk with a bias": (lambda logits: topk(logits, 3, jnp.arange(E) % 2 * 1.0), 3),
    "noisy_topk": (lambda logits: noisy_topk(logits, 0 * logits, 3, jax.random.key(0)), 3),
    "noisy_topk without noise": (lambda logits: noisy_topk(logits, logits, 3, None), 3),
    "dense": (dense, E),
}


@pytest.fixture(params=ROUTERS)
def router(request):
    return ROUTERS[request.param][0]


@pytest.fixture
def num_choices(request):
    return ROUTERS[request.node.callspec.params["router"]][1]


def random_logits(dtype=jnp.float32, scale=3.0):
    return (scale * jax.random.normal(jax.random.key(1), (2, 9, E))).astype(dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_choices_are_distinct_experts_with_weights_that_sum_to_one(router, num_choices, dtype):
    choices = router(random_logits(dtype))
    assert choices.expert.shape == choices.weight.shape == (2, 9, num_choices)
    assert choices.expert.dtype == jnp.int32
    assert choices.weight.dtype == jnp.float32
    assert np.all((choices.expert >= 0) & (choices.expert < E))
    assert all(len(set(row.tolist())) == num_choices for row in choices.expert.reshape(18, -1))
    assert np.all(choices.weight >= 0)
    np.testing.assert_allclose(choices.weight.sum(axis=-1), 1.0, atol=1e-6)


def test_weights_stay_finite_for_extreme_logits(router):
    choices = router(jnp.array([[[3e38, -3e38, 0.0, 1e-38, 3e38]]]))
    assert np.all(np.isfinite(choices.weight))
    np.testing.assert_allclose(choices.weight.sum(axis=-1), 1.0, atol=1e-6)


def test_jit_changes_nothing(router):
    logits = random_logits()
    plain, jitted = router(logits), jax.jit(router)(logits)
    np.testing.assert_array_equal(plain.expert, jitted.expert)
    np.testing.assert_allclose(plain.weight, jitted.weight, rtol=1e-6)


def test_a_choice_does_not_depend_on_other_tokens(router):
    if router is ROUTERS["noisy_topk"][0]:
        pytest.skip("the noise is drawn for the whole batch")
    logits = random_logits()
    alone = jax.tree.map(lambda *rows: jnp.concatenate(rows), router(logits[:1]), router(logits[1:]))
    jax.tree.map(np.testing.assert_array_equal, alone, router(logits))


@pytest.mark.parametrize("name", ["topk", "topk of one", "noisy_topk without noise", "dense"])
def test_ties_go_to_the_lower_id_best_first(name):
    router, k = ROUTERS[name]
    np.testing.assert_array_equal(router(jnp.zeros((1, 1, E))).expert[0, 0], np.arange(k))
    tied = router(jnp.array([[[0.0, 2.0, 1.0, 2.0, 1.0]]]))
    np.testing.assert_array_equal(tied.expert[0, 0], [1, 3, 2, 4, 0][:k])
    signed = router(jnp.array([[[-0.0, 0.0, -0.0, 0.0, 0.0]]]))
    np.testing.assert_array_equal(signed.expert[0, 0], np.arange(k))
    assert np.all(np.diff(router(random_logits()).weight, axis=-1) <= 0)


def test_topk_is_a_softmax_cut_and_normalised_again():
    logits = random_logits()
    choices = topk(logits, 2)
    cut = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), choices.expert, axis=-1)
    np.testing.assert_allclose(choices.weight, cut / cut.sum(axis=-1, keepdims=True), rtol=1e-5)


def test_a_bias_sways_who_is_chosen_but_not_the_weights():
    logits, bias = random_logits(), jnp.array([0.0, 0.0, 0.0, 0.0, 100.0])
    choices = topk(logits, 2, bias)
    assert np.all(choices.expert[..., 0] == E - 1)
    assert not np.all(topk(logits, 2).expert[..., 0] == E - 1)
    chosen = jnp.take_along_axis(logits, choices.expert, axis=-1)
    np.testing.assert_allclose(choices.weight, jax.nn.softmax(chosen, axis=-1), rtol=1e-6)
    gradient = jax.grad(lambda b: topk(logits, 2, b).weight[..., 0].sum())(bias)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("k", [0, -1, E + 1])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must lie in \[1, E=5\], got {k}"):
        topk(random_logits(), k)


def test_noise_has_the_scale_it_is_given():
    logits = jnp.zeros((1, 4000, 2))
    no_noise = jnp.stack([jnp.full((1, 4000), -50.0), jnp.full((1, 4000), 5.0)], axis=-1)
    choices = noisy_topk(logits, no_noise, 1, jax.random.key(0))
    # Expert 0 has no noise, expert 1 symmetric noise: each wins half the time.
    assert 0.45 < choices.expert.mean() < 0.55
    biased = noisy_topk(logits.at[..., 0].set(jax.nn.softplus(5.0)), no_noise, 1, jax.random.key(0))
    # A standard normal exceeds one with probability 0.159.
    assert 0.13 < biased.expert.mean() < 0.19
    other = noisy_topk(logits, no_noise, 1, jax.random.key(1))
    assert not np.array_equal(choices.expert, other.expert)
    silent = noisy_topk(logits, no_noise, 1, None)
    np.testing.assert_array_equal(silent.expert, 0)


def test_noise_logits_learn_through_the_weights():
    logits = random_logits()
    gradient = jax.grad(
        lambda n: (noisy_topk(logits, n, 2, jax.random.key(0)).weight[..., 0] ** 2).sum()
    )(logits)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)


def test_balanced_bias_moves_toward_balance():
    bias = jnp.zeros(4)
    np.testing.assert_array_equal(balanced_bias(bias, jnp.full(4, 0.25), 0.1), bias)
    moved = balanced_bias(bias, jnp.array([0.4, 0.3, 0.2, 0.1]), 0.1)
    np.testing.assert_allclose(moved, [-0.06, -0.02, 0.02, 0.06], atol=1e-7)
    clipped = balanced_bias(jnp.ones((2, 4)), jnp.array([[1.0, 0, 0, 0], [0.0, 0, 0, 1]]), 0.1)
    np.testing.assert_allclose(clipped, [[0.9, 1.1, 1.1, 1.1], [1.1, 1.1, 1.1, 0.9]], rtol=1e-6)


def test_balanced_bias_evens_out_a_skewed_router():
    logits = jax.random.normal(jax.random.key(0), (1, 512, 4)) + jnp.array([[[3.0, 0, 0, -3.0]]])

    @jax.jit
    def load_of(bias):
        return jnp.bincount(topk(logits, 1, bias).expert.ravel(), length=4) / 512

    bias = jnp.zeros(4)
    assert load_of(bias).max() > 0.9
    for _ in range(150):
        bias = balanced_bias(bias, load_of(bias), 0.1)
    assert load_of(bias).max() < 0.3
    assert load_of(bias).min() > 0.2
