"""Dropless dispatch against a plain loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.grouped import BLOCK, is_row
from moe_jax.routing import combine_rows, dispatch_rows, row_index

T, K, E, D = 150, 2, 5, 3


def choices(kind, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "one pair takes all":
        return np.broadcast_to([3, 1], (T, K)).copy()
    return np.stack([rng.permutation(E)[:K] for _ in range(T)])


def slow_rows(expert, is_valid):
    """(expert, token, choice) of every row, in the order in which rows are given."""
    taken = [(e, t, k) for t, row in enumerate(expert) for k, e in enumerate(row) if is_valid[t]]
    return sorted(taken)


KINDS = ["random", "one pair takes all"]


@pytest.mark.parametrize("padding", ["none", "some", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_choice_gets_a_row_of_its_expert(kind, padding):
    expert = choices(kind)
    is_valid = {"none": np.ones(T, bool), "some": np.arange(T) % 3 > 0, "all": np.zeros(T, bool)}
    is_valid = is_valid[padding]
    index = jax.jit(row_index, static_argnums=1)(expert, E, is_valid)
    rows = slow_rows(expert, is_valid)
    found = np.flatnonzero(is_row(index.groups))
    choice = np.asarray(index.choice_of_row)
    assert len(found) == len(rows)
    for row, (e, t, k) in zip(found, rows, strict=True):
        assert choice[row] == t * K + k
        assert index.row_of_choice[t, k] == row
        assert index.groups.start[e] <= row < index.groups.start[e] + index.groups.size[e]
    others = np.delete(choice, found)
    assert np.all(others == T * K)
    assert np.all(np.asarray(index.row_of_choice)[~is_valid] == index.groups.num_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    """Each expert multiplies by its own number; the sum is the weighted sum of those."""
    rng = np.random.default_rng(1)
    expert, is_valid = choices(kind), np.arange(T) % 4 > 0
    x = rng.normal(size=(T, D)).astype(np.float32)
    weight = rng.uniform(size=(T, K)).astype(np.float32)
    scale = rng.normal(size=E).astype(np.float32)

    def run(x, weight):
        index = row_index(jnp.asarray(expert), E, jnp.asarray(is_valid))
        rows = dispatch_rows(x, index)
        by_row = jnp.repeat(jnp.append(scale, 0)[index.groups.block_group], BLOCK)
        return combine_rows(rows * by_row[:, None], weight, index)

    def plain(x, weight):
        by_token = jnp.sum(weight * scale[expert], axis=1) * is_valid
        return x * by_token[:, None]

    np.testing.assert_allclose(jax.jit(run)(x, weight), plain(x, weight), rtol=1e-5, atol=1e-6)
    pull = rng.normal(size=(T, D)).astype(np.float32)
    grads = (
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(f(*a) * pull), argnums=(0, 1)))(x, weight)
        for f in (run, plain)
    )
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_no_scatter_adds_floats():
    """Adding by a scatter would depend on the order of threads."""

    def loss(x, weight):
        index = row_index(jnp.asarray(choices("random")), E)
        return jnp.sum(combine_rows(dispatch_rows(x, index), weight, index) ** 2)

    arrays = jnp.ones((T, D)), jnp.ones((T, K))
    assert "scatter-add" not in str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*arrays))
