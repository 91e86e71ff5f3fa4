"""Attention within segments against a loop over segments, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.segment_attention import _blocks, segment_attention

R, HEADS, WIDTH = 256, 2, 16
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


@functools.partial(jax.jit, static_argnames=("causal", "implementation"))
def fast(q, k, v, grad, segment, is_valid, position, causal, implementation):
    def attend(q, k, v):
        how = {"position": position if causal else None, "implementation": implementation}
        qkv = jnp.stack([q, k, v], axis=1)
        return segment_attention(qkv, segment=segment, is_valid=is_valid, **how)

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


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_equals_a_masked_matrix(lengths, causal, implementation):
    *operands, segment, is_valid, position = case(lengths)
    who = jnp.asarray(is_valid), jnp.asarray(position)
    number = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths))
    found = fast(*operands, segment, *who, causal=causal, implementation=implementation)
    expected = slow(*operands, number, *who, causal=causal)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), found, expected)


def test_what_none_sees_may_be_anything_finite():
    q, k, v, _, segment, is_valid, _ = case(LENGTHS["across blocks"])
    how = {"segment": segment, "is_valid": jnp.asarray(is_valid)}
    qkv = jnp.stack([q, k, v], axis=1)
    out = segment_attention(qkv, **how)
    away = jnp.where(is_valid, 0, 1e4)[:, None, None, None]
    np.testing.assert_array_equal(segment_attention(qkv + away, **how), out)
    assert not np.any(np.asarray(out)[~is_valid])


def test_rows_that_do_not_count_cost_nothing():
    """However many come after the last, and though they may all be of one segment."""
    segment = jnp.asarray(np.repeat([0, 1, 2, 3], [60, 8, 30, 414]).astype(np.int32))
    is_valid = jnp.arange(512) < 98
    blocks = _blocks(segment, is_valid, None)
    touched = np.maximum(blocks.last - blocks.first + 1, 0)
    assert touched.tolist() == [68, 38] + [0] * 6
    qkv = jnp.ones((512, 3, HEADS, WIDTH)).at[128:].set(jnp.nan)
    how = {"segment": segment, "is_valid": is_valid, "implementation": "interpret"}
    out = segment_attention(qkv, **how)
    np.testing.assert_array_equal(out, jnp.broadcast_to(is_valid[:, None, None], out.shape))


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 12) and jax.default_backend() != "gpu",
    reason="this jax asks the GPU before it hands code to Triton",
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_lower(dtype):
    """Without a GPU: up to the code that is handed to Triton."""

    def run(qkv, segment, is_valid, grad):
        how = {"segment": segment, "is_valid": is_valid, "implementation": "pallas"}
        out, back = jax.vjp(lambda qkv: segment_attention(qkv, **how), qkv)
        return out, back(grad)

    shapes = [(512, 3, 8, 64), (512,), (512,), (512, 8, 64)]
    dtypes = [dtype, jnp.int32, bool, dtype]
    arrays = [jax.ShapeDtypeStruct(*a) for a in zip(shapes, dtypes, strict=True)]
    text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    parts = "forward", "query_gradient", "key_gradient", "value_gradient"
    assert all(f"segment_{part}" in text for part in parts)


def test_bad_input():
    how = {"segment": jnp.zeros(65, int), "is_valid": jnp.ones(65, bool)}
    with pytest.raises(ValueError, match="multiple of 64 rows, got 65"):
        segment_attention(jnp.ones((65, 3, 1, 4)), **how)
    how = {name: array[:64] for name, array in how.items()}
    with pytest.raises(ValueError, match="implementation must be"):
        segment_attention(jnp.ones((64, 3, 1, 4)), **how, implementation="cuda")
