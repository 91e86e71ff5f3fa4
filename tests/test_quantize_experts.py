"""Quantised experts: what stays as it was, what they compute, and where their parameters go."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

import moe_jax
from moe_jax.checkpoint import CheckpointError, Checkpoints
from moe_jax.config import smallest_run, tiny
from moe_jax.experts import EXPERTS, ExpertBank, Rows
from moe_jax.lm import MoELanguageModel
from moe_jax.ops.grouped import is_row, make_groups
from moe_jax.system import MoESystem

qwix = pytest.importorskip("qwix")

E, B, S, D = 3, 2, 16, 32
DTYPES = ("int8", "float8")

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_inputs = pytest.mark.parametrize("with_inputs", [False, True], ids=["weights", "inputs"])


KINDS = ("transformer", "specialized", "swiglu", "mlp")


@functools.cache
def bank_of(kind):
    heads = {"num_heads": 4} if kind in ("transformer", "specialized") else {}
    return ExpertBank(EXPERTS[kind](hidden_dim=32, output_dim=16, **heads), num_experts=E)


@functools.cache
def inputs():
    """Tokens of two sequences for each expert, validity and positions."""
    x = np.random.default_rng(0).normal(size=(E, B, S, D)).astype(np.float32)
    position = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (E, B, S))
    return jnp.asarray(x), jnp.ones((E, B, S), bool), position


@functools.cache
def bank_variables(kind):
    return random_variables(bank_of(kind).init, *inputs())


@functools.cache
def on_buffers(kind):
    return jax.jit(lambda variables: bank_of(kind).apply(variables, *inputs()).output)


@functools.cache
def on_rows(kind):
    """The same tokens, as rows."""
    groups = make_groups(jnp.full(E, B * S), E * B * S)
    at = jnp.nonzero(is_row(groups), size=E * B * S)[0]

    def laid_out(a):
        return (
            jnp.zeros((groups.num_rows, *a.shape[3:]), a.dtype)
            .at[at]
            .set(a.reshape(-1, *a.shape[3:]))
        )

    sequence = laid_out(jnp.broadcast_to(jnp.arange(B)[:, None], (E, B, S)))
    arguments = tuple(map(laid_out, inputs()))
    rows = Rows(groups, sequence=sequence)

    def run(variables):
        out = bank_of(kind).apply(variables, *arguments, rows=rows).output
        return out[at].reshape(E, B, S, -1)

    return jax.jit(run)


def is_quantized(leaf):
    return isinstance(leaf, qwix.QArray)


def multiplied_out(variables):
    def one(leaf):
        return qwix.dequantize(leaf) if is_quantized(leaf) else leaf

    return jax.tree.map(one, variables, is_leaf=is_quantized)


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize(("kind", "dtype"), list(zip(KINDS, DTYPES * 2, strict=True)))
def test_every_expert_computes_with_its_multiplied_out_matrices(kind, dtype):
    variables, run = bank_variables(kind), on_buffers(kind)
    small, most = moe_jax.quantize(variables, dtype), {"int8": 0.03, "float8": 0.15}[dtype]
    out = run(small)
    np.testing.assert_allclose(out, run(multiplied_out(small)), rtol=1e-5, atol=1e-5)
    assert most / 10 < distance(out, run(variables)) < most


@pytest.mark.parametrize(
    ("kind", "dtype", "with_inputs"),
    [
        ("transformer", "int8", False),
        ("transformer", "float8", True),
        ("swiglu", "int8", True),
        ("mlp", "float8", False),
    ],
)
def test_rows_give_what_buffers_give(kind, dtype, with_inputs):
    variables = bank_variables(kind)
    small = moe_jax.quantize(variables, dtype, inputs=with_inputs)
    exact, out = on_buffers(kind)(variables), on_buffers(kind)(small)
    # An input next to the middle of two 8-bit values may go to either.
    assert distance(on_rows(kind)(small), out) < (5e-3 if with_inputs else 1e-5)
    assert 1e-3 < distance(out, exact) < 0.2


@functools.cache
def system_of(**fields):
    return MoESystem(tiny().replace(eval_capacity_factor=4.0, expert="mlp", **fields))


@functools.cache
def variables_of():
    return random_variables(system_of().init, tokens())


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, S, D)), jnp.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_matrices_of_experts_change(kind):
    variables = bank_variables(kind)
    small = moe_jax.quantize(variables, "int8")
    before = jax.tree_util.tree_leaves_with_path(variables)
    after = jax.tree_util.tree_leaves_with_path(small, is_leaf=is_quantized)
    changed = set()
    for (path, old), (same, new) in zip(before, after, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert path == same
        if new is not old:
            changed.add(name.removeprefix("params/expert/"))
    standard = {"encoder", "attention/qkv", "attention/out", "feed_forward_up"}
    standard |= {"feed_forward_down", "decoder_hidden", "decoder_out"}
    wanted = {
        "transformer": standard,
        "specialized": standard | {"specialists"},
        "mlp": {"up", "down"},
        "swiglu": {"gate_up", "down"},
    }
    assert changed == {f"{name}/kernel" for name in wanted[kind]}


@each_dtype
def test_a_quarter_of_the_bytes_of_float32_and_half_of_bfloat16(dtype):
    system = MoESystem(tiny().replace(input_dim=256, hidden_dim=256, output_dim=256))
    x = jnp.zeros((B, S, 256))
    wide = jax.eval_shape(system.init, jax.random.key(0), x)
    half = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), wide)

    def num_bytes(variables):
        bank = variables["params"]["constellation"]["bank"]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(bank))

    small = jax.eval_shape(lambda v: moe_jax.quantize(v, dtype), wide)
    assert 3.8 < num_bytes(wide) / num_bytes(small) < 4
    small = jax.eval_shape(lambda v: moe_jax.quantize(v, dtype), half)
    assert 1.9 < num_bytes(half) / num_bytes(small) < 2


@each_dtype
def test_with_inputs_buffers_are_multiplied_in_8_bits(dtype):
    name = {"int8": "i8", "float8": "f8E4M3FN"}[dtype]

    def products(**how):
        small = moe_jax.quantize(variables_of(), dtype, **how)
        text = jax.jit(system_of().apply).lower(small, tokens()).as_text()
        lines = (line.split(":")[-1] for line in text.splitlines() if "dot_general" in line)
        return sum(line.count(f"x{name}>") == 2 for line in lines)

    assert (products(inputs=True), products()) == (2, 0)


def test_a_dropless_system_gives_what_enough_capacity_gives():
    small = moe_jax.quantize(variables_of(), "int8")
    a, b = (
        jax.jit(system_of(dispatch=d, report_scope="none").apply)(small, tokens()).output
        for d in ("capacity", "dropless")
    )
    assert distance(a, b) < 1e-5


def test_steps_stay_on_the_device_and_are_traced_once():
    system = system_of()
    step, graph = system.inference_step(), jax.device_put(system.create_graph())
    small = jax.device_put(moe_jax.quantize(variables_of(), "int8"))
    batches = [jax.device_put(tokens(i)) for i in range(3)]
    with jax.transfer_guard("disallow"):
        for x in batches:
            graph, out, _ = step(small, graph, x)
    assert step._cache_size() == 1
    assert graph.num_live > 0
    assert np.all(np.isfinite(out.output))


def test_a_language_model_takes_quantised_parameters():
    config = smallest_run().model
    moe = config.moe.replace(report_scope="none", memory_read=False)
    model, ids = MoELanguageModel(config.replace(moe=moe)), jnp.zeros((2, 16), int)
    params = random_variables(model.init, ids)["params"]
    small = moe_jax.quantize(params, "int8")
    assert sum(map(is_quantized, jax.tree.leaves(small, is_leaf=is_quantized))) > 0
    out = jax.eval_shape(lambda p: model.apply({"params": p}, ids).logits, small)
    assert out.shape == (2, 16, config.vocab_size)


@each_inputs
@each_dtype
def test_checkpoints_keep_a_quantised_tree(tmp_path, dtype, with_inputs):
    variables = variables_of()
    small = moe_jax.quantize(variables, dtype, inputs=with_inputs)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, small)
    checkpoints.close()
    like = jax.eval_shape(lambda v: moe_jax.quantize(v, dtype, inputs=with_inputs), variables)
    _, back, _ = Checkpoints(tmp_path).restore(like)
    assert jax.tree.structure(back) == jax.tree.structure(small)
    for a, b in zip(*map(jax.tree.leaves, (back, small)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match="do not match"):
        Checkpoints(tmp_path).restore(variables)


@each_inputs
def test_wrong_calls(with_inputs):
    variables = variables_of()
    with pytest.raises(ValueError, match=r"dtype must be one of .*int8.*float8.*got 'int4'"):
        moe_jax.quantize(variables, "int4")
    small = moe_jax.quantize(variables, "int8", inputs=with_inputs)
    with pytest.raises(ValueError, match="must not be quantised already"):
        moe_jax.quantize(small, "float8")
    with pytest.raises(ValueError, match="must hold the matrices of experts"):
        moe_jax.quantize({"params": {"head": {"kernel": jnp.ones((2, 2))}}}, "int8")


def test_without_qwix(monkeypatch):
    variables = variables_of()
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match="qwix is not installed: pip install 'moe-jax\\[quantize"):
        moe_jax.quantize(variables, "int8")
    assert np.all(np.isfinite(on_buffers("mlp")(bank_variables("mlp"))))
