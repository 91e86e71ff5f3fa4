"""Rows copied to their places: the kernels equal plain indexing to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.spread_rows import spread_rows

IMPLEMENTATIONS = ["xla", "interpret"]


def places(rng, num_rows, num_places, out_of):
    """Different places, some of them none, and what goes to each."""
    place = rng.permutation(out_of + 9)[: num_rows * num_places].reshape(num_rows, num_places)
    source = np.full(out_of + 9, place.size)
    source[place.reshape(-1)] = np.arange(place.size)
    return jnp.asarray(place, jnp.int32), jnp.asarray(source[:out_of], jnp.int32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("shape", [(7, 128), (33, 384), (5, 2048)])
@pytest.mark.parametrize("num_places", [1, 3])
def test_equals_indexing(shape, num_places, is_scaled, implementation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    place, source = places(rng, shape[0], num_places, 120)
    assert (place >= 120).any() or num_places * shape[0] < 30
    scale = rng.normal(size=place.shape).astype(np.float32) if is_scaled else None
    wanted = np.zeros((130, shape[1]), np.float32)
    for at, to in np.ndenumerate(place):
        wanted[to] = x[at[0]] * (scale[at] if is_scaled else 1)
    run = jax.jit(spread_rows, static_argnames="implementation")
    got = run(x, place, source, scale, implementation=implementation)
    np.testing.assert_array_equal(got, wanted[:120])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_products_are_rounded_once(implementation):
    x = jax.random.normal(jax.random.key(0), (16, 128), jnp.bfloat16)
    place, source = places(np.random.default_rng(1), 16, 2, 40)
    scale = jax.random.normal(jax.random.key(2), (16, 2))
    got = spread_rows(x, place, source, scale, implementation=implementation)
    for (i, k), at in np.ndenumerate(place):
        if at < 40:
            wanted = (x[i].astype(jnp.float32) * scale[i, k]).astype(jnp.bfloat16)
            np.testing.assert_array_equal(got[at], wanted)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"implementation must be .xla. or"):
        spread_rows(
            jnp.ones((2, 128)), jnp.zeros((2, 1), jnp.int32), jnp.zeros(32, jnp.int32),
            implementation="triton",
        )  # fmt: skip
