"""The supervisor: an even start, float32 decisions, and what each option changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import MoEConfig
from moe_jax.routing import expert_capacity, make_plan, routing_stats
from moe_jax.supervisor import BALANCE_BIAS, Supervisor

E, K, D = 4, 2, 8


def fields(**changes):
    return {"num_experts": E, "top_k": K, "num_heads": 2, **changes}


@functools.cache
def compiled(**changes):
    supervisor = Supervisor(**fields(**changes))
    return jax.jit(supervisor.init), jax.jit(supervisor.apply, static_argnums=3)


@functools.cache
def inputs():
    rng = np.random.default_rng(0)
    x, embeddings = rng.normal(size=(2, 6, D)), rng.normal(size=(E, D))
    return jnp.asarray(x, jnp.float32), jnp.asarray(embeddings, jnp.float32)


@functools.cache
def variables_of(**changes):
    rngs = {"params": jax.random.key(0), "router": jax.random.key(1)}
    return compiled(**changes)[0](rngs, *inputs())


@pytest.fixture(scope="module")
def start_of_the_default_system():
    c = MoEConfig()
    supervisor = Supervisor(c.num_experts, c.top_k_experts, c.num_gating_heads)
    capacity = expert_capacity(128, c.num_experts, c.top_k_experts, 1.25)

    @jax.jit
    def start(key):
        keys = jax.random.split(key, 3)
        x = jax.random.normal(keys[0], (8, 128, c.input_dim))
        embeddings = jax.random.normal(keys[1], (c.num_experts, c.input_dim))
        out, _ = supervisor.init_with_output(keys[2], x, embeddings)
        plan = make_plan(out.choices, num_experts=c.num_experts, capacity=capacity)
        return routing_stats(out.logits, plan), jnp.std(out.logits)

    return start


@pytest.mark.parametrize("seed", range(3))
def test_the_load_is_even_before_training(start_of_the_default_system, seed):
    stats, spread = start_of_the_default_system(jax.random.key(seed))
    assert np.all(stats.load > 0)
    assert stats.max_over_mean <= 2.0
    assert stats.dropped_fraction <= 0.1
    assert 0.5 < spread < 2.0


@pytest.mark.parametrize("gating_type", ["topk", "noisy_topk", "dense"])
def test_shapes(gating_type):
    variables = variables_of(gating_type=gating_type)
    out = compiled(gating_type=gating_type)[1](variables, *inputs())
    num_choices = E if gating_type == "dense" else K
    assert out.logits.shape == (2, 6, E)
    assert out.choices.expert.shape == out.choices.weight.shape == (2, 6, num_choices)
    np.testing.assert_array_equal(out.choices.expert[..., 0], out.logits.argmax(axis=-1))


def test_decisions_are_float32_whatever_the_input():
    x, embeddings = inputs()
    run, variables = compiled()[1], variables_of()
    low = run(variables, x.astype(jnp.bfloat16), embeddings)
    assert low.logits.dtype == low.choices.weight.dtype == jnp.float32
    same = run(variables, x.astype(jnp.bfloat16).astype(jnp.float32), embeddings)
    jax.tree.map(np.testing.assert_array_equal, low, same)


def test_without_the_residual_the_gate_sees_only_expert_embeddings():
    x, embeddings = inputs()
    same = jnp.broadcast_to(embeddings[:1], embeddings.shape)
    for residual in (True, False):
        # All embeddings alike: then the attention's result is the same for every token.
        logits = compiled(residual=residual)[1](variables_of(residual=residual), x, same).logits
        spread = np.ptp(logits, axis=(0, 1)).max()
        assert spread > 0.1 if residual else spread < 1e-5


def test_each_token_is_decided_alone():
    x, embeddings = inputs()
    run, variables = compiled()[1], variables_of()
    before, after = run(variables, x, embeddings), run(variables, x.at[:, 2:].add(1.0), embeddings)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, :2], b[:, :2]), before, after)
    assert not np.array_equal(before.logits[:, 2:], after.logits[:, 2:])


def test_many_tokens_and_few_take_the_same_logits():
    """Which matrices are multiplied first depends on how many tokens there are."""
    supervisor = Supervisor(num_experts=8, top_k=2, num_heads=2)
    rng = np.random.default_rng(1)
    x, embeddings = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((1, 512, 64), (8, 64)))
    variables = jax.jit(supervisor.init)(jax.random.key(0), x, embeddings)
    # Away from zero, where it starts, so that it counts.
    attention = variables["params"]["attention"]
    for name in ("query", "key_value", "out"):
        attention[name]["bias"] = jnp.asarray(rng.normal(size=attention[name]["bias"].shape))
    logits = jax.jit(lambda x: supervisor.apply(variables, x, embeddings).logits)
    np.testing.assert_allclose(logits(x[:, :1]), logits(x)[:, :1], rtol=1e-4, atol=1e-5)


def test_balance_bias_sways_the_choice_but_not_the_weights():
    run, variables = compiled(balance_bias=True)[1], variables_of(balance_bias=True)
    np.testing.assert_array_equal(variables["params"][BALANCE_BIAS], np.zeros(E))
    plain = run(variables, *inputs())
    swayed = {"params": {**variables["params"], BALANCE_BIAS: jnp.array([0.0, 0, 100, 0])}}
    out = run(swayed, *inputs())
    np.testing.assert_array_equal(out.logits, plain.logits)
    assert np.all(out.choices.expert[..., 0] == 2)
    assert not np.all(plain.choices.expert[..., 0] == 2)
    chosen = jnp.take_along_axis(out.logits, out.choices.expert, axis=-1)
    np.testing.assert_allclose(out.choices.weight, jax.nn.softmax(chosen, axis=-1), rtol=1e-5)
    assert BALANCE_BIAS not in variables_of()["params"]


def test_balance_bias_has_no_gradient():
    run = compiled(balance_bias=True)[1]

    def loss(variables):
        out = run(variables, *inputs())
        return jnp.sum(out.choices.weight[..., 0] ** 2) + jnp.sum(out.logits**2)

    gradient = jax.jit(jax.grad(loss))(variables_of(balance_bias=True))["params"]
    np.testing.assert_array_equal(gradient.pop(BALANCE_BIAS), np.zeros(E))
    # A key's bias adds the same to all scores, so the softmax hides it; every kernel learns.
    kernels = [(str(p), a) for p, a in jax.tree_util.tree_leaves_with_path(gradient)]
    assert all(np.any(a != 0) for path, a in kernels if "kernel" in path)


def test_noise_in_training_only():
    run, variables = compiled(gating_type="noisy_topk")[1], variables_of(gating_type="noisy_topk")
    still = run(variables, *inputs())
    plain = {"params": {k: v for k, v in variables["params"].items() if k != "noise"}}
    clean = compiled()[1](plain, *inputs())
    jax.tree.map(np.testing.assert_array_equal, still.choices, clean.choices)
    noisy = [
        run(variables, *inputs(), True, rngs={"router": jax.random.key(seed)}) for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(noisy[0].choices.weight, noisy[1].choices.weight)
    assert not np.array_equal(noisy[0].choices.weight, noisy[2].choices.weight)
    assert not np.array_equal(noisy[0].choices.weight, still.choices.weight)
    np.testing.assert_array_equal(noisy[0].logits, still.logits)
