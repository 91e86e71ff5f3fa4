"""What every router keeps to, and what each adds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import balanced_bias, dense, noisy_topk, topk

E = 5
# A router and its K. Each is compiled once: all their tests use one shape.
ROUTERS = {
    "topk": (jax.jit(lambda logits: topk(logits, 3)), 3),
    "topk of one": (jax.jit(lambda logits: topk(logits, 1)), 1),
    "topk with a bias": (jax.jit(lambda logits: topk(logits, 3, jnp.arange(E) % 2 * 1.0)), 3),
    "noisy_topk": (
        jax.jit(lambda logits: noisy_topk(logits, 0 * logits, 3, jax.random.key(0))),
        3,
    ),
    "noisy_topk without noise": (
        jax.jit(lambda logits: noisy_topk(logits, logits, 3, None)),
        3,
    ),
    "dense": (jax.jit(dense), E),
}
UNBIASED = ["topk", "topk of one", "noisy_topk without noise", "dense"]
each_router = pytest.mark.parametrize(("router", "k"), ROUTERS.values(), ids=ROUTERS)
each_unbiased = pytest.mark.parametrize(
    ("router", "k"), [ROUTERS[name] for name in UNBIASED], ids=UNBIASED
)


def random_logits():
    return np.random.default_rng(0).normal(size=(2, 9, E)).astype(np.float32) * 3


def everywhere(logits):
    return np.tile(np.array(logits, np.float32), (2, 9, 1))


@each_router
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_choices_are_distinct_experts_with_weights_that_sum_to_one(router, k, dtype):
    choices = router(random_logits().astype(dtype))
    assert choices.expert.shape == choices.weight.shape == (2, 9, k)
    assert choices.expert.dtype == jnp.int32
    assert choices.weight.dtype == jnp.float32
    expert, weight, probability = map(np.asarray, choices)
    np.testing.assert_allclose(
        probability / probability.sum(axis=-1, keepdims=True), weight, atol=1e-6
    )
    assert np.all((expert >= 0) & (expert < E))
    assert all(len(set(row)) == k for row in expert.reshape(18, -1).tolist())
    assert np.all(weight >= 0)
    np.testing.assert_allclose(weight.sum(axis=-1), 1.0, atol=1e-6)


@each_router
def test_weights_stay_finite_for_extreme_logits(router, k):
    weight = np.asarray(router(everywhere([3e38, -3e38, 0.0, 1e-38, 3e38])).weight)
    assert np.all(np.isfinite(weight))
    np.testing.assert_allclose(weight.sum(axis=-1), 1.0, atol=1e-6)


@each_router
def test_a_choice_does_not_depend_on_other_tokens(router, k):
    logits = random_logits()
    changed = logits.copy()
    changed[0, 3:] = -logits[0, 3:]
    before, after = router(logits), router(changed)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[0, :3], b[0, :3])
        np.testing.assert_array_equal(a[1], b[1])
    assert k == E or not np.array_equal(before.expert, after.expert)


@each_unbiased
def test_ties_go_to_the_lower_id_best_first(router, k):
    for logits, order in [
        ([0.0] * E, np.arange(E)),
        ([0.0, 2.0, 1.0, 2.0, 1.0], [1, 3, 2, 4, 0]),
        ([-0.0, 0.0, -0.0, 0.0, 0.0], np.arange(E)),
    ]:
        np.testing.assert_array_equal(router(everywhere(logits)).expert[1, 2], order[:k])
    assert np.all(np.diff(np.asarray(router(random_logits()).weight), axis=-1) <= 0)


def test_eager_equals_jit():
    logits = jnp.asarray(random_logits())
    np.testing.assert_array_equal(topk(logits, 3).expert, ROUTERS["topk"][0](logits).expert)
    noisy = noisy_topk(logits, 0 * logits, 3, jax.random.key(0))
    np.testing.assert_array_equal(noisy.expert, ROUTERS["noisy_topk"][0](logits).expert)


def test_topk_is_a_softmax_cut_and_normalised_again():
    logits = jnp.asarray(random_logits())
    choices = topk(logits, 2)
    cut = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), choices.expert, axis=-1)
    np.testing.assert_allclose(choices.weight, cut / cut.sum(axis=-1, keepdims=True), rtol=1e-5)


def test_a_bias_sways_who_is_chosen_but_not_the_weights():
    logits, bias = jnp.asarray(random_logits()), jnp.array([0.0, 0.0, 0.0, 0.0, 100.0])
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
        topk(jnp.asarray(random_logits()), k)


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
    logits = jnp.asarray(random_logits())

    @jax.jit
    @jax.grad
    def gradient_of(noise_logits):
        choices = noisy_topk(logits, noise_logits, 2, jax.random.key(0))
        return (choices.weight[..., 0] ** 2).sum()

    gradient = gradient_of(logits)
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
        return jnp.mean(jax.nn.one_hot(topk(logits, 1, bias).expert, 4), axis=(0, 1, 2))

    bias = jnp.zeros(4)
    assert load_of(bias).max() > 0.9
    for _ in range(150):
        bias = balanced_bias(bias, load_of(bias), 0.1)
    assert load_of(bias).max() < 0.3
    assert load_of(bias).min() > 0.2
