"""Rows by their numbers: the kernel equals plain indexing to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.gather_rows import gather_rows


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("is_scaled", [False, True])
@pytest.mark.parametrize("shape", [(7, 128), (100, 384), (5, 1024)])
def test_equals_indexing(shape, is_scaled, implementation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    row = rng.integers(-1, shape[0] + 2, size=64)
    scale = rng.normal(size=64).astype(np.float32) if is_scaled else None
    there = (row >= 0) & (row < shape[0])
    wanted = np.where(there[:, None], x[np.clip(row, 0, shape[0] - 1)], 0)
    if implementation == "xla":
        # Plain indexing counts -1 from the end, which no caller does.
        row = np.where(row < 0, shape[0], row)
    if is_scaled:
        wanted = wanted * scale[:, None]
    run = jax.jit(gather_rows, static_argnames="implementation")
    got = run(x, row.astype(np.int32), scale, implementation=implementation)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_products_are_rounded_once(implementation):
    x = jax.random.normal(jax.random.key(0), (16, 128), jnp.bfloat16)
    row = jax.random.randint(jax.random.key(1), (32,), 0, 16)
    scale = jax.random.normal(jax.random.key(2), (32,))
    got = gather_rows(x, row, scale, implementation=implementation)
    wanted = (x[row].astype(jnp.float32) * scale[:, None]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got, wanted)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"implementation must be .xla. or"):
        gather_rows(jnp.ones((2, 128)), jnp.zeros(32, jnp.int32), implementation="triton")
