"""Two-stage top-k equals the one-stage one, ties included."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import top_k

fast_top_k = jax.jit(top_k, static_argnums=1, static_argnames="chunk_size")


@pytest.mark.parametrize("shape", [(10,), (3, 64), (2, 3, 65)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("k", [0, 1, 10])
def test_equals_one_stage(shape, dtype, k):
    x = np.random.default_rng(0).integers(-3, 4, size=shape)
    x = x if dtype == "int32" else np.where(x == -3, -np.inf, x)
    x = jnp.asarray(x, dtype)
    values, indices = fast_top_k(x, k, chunk_size=16)
    expected_values, expected_indices = jax.lax.top_k(x, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(indices, expected_indices)
    assert (values.dtype, indices.dtype) == (x.dtype, jnp.int32)


def test_all_equal_and_all_lowest():
    for fill in (0.0, -np.inf):
        _, indices = fast_top_k(jnp.full((2, 50), fill), 9, chunk_size=20)
        np.testing.assert_array_equal(indices, np.tile(np.arange(9), (2, 1)))


def test_large_rows_by_default():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 10_000)).astype(np.float32))
    np.testing.assert_array_equal(fast_top_k(x, 20)[1], jax.lax.top_k(x, 20)[1])


@pytest.mark.parametrize("k", [-1, 11])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k must be between 0 and 10.*got {k}"):
        top_k(jnp.zeros(10), k)


def test_chunk_size_out_of_range():
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        top_k(jnp.zeros(10), 1, chunk_size=0)


def whole_sorts(run, *args):
    """Lines of the compiled program that sort rows of 5,000 or more."""
    lines = jax.jit(run).lower(*args).compile().as_text().splitlines()
    return [x for x in lines if re.search(r"\[(\d+,)*\d*[5-9]\d{3}\]\S* sort\(", x)]


USES = {
    "last value": lambda x: top_k(x, 10)[0][..., -1],
    "last column": lambda x: top_k(x, 10)[0][..., -1:],
    "first id": lambda x: top_k(x, 10)[1][..., 0],
    "two lengths": lambda x: (top_k(x, 10)[0][..., 2:4], top_k(x, 10)[1][..., :3]),
    "by row": jax.vmap(lambda row: top_k(row, 10)[0][-1]),
    "in chunks": lambda x: top_k(x, 10, chunk_size=40)[0][..., -1],
}


@pytest.mark.parametrize("use", USES)
def test_no_use_of_a_part_sorts_whole_rows(use):
    assert not whole_sorts(USES[use], jnp.zeros((3, 5000)))


def test_no_gradient_sorts_whole_rows():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32))
    grad = jax.grad(lambda x: USES["last value"](x).sum())
    assert not whole_sorts(grad, x)
    is_tenth = np.arange(5000)[None] == np.asarray(jax.lax.top_k(x, 10)[1])[:, -1:]
    np.testing.assert_array_equal(jax.jit(grad)(x), is_tenth)


def test_the_check_sees_a_sort():
    assert whole_sorts(lambda x: jnp.sort(x, axis=1), jnp.zeros((3, 5000)))


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("chunk_size", [None, 16])
def test_rows_may_be_sharded(chunk_size):
    x = np.random.default_rng(0).normal(size=(16, 3000)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    found = fast_top_k(jax.device_put(x, sharding), 20, chunk_size=chunk_size)
    for ours, theirs in zip(found, jax.lax.top_k(x, 20), strict=True):
        np.testing.assert_array_equal(ours, theirs)
