"""Codes are near their vectors, and the same bits in every shape and program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import encode, normalize


@pytest.mark.parametrize("dim", [1, 2, 64, 600])
def test_the_error_bounds_the_difference(dim):
    x = np.random.default_rng(dim).normal(size=(200, dim)).astype(np.float32)
    x[:50] *= np.random.default_rng(0).random((50, dim)) < 0.1
    unit = np.asarray(normalize(x), np.float64)
    code, scale, error = encode(jnp.asarray(unit, jnp.float32))
    assert code.dtype == jnp.int8
    rest = unit - np.asarray(code, np.float64) * np.asarray(scale, np.float64)[:, None]
    length = np.linalg.norm(rest, axis=1)
    assert (length <= error).all()
    assert (np.asarray(error) <= length + (2 + dim**0.5) / 2**14).all()
    # Half a step, and 127 steps times the rounding of the inverse scale, 2**-13.
    assert (np.abs(rest) <= 0.516 * np.asarray(scale)[:, None]).all()


def test_zero_is_zero():
    assert not any(np.asarray(part).any() for part in encode(jnp.zeros((2, 3))))


def test_the_same_bits_in_every_program():
    unit = normalize(np.random.default_rng(1).normal(size=(97, 48)))
    whole = encode(unit)
    alone = [encode(unit[i : i + 1]) for i in range(0, 97, 8)]
    fused = jax.jit(lambda x: jax.tree.map(lambda part: part[::8], encode(normalize(x * 2))))(unit)
    for part, expected in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([one[part] for one in alone]), expected[::8])
        np.testing.assert_array_equal(fused[part], jax.jit(encode)(normalize(unit * 2))[part][::8])
