"""Layer normalisation of rows in groups: the kernel of the gradient, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.group_layer_norm import group_layer_norm, group_layer_norm_branch
from moe_jax.ops.grouped import is_row, make_groups, to_rows
from moe_jax.ops.layer_norm import EPS, layer_norm

SIZES = [70, 0, 1, 128, 3]


def case(width, dtype=jnp.float32):
    groups = make_groups(jnp.array(SIZES), sum(SIZES) + 64)
    rng = np.random.default_rng(width)
    x, grad = rng.normal(size=(2, groups.num_rows, width))
    scale, bias = rng.normal(size=(2, len(SIZES), width))
    there = np.asarray(is_row(groups))[:, None]
    x = np.where(there, 3 * x + 1, 0)
    arrays = (jnp.asarray(a, dtype) for a in (x, scale, bias, np.where(there, grad, 0)))
    return groups, *arrays


def gradients(implementation, groups, x, scale, bias, grad, activation=None):
    how = {"activation": activation, "implementation": implementation}

    def run(x, scale, bias):
        return group_layer_norm(x, scale, bias, groups, dtype=x.dtype, **how)

    out, pull = jax.vjp(run, x, scale, bias)
    return out, *pull(grad)


def by_hand(groups, x, scale, bias, grad, activation=None):
    """What a plain norm and automatic differentiation give."""

    def run(x, scale, bias):
        centred = x - x.mean(1, keepdims=True)
        unit = centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + EPS)
        out = unit * to_rows(scale, groups) + to_rows(bias, groups)
        return jax.nn.gelu(out, approximate=activation == "gelu_tanh") if activation else out

    out, pull = jax.vjp(run, x, scale, bias)
    return out, *pull(grad)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [256, 512])
def test_values_and_gradients_are_those_of_the_definition(width, activation, implementation):
    arguments = case(width)
    there = np.asarray(is_row(arguments[0]))
    for got, wanted in zip(
        jax.jit(gradients, static_argnums=(0, 6))(implementation, *arguments, activation),
        jax.jit(by_hand, static_argnums=5)(*arguments, activation),
        strict=True,
    ):
        if got.shape[0] == there.size:
            got, wanted = got[there], wanted[there]
        np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_sixteen_bits_are_computed_in_float32(implementation):
    arguments = case(256, jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), arguments[1:])
    there = np.asarray(is_row(arguments[0]))
    exact = jax.jit(by_hand)(arguments[0], *wide)
    for got, wanted in zip(gradients(implementation, *arguments), exact, strict=True):
        assert got.dtype == jnp.bfloat16
        got = np.asarray(got, np.float32)
        if got.shape[0] == there.size:
            got, wanted = got[there], np.asarray(wanted)[there]
        # Half of a unit in the last place, and a little for what was near the middle.
        np.testing.assert_allclose(got, wanted, rtol=0.51 * 2**-7, atol=2e-4)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_a_branch_is_the_input_and_its_norm_and_adds_their_gradients(implementation):
    groups, x, scale, bias, grad = case(256)
    how = {"dtype": x.dtype, "implementation": implementation}

    def both(x, scale, bias):
        return group_layer_norm_branch(x, scale, bias, groups, **how)

    (passed, unit), pull = jax.vjp(both, x, scale, bias)
    np.testing.assert_array_equal(passed, x)
    out, wanted, *others = gradients(implementation, groups, x, scale, bias, grad)
    np.testing.assert_array_equal(unit, out)
    found, *found_others = pull((2 * grad, grad))
    np.testing.assert_allclose(found, wanted + 2 * grad, rtol=1e-6, atol=1e-6)
    for a, b in zip(found_others, others, strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_scale_for_all_rows_sums_its_gradient_over_them():
    _, x, scale, bias, grad = case(256)
    out, pull = jax.vjp(lambda *a: layer_norm(*a, jnp.float32), x, scale[:1], bias[:1])
    assert out.shape == x.shape
    np.testing.assert_allclose(pull(grad)[2], grad.sum(0, keepdims=True), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12) and jax.default_backend() != "gpu",
    reason="this jax asks the GPU before it hands code to Triton",
)
def test_the_kernel_lowers():
    """Without a GPU: up to the code that is handed to Triton."""
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for a in case(256)[1:]]

    def run(*arrays):
        return gradients("pallas", make_groups(jnp.array(SIZES), sum(SIZES) + 64), *arrays)

    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "norm_backward" in text


def test_an_unknown_implementation_is_refused():
    groups, x, scale, bias, _ = case(256)
    with pytest.raises(ValueError, match=r"implementation must be .xla. or"):
        group_layer_norm(x, scale, bias, groups, dtype=x.dtype, implementation="triton")
