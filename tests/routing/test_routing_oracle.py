"""Routing against loops and dicts, on random cases with ties, padding and overflow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import (
    PRIORITIES,
    SHAPES,
    expected_route,
    fast_route,
    random_case,
    route,
    slots_of,
    vmapped_route,
)

from moe_jax.routing import topk

fast_topk = jax.jit(topk, static_argnames="k")


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_routing_equals_the_oracle(shape, priority, seed):
    case = random_case(np.random.default_rng(seed), shape)
    actual = fast_route(*case, k=shape[3], capacity=shape[4], priority=priority)
    expected = expected_route(case, shape, priority)
    plan, inputs = actual["plan"], actual["inputs"]
    np.testing.assert_array_equal(plan.expert, expected["expert"])
    close(plan.weight, expected["weight"])
    assert slots_of(plan) == expected["slots"]
    dropped = ~np.asarray(plan.is_kept) & case.is_valid[..., None]
    assert np.all(np.asarray(plan.slot)[dropped] >= shape[4])
    buffer, is_valid, position = expected["inputs"]
    np.testing.assert_array_equal(inputs.x, buffer.astype(np.float32))
    np.testing.assert_array_equal(inputs.is_valid, is_valid)
    np.testing.assert_array_equal(inputs.position, position)
    close(actual["output"], expected["output"])
    for name, value in expected["stats"].items():
        close(getattr(actual["stats"], name), value)
    for name in ("switch", "mse", "z"):
        close(actual[name], expected[name])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_biased_choice_equals_the_oracle(seed):
    rng = np.random.default_rng(seed)
    logits = random_case(rng, SHAPES[0]).logits
    bias = np.round(rng.normal(size=logits.shape[-1])).astype(np.float32)
    expert, weight = oracle.topk(logits, 2, bias)
    choices = fast_topk(logits, k=2, bias=bias)
    np.testing.assert_array_equal(choices.expert, expert)
    close(choices.weight, weight)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_eager_and_vmap_equal_jit(priority):
    shape = SHAPES[0]
    options = {"k": shape[3], "capacity": shape[4], "priority": priority}
    cases = [random_case(np.random.default_rng(seed), shape) for seed in range(4)]
    many = vmapped_route(*map(np.stack, zip(*cases, strict=True)), **options)
    many = jax.tree.map(np.asarray, many)
    for i, case in enumerate(cases):
        alone = fast_route(*case, **options)
        jax.tree.map(lambda a, b, i=i: close(a[i], b), many, alone)
        for name in ("expert", "slot", "is_kept"):
            np.testing.assert_array_equal(
                getattr(many["plan"], name)[i], getattr(alone["plan"], name)
            )
    if priority == "probability":  # the one that runs the others' code as well
        eager = route(*map(jnp.asarray, cases[0]), **options)
        jax.tree.map(close, eager, fast_route(*cases[0], **options))
