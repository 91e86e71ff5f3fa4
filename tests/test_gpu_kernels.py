"""What kernels compute once they are compiled, against XLA in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.activations import activate
from moe_jax.ops.group_layer_norm import group_layer_norm, group_layer_norm_branch
from moe_jax.ops.grouped import group_of_rows, grouped_matmul, is_row, make_groups
from moe_jax.ops.segment_attention import segment_attention
from moe_jax.ops.spread_rows import spread_rows

pytestmark = pytest.mark.gpu

SIZES = jnp.array([100, 0, 1, 333, 64, 1000])


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def in_float32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


def assert_close(got, wanted, is_used=None):
    """The relative errors, in the 2-norm, are of the order of bfloat16's rounding."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        if is_used is not None and a.shape[0] == is_used.size:
            a, b = a[is_used], b[is_used]
        assert np.linalg.norm(a - b) < 6e-3 * np.linalg.norm(b)


def values_and_gradients(run, grad, *inputs):
    out, pull = jax.vjp(run, *inputs)
    return out, pull(grad.astype(out.dtype))


@pytest.mark.parametrize("longest", [8, 64, 500])
@pytest.mark.parametrize("width", [64, 256])
def test_attention(width, longest):
    rows, heads = 2048, 4
    rng = np.random.default_rng(longest)
    lengths = rng.integers(1, longest + 1, size=rows)
    segment = jnp.asarray(np.repeat(np.arange(rows), lengths)[:rows] % 7, jnp.int32)
    is_valid = jnp.asarray(rng.uniform(size=rows) < 0.9)
    position = jnp.asarray(rng.permutation(rows), jnp.int32)
    qkv, grad = normal(0, rows, 3, heads, width), normal(1, rows, heads, width)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, qkv, grad):
        attend = functools.partial(
            segment_attention, segment=segment, is_valid=is_valid, position=position,
            implementation=implementation,
        )  # fmt: skip
        return values_and_gradients(attend, grad, qkv)

    with jax.default_matmul_precision("float32"):
        wanted = run("xla", *in_float32((qkv, grad)))
    assert_close(run("pallas", qkv, grad), wanted)


@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("norm_of", [group_layer_norm, group_layer_norm_branch])
@pytest.mark.parametrize(("width", "times"), [(256, 1), (2048, 1), (512, 12)])
def test_layer_norm(width, times, norm_of, activation):
    sizes = times * SIZES  # the more rows, the more of them to a program
    groups = make_groups(sizes, int(sizes.sum()) + 128)
    is_used = np.asarray(is_row(groups))
    x, scale, bias = (
        2 * normal(0, is_used.size, width) + 1,
        normal(1, 6, width),
        normal(2, 6, width),
    )
    grad = jnp.where(is_used[:, None], normal(3, is_used.size, width), 0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, grad, *inputs):
        def norm(x, scale, bias):
            how = {"activation": activation, "implementation": implementation}
            out = norm_of(x, scale, bias, groups, dtype=x.dtype, **how)
            return out if norm_of is group_layer_norm else 2 * out[0] + out[1]

        return values_and_gradients(norm, grad, *inputs)

    wanted = run("xla", *in_float32((grad, x, scale, bias)))
    assert_close(run("pallas", grad, x, scale, bias), wanted, is_used)


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "swiglu"])
def test_grouped_matmul(activation, has_residual):
    inner, outer = 256, 512
    groups = make_groups(SIZES, int(SIZES.sum()) + 128)
    is_used = np.asarray(is_row(groups))
    x = jnp.where(is_used[:, None], normal(0, is_used.size, inner), 0)
    w = normal(1, 6, inner, outer) / 16
    width = outer // 2 if activation == "swiglu" else outer
    own = {} if activation == "swiglu" else {"bias": normal(2, 6, outer)}
    if has_residual:
        own["residual"] = jnp.where(is_used[:, None], normal(4, is_used.size, width), 0)
    grad = jnp.where(is_used[:, None], normal(3, is_used.size, width), 0)

    def in_kernels(x, w, own):
        out = grouped_matmul(x, w, groups, activation=activation, **own)
        return jnp.where(is_used[:, None], out, 0)

    def one_by_one(x, w, own):
        group, bias = group_of_rows(groups), own.get("bias", jnp.zeros((6, outer)))
        outs = [x @ w[e] + bias[e][None] for e in range(w.shape[0])]
        out = sum(jnp.where(group[:, None] == e, out, 0) for e, out in enumerate(outs))
        out = activate(out, activation) + own.get("residual", 0)
        return jnp.where(is_used[:, None], out, 0)

    run = jax.jit(values_and_gradients, static_argnums=0)
    with jax.default_matmul_precision("float32"):
        wanted = run(one_by_one, *in_float32((grad, x, w, own)))
    assert_close(run(in_kernels, grad, x, w, own), wanted, is_used)


@pytest.mark.parametrize("columns", [128, 768, 4096])
def test_spread_rows_are_the_same_bits(columns):
    x, place = normal(0, 501, columns), jax.random.permutation(jax.random.key(1), 2000)[:1503]
    source = jnp.full(2000, 1503, jnp.int32).at[place].set(jnp.arange(1503))[:1900]
    place, scale = place.reshape(501, 3), normal(2, 501, 3, dtype=jnp.float32)
    spread = jax.jit(spread_rows, static_argnames="implementation")
    for own in (None, scale):
        wanted = spread(x, place, source, own, implementation="xla")
        got = spread(x, place, source, own, implementation="pallas")
        np.testing.assert_array_equal(got, wanted)
