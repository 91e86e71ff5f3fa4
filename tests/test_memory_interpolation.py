"""Mixing next symbols in: distributions, what no hit does, gradients, and slow oracles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.memory import (
    MemoryInterpolation,
    gather_evidence,
    memory_distribution,
    memory_weights,
)

T, K, V = 24, 6, 11


@functools.cache
def case():
    """Positions with ties, repeated symbols, symbols out of range, few hits and none at all."""
    rng = np.random.default_rng(0)
    log_model = np.log(rng.dirichlet(np.full(V, 0.3), size=T) + 1e-9).astype(np.float32)
    log_model = np.array(jax.nn.log_softmax(log_model))
    log_model[5] = -np.inf
    log_model[5, 3] = 0.0
    scores = np.sort(rng.uniform(-1, 1, size=(T, K)).astype(np.float32))[:, ::-1].copy()
    scores[2] = scores[2, 0]
    symbols = rng.integers(V, size=(T, K)).astype(np.int32)
    symbols[3] = symbols[3, 0]
    symbols[4, 1], symbols[4, 2] = -1, V
    is_valid = rng.uniform(size=(T, K)) < 0.8
    is_valid[:2] = False
    target = rng.integers(V, size=T).astype(np.int32)
    return tuple(map(jnp.asarray, (log_model, scores, symbols, is_valid, target)))


@functools.cache
def compiled(is_constant=False):
    gate = MemoryInterpolation(is_constant=is_constant)

    def short(variables, *arguments):
        evidence = gather_evidence(*arguments)
        return gate.apply(variables, evidence, method="target_log_prob")

    return jax.jit(gate.apply), jax.jit(short)


def variables(is_constant=False):
    slope = {} if is_constant else {"slope": jnp.linspace(-1.0, 1.5, 7)}
    return {"params": {"log_sharpness": jnp.float32(1.5), "bias": jnp.float32(-0.4), **slope}}


def oracle(log_model, scores, symbols, is_valid, params):
    """One position, with dicts."""
    hits = [i for i in range(K) if is_valid[i] and 0 <= symbols[i] < V]
    if not hits:
        return np.exp(log_model)
    sharpness = np.exp(float(params["log_sharpness"]))
    raw = {i: np.exp(sharpness * float(scores[i])) for i in hits}
    mass = {}
    for i in hits:
        symbol = int(symbols[i])
        mass[symbol] = mass.get(symbol, 0.0) + raw[i] / sum(raw.values())
    logit = float(params["bias"])
    if "slope" in params:
        model = np.exp(log_model.astype(np.float64))
        best = max(float(scores[i]) for i in hits)
        order = [int(symbols[i]) for i in hits]
        favourite = max(order, key=lambda s: (mass[s], -order.index(s)))
        entropy = -sum(p * np.log(p) for p in model if p > 0)
        agreement = sum(share * model[s] for s, share in mass.items())
        features = [best, best**2, entropy, model.max(), mass[favourite], agreement]
        logit += float(np.dot([*features, model[favourite]], np.asarray(params["slope"])))
    share = 1 / (1 + np.exp(-logit))
    return np.array([(1 - share) * np.exp(log_model[v]) + share * mass.get(v, 0) for v in range(V)])


@pytest.mark.parametrize("is_constant", [False, True])
def test_it_equals_the_oracle(is_constant):
    arguments = case()[:4]
    params = variables(is_constant)
    mixed = np.exp(compiled(is_constant)[0](params, *arguments))
    for t in range(T):
        expected = oracle(*(np.asarray(a)[t] for a in arguments), params["params"])
        np.testing.assert_allclose(mixed[t], expected, rtol=2e-5, atol=1e-7)


def test_it_sums_to_one_and_no_hits_are_the_model_to_the_bit():
    log_model, *hits, _ = case()
    mixed = compiled()[0](variables(), log_model, *hits)
    np.testing.assert_allclose(np.exp(mixed).sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(mixed[:2], log_model[:2])
    assert not np.any(np.all(np.asarray(mixed[2:] == log_model[2:]), axis=-1))


def test_the_targets_entry_is_the_same_without_the_distribution():
    *arguments, target = case()
    mixed = compiled()[0](variables(), *arguments)
    expected = np.take_along_axis(np.asarray(mixed), np.asarray(target)[:, None], axis=1)[:, 0]
    short = compiled()[1](variables(), *arguments, target)
    np.testing.assert_allclose(short, expected, rtol=1e-5, atol=1e-6)


def test_the_share_does_not_know_the_target():
    """Probabilities of all targets in turn must make a distribution."""
    *arguments, target = case()
    all_targets = [np.exp(compiled()[1](variables(), *arguments, target * 0 + v)) for v in range(V)]
    np.testing.assert_allclose(np.sum(all_targets, axis=0), 1.0, rtol=1e-5)


def test_shuffled_symbols_change_it():
    log_model, scores, symbols, is_valid, _ = case()
    run = compiled()[0]
    before = run(variables(), log_model, scores, symbols, is_valid)
    after = run(variables(), log_model, scores, jnp.roll(symbols, 7, axis=0), is_valid)
    assert np.mean(np.any(np.abs(np.exp(before) - np.exp(after)) > 1e-3, axis=-1)) > 0.5


def test_gradients_are_right_and_finite():
    log_model, *rest = case()

    def loss(params, log_model):
        picked = compiled()[1](params, log_model, *rest)
        return -jnp.mean(jnp.where(picked > -50, picked, 0.0))

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    params, finite = variables(), jnp.maximum(log_model, -30.0)
    value, (of_params, of_model) = value_and_grad(params, finite)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((of_params, of_model)))
    for name, index in (("log_sharpness", ()), ("bias", ()), ("slope", (2,)), ("slope", (6,))):
        step = 1e-2
        ends = []
        for sign in (1, -1):
            leaf = params["params"][name].at[index].add(sign * step)
            ends.append(value_and_grad({"params": {**params["params"], name: leaf}}, finite)[0])
        numeric = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(of_params["params"][name][index], numeric, rtol=2e-2, atol=1e-4)
    assert np.isfinite(value)


def test_weights_and_distribution_of_nothing_are_zero():
    none = jnp.zeros((2, K), bool)
    weights = memory_weights(jnp.ones((2, K)), none, jnp.float32(5.0))
    np.testing.assert_array_equal(weights, 0.0)
    symbols = jnp.full((2, K), -1, jnp.int32)
    np.testing.assert_array_equal(memory_distribution(weights, symbols, V), jnp.zeros((2, V)))


def test_under_vmap_it_is_the_same():
    log_model, *hits, _ = case()
    run = compiled()[0]
    whole = run(variables(), log_model, *hits)
    halves = jax.vmap(run, in_axes=(None, 0, 0, 0, 0))(
        variables(), *(a.reshape(2, T // 2, -1) for a in (log_model, *hits))
    )
    np.testing.assert_allclose(np.exp(halves.reshape(T, V)), np.exp(whole), atol=1e-6)
