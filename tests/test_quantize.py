"""8-bit matrices and their products: how far off they are, and what is exact."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.data import Batch
from moe_jax.experts import Rows
from moe_jax.experts.base import Dense
from moe_jax.ops.grouped import is_row, make_groups
from moe_jax.quantization import dequantize

qwix = pytest.importorskip("qwix")
EXPERIMENTS = Path(__file__).parents[1] / "experiments"

E, R, I, J = 3, 40, 32, 24  # noqa: E741
B, S = 2, 16  # of the experiment
DTYPES = ("int8", "float8")
# What one rounding may cost: a share of the largest value of a column, and one of the value itself.
OF_LARGEST = {"int8": 1 / 254, "float8": 3e-6}
OF_ITSELF = {"int8": 0.0, "float8": 1 / 16}
SMALL = 1e-5  # rounding of float32

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_inputs = pytest.mark.parametrize("with_inputs", [False, True], ids=["weights", "inputs"])


def quantized(w, dtype, **how):
    """One layer's matrices [E, I, J], quantised as those of experts are."""
    tree = moe_jax.quantize({"expert": {"up": {"kernel": jnp.asarray(w)}}}, dtype, **how)
    return tree["expert"]["up"]["kernel"]


def matrices(seed=0):
    """Columns of very different sizes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(E, I, J)) * 10.0 ** rng.uniform(-3, 2, (E, 1, J))).astype(np.float32)


def most_off(values, dtype, axis):
    """How far the rounded values may be from the given ones."""
    largest = np.max(np.abs(values), axis=axis, keepdims=True)
    return (1 + SMALL) * (OF_LARGEST[dtype] * largest + OF_ITSELF[dtype] * np.abs(values))


@each_dtype
def test_every_weight_is_near_by_its_own_expert_and_column(dtype):
    w = matrices()
    found = quantized(w, dtype)
    assert (found.qvalue.dtype.itemsize, found.scale.dtype) == (1, jnp.float32)
    assert (found.qvalue.shape, found.scale.shape) == (w.shape, (E, 1, J))
    off = np.abs(np.asarray(qwix.dequantize(found), np.float64) - w)
    assert np.all(off <= most_off(w, dtype, axis=1))
    # The bound is met, not undercut by far: it is 8 bits that are stored.
    assert np.max(off / most_off(w, dtype, axis=1)) > 0.8


@each_dtype
def test_what_8_bits_hold_comes_back(dtype):
    rng = np.random.default_rng(0)
    if dtype == "int8":
        values = rng.integers(-127, 128, (E, I, J)).astype(np.float32)
        values[:, 0] = -127.0
    else:
        bits = rng.integers(0, 256, (E, I, J)).astype(np.uint8)
        values = np.asarray(jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn), np.float32)
        values = np.nan_to_num(values)
        values[:, 0] = 448.0
    values *= 2.0 ** rng.integers(-9, 9, (E, 1, J))
    values[1, :, 2] = 0.0
    back = qwix.dequantize(quantized(values, dtype))
    np.testing.assert_allclose(back, values, rtol=3e-7)
    np.testing.assert_array_equal(back[1, :, 2], 0.0)


def layer(kernel, x):
    return jax.vmap(
        lambda k, x: Dense(J, use_bias=False).apply({"params": {"kernel": k}}, x)
    )(kernel, x)  # fmt: skip


def layer_on_rows(kernel, x):
    """The same rows, one expert's after the other's, in one array."""
    groups = make_groups(jnp.full(E, R), E * R)
    rows = Rows(groups, sequence=jnp.zeros(groups.num_rows, jnp.int32))
    at = jnp.nonzero(is_row(groups), size=E * R)[0]
    laid_out = jnp.zeros((groups.num_rows, I)).at[at].set(x.reshape(-1, I))
    dense = Dense(J, use_bias=False)
    out = jax.vmap(
        lambda k: dense.apply({"params": {"kernel": k}}, laid_out, rows), out_axes=None
    )(kernel)  # fmt: skip
    return out[at].reshape(E, R, J)


@each_dtype
@each_inputs
@pytest.mark.parametrize("run", [layer, layer_on_rows], ids=["buffers", "rows"])
def test_products_stay_within_what_the_roundings_allow(run, with_inputs, dtype):
    rng = np.random.default_rng(1)
    w, x = matrices(), rng.normal(size=(E, R, I)).astype(np.float32)
    x *= 10.0 ** rng.uniform(-2, 2, (E, R, 1)).astype(np.float32)
    out = np.asarray(run(quantized(w, dtype, inputs=with_inputs), jnp.asarray(x)), np.float64)
    w, x = w.astype(np.float64), x.astype(np.float64)
    off_w = most_off(w, dtype, axis=1)
    off_x = most_off(x, dtype, axis=2) if with_inputs else np.zeros_like(x)
    most = np.abs(x) @ off_w + off_x @ (np.abs(w) + off_w) + SMALL * (np.abs(x) @ np.abs(w))
    off = np.abs(out - x @ w)
    assert np.all(off <= most)
    assert np.max(off / most) > 0.1


@each_dtype
def test_inputs_are_rounded_token_by_token(dtype):
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(R, I)) * 10.0 ** rng.uniform(-3, 3, (R, 1))).astype(np.float32)
    kernel = jax.tree.map(lambda a: a[0], quantized(matrices(), dtype, inputs=True))
    rounded, matrix = dequantize(jnp.asarray(x), kernel)
    off = np.abs(np.asarray(rounded, np.float64) - x)
    assert np.all(off <= most_off(x, dtype, axis=1))
    assert np.max(off / most_off(x, dtype, axis=1)) > 0.8
    np.testing.assert_array_equal(matrix, qwix.dequantize(kernel.matrix))
    x[1:] *= 100.0
    among_others, _ = dequantize(jnp.asarray(x), kernel)
    np.testing.assert_array_equal(among_others[0], rounded[0])


def test_parameters_of_16_bits_keep_scales_of_32():
    w = jnp.asarray(matrices(), jnp.bfloat16)
    found, wide = quantized(w, "int8"), quantized(w.astype(jnp.float32), "int8")
    jax.tree.map(np.testing.assert_array_equal, found, wide)
    assert found.scale.dtype == jnp.float32


def test_quantising_can_be_compiled():
    w = jnp.asarray(matrices())
    compiled = jax.jit(functools.partial(quantized, dtype="int8"))(w)
    back, wanted = qwix.dequantize(compiled), qwix.dequantize(quantized(w, "int8"))
    np.testing.assert_allclose(compiled.scale, quantized(w, "int8").scale, rtol=1e-6)
    # What lies in the middle of two values may go to either.
    assert np.mean(np.abs(back - wanted) <= SMALL * np.abs(wanted)) > 0.99


@pytest.mark.skipif(not EXPERIMENTS.is_dir(), reason="experiments are not part of the package")
def test_the_experiment_compares_predictions(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    experiment = importlib.import_module("quantize")
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(B, S, 5)), jnp.float32)
    is_valid = jnp.asarray(np.arange(S) < np.array([S, 3])[:, None])
    targets = jnp.asarray(rng.integers(0, 5, (B, S)))
    batch = Batch(targets, targets, is_valid, jnp.zeros((B, 2), int))

    def against_logits(other):
        found = (jax.device_get(experiment.compare(a, logits, batch)) for a in (other, logits))
        return experiment.figures(*([sums, sums] for sums in found))

    # What no window counts, and what is added to all logits of a position, changes nothing.
    same = against_logits(jnp.where(is_valid[..., None], logits + 3.0, -logits))
    assert (same["bytes"], same["same_argmax"]) == (2 * (S + 3), 1.0)
    np.testing.assert_allclose([same["error"], same["more_bits"]], 0.0, atol=1e-6)

    share = np.asarray(jax.nn.softmax(2 * logits), np.float64)
    share = np.take_along_axis(share, np.asarray(targets)[..., None], axis=-1)[..., 0]
    sharper = against_logits(2 * logits)
    np.testing.assert_allclose(
        sharper["bits_per_byte"], -np.log2(share)[np.asarray(is_valid)].mean(), rtol=1e-5
    )
    gap = sharper["bits_per_byte"] - same["bits_per_byte"]
    np.testing.assert_allclose([sharper["error"], sharper["more_bits"]], [1.0, gap], rtol=1e-4)
    assert against_logits(-logits)["same_argmax"] == 0.0
