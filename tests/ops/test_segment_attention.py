"""Attention within segments against a loop over segments, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.segment_attention import segment_attention

R, HEADS, WIDTH = 256, 2, 8
LENGTHS = {
    "short": [5] * 51 + [1],
    "across blocks": [60, 10, 120, 2, 64],
    "one": [256],
    "single rows": [1] * 256,
}


def case(lengths, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v, grad = (rng.normal(size=(R, HEADS, WIDTH)).astype(np.float32) for _ in range(4))
    # Neighbours differ, which is all that is asked of the numbers.
    segment = np.repeat(np.arange(len(lengths)) % 3, lengths).astype(np.int32)
    is_valid = rng.uniform(size=R) < 0.9
    position = rng.permutation(R).astype(np.int32)
    return *(jnp.asarray(a) for a in (q, k, v, grad, segment)), is_valid, position


@functools.partial(jax.jit, static_argnames=("causal",))
def fast(q, k, v, grad, segment, is_valid, position, causal):
    def attend(q, k, v):
        order = position if causal else None
        return segment_attention(q, k, v, segment=segment, is_valid=is_valid, position=order)

    out, back = jax.vjp(attend, q, k, v)
    return out, back(grad)


@functools.partial(jax.jit, static_argnames=("causal",))
def slow(q, k, v, grad, number, is_valid, position, causal):
    """All rows with all rows, masked."""
    sees = (number[:, None] == number[None, :]) & is_valid[:, None] & is_valid[None, :]
    if causal:
        sees &= position[None, :] <= position[:, None]

    def attend(q, k, v):
        scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(WIDTH)
        share = jax.nn.softmax(jnp.where(sees[None], scores, -1e9))
        return jnp.einsum("hqk,khd->qhd", jnp.where(sees[None], share, 0), v)

    out, back = jax.vjp(attend, q, k, v)
    return out, back(grad)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_a_masked_matrix(lengths, causal):
    *operands, segment, is_valid, position = case(lengths)
    who = jnp.asarray(is_valid), jnp.asarray(position)
    number = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths))
    found = fast(*operands, segment, *who, causal=causal)
    expected = slow(*operands, number, *who, causal=causal)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), found, expected)


def test_what_none_sees_may_be_anything_finite():
    q, k, v, _, segment, is_valid, _ = case(LENGTHS["across blocks"])
    how = {"segment": segment, "is_valid": jnp.asarray(is_valid)}
    out = segment_attention(q, k, v, **how)
    away = np.where(is_valid[:, None, None], 0, 1e4).astype(np.float32)
    np.testing.assert_array_equal(segment_attention(q + away, k + away, v + away, **how), out)
    assert not np.any(np.asarray(out)[~is_valid])


def test_rows_come_in_blocks():
    x = jnp.ones((65, 1, 4))
    with pytest.raises(ValueError, match="multiple of 64 rows, got 65"):
        segment_attention(x, x, x, segment=jnp.zeros(65, int), is_valid=jnp.ones(65, bool))
