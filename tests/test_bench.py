"""The benchmarks count what they say, notice wrong results, and survive a case that fails."""
# ruff: noqa: E402

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
if not EXPERIMENTS.is_dir():
    pytest.skip("the experiments are not part of this package", allow_module_level=True)
sys.path.append(str(EXPERIMENTS))

import bench
import bench_grouped
import bench_layers
import bench_system
import measuring
import workloads

from moe_jax.config import h100, tiny
from moe_jax.experts import SwiGLUExpert, TransformerExpert
from moe_jax.supervisor import Supervisor

OPTIONS = argparse.Namespace(
    repeats=1, dispatch="capacity", capacity_factor=None, router="initial", smoke=True
)
LAYER = workloads.LayerShape(dim=16, hidden=12, experts=4, chosen=2, tokens=32)


def product_flops(function, *args):
    """Two operations for each multiply-add of every matrix product in a function."""

    def count(jaxpr):
        total = 0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (inner, _), _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                total += 2 * eqn.outvars[0].aval.size * np.prod([shape[i] for i in inner])
            for inside in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
                total += count(getattr(inside, "jaxpr", inside)) if hasattr(inside, "eqns") else 0
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def output_of(expert, tokens, dim):
    """The expert's output alone as a function of (variables, x), and such arguments."""
    x, valid = jnp.ones((tokens, dim)), jnp.ones(tokens, bool)
    position = jnp.arange(tokens)
    variables = jax.eval_shape(expert.init, jax.random.key(0), x, valid, position)
    return lambda v, x: expert.apply(v, x, valid, position).output, (variables, x)


def without_confidence(flops, expert, tokens):
    return flops - 2 * tokens * expert.hidden_dim


def test_useful_operations_of_a_swiglu_layer():
    expert, rows = SwiGLUExpert(LAYER.hidden, LAYER.dim), LAYER.chosen * LAYER.tokens
    run, args = output_of(expert, rows, LAYER.dim)
    forward = without_confidence(product_flops(run, *args), expert, rows)
    assert LAYER.flops(workloads.FORWARD) == forward
    assert LAYER.flops(workloads.FORWARD, kept=0.25) == forward / 4

    def both(variables, x):
        y, pull = jax.vjp(run, variables, x)
        return y, pull(y)

    counted = without_confidence(product_flops(both, *args), expert, rows)
    assert LAYER.flops(workloads.BOTH) == counted


def test_useful_operations_of_transformer_experts():
    sizes = workloads.TransformerSizes(dim=8, hidden=16, output=24, experts=8, chosen=2, heads=4)
    length = 64
    seen = sizes.chosen * length // sizes.experts
    expert = TransformerExpert(sizes.hidden, sizes.output, num_heads=sizes.heads)
    run, args = output_of(expert, seen, sizes.dim)
    flops = without_confidence(product_flops(run, *args), expert, seen)
    assert sizes.flops_per_token(length, 1.0) == flops / seen * sizes.chosen
    assert bench_system.sizes_of(h100()) == workloads.TransformerSizes()


@pytest.mark.parametrize("leg", bench_grouped.LEGS)
def test_useful_operations_of_a_grouped_matmul(leg):
    shape = bench_grouped.SMOKE
    operands = bench_grouped.operands_of(shape, workloads.BALANCED)[0]
    run = bench_grouped.einsum(leg, shape)[""]
    assert product_flops(run, operands) == shape.flops


@pytest.mark.parametrize("skew", [workloads.BALANCED, workloads.ZIPF])
def test_drawn_choices_are_distinct_and_skewed_as_asked(skew):
    shape = workloads.LayerShape(dim=1, hidden=1, experts=16, chosen=4, tokens=4096)
    expert, weight = workloads.draw_choices(shape, skew, seed=0)
    assert all(len(set(row)) == 4 for row in expert.tolist())
    np.testing.assert_allclose(weight.sum(axis=1), 1.0, rtol=1e-5)
    first = np.sort(np.bincount(expert[:, 0], minlength=16))[::-1] / len(expert)
    share = np.sort(workloads.shares(16, skew, np.random.default_rng(0)))[::-1]
    np.testing.assert_allclose(first, share, atol=0.02)
    sizes = workloads.draw_group_sizes(16, 1003, skew, seed=0)
    assert sizes.sum() == 1003
    np.testing.assert_allclose(np.sort(sizes)[::-1], share * 1003, atol=1)


@pytest.mark.parametrize("passes", [workloads.FORWARD, workloads.BOTH])
def test_a_layer_case(passes):
    case = bench_layers.LayerCase(LAYER, passes, workloads.ZIPF)
    (row,) = case.measure(OPTIONS)
    loads = [
        np.bincount(workloads.draw_choices(LAYER, workloads.ZIPF, seed)[0].ravel(), minlength=4)
        for seed in range(measuring.NUM_INPUTS)
    ]
    capacity = LAYER.chosen * LAYER.tokens // LAYER.experts
    kept = np.mean([np.minimum(load, capacity).sum() / load.sum() for load in loads])
    assert 0.0 < row["dropped"] == pytest.approx(1 - kept)
    flops = row["useful_tflops"] * row["ms_in_a_row"] * 1e9
    assert flops == pytest.approx(LAYER.flops(passes, kept))
    assert row["max_over_mean"] == pytest.approx(np.mean([max(load) for load in loads]) / capacity)


@pytest.mark.parametrize("part", ["result", "gradient"])
def test_a_wrong_layer_is_noticed(part):
    case = bench_layers.LayerCase(LAYER, workloads.BOTH, workloads.BALANCED)
    variables, inputs = bench_layers.bank_variables(LAYER), case._input(0)
    apply = bench_layers.with_capacity(LAYER, 4.0)
    y, is_kept, grads = jax.jit(bench_layers.forward_and_backward(apply))(variables, inputs)
    bench_layers.check(LAYER, variables, inputs, (y, is_kept, grads))
    if part == "result":
        y = y.at[0].mul(1.1)
    else:
        grads = (grads[0], grads[1].at[0].mul(1.1), grads[2])
    with pytest.raises(ArithmeticError, match=f"{part} of token 0"):
        bench_layers.check(LAYER, variables, inputs, (y, is_kept, grads))


def test_a_grouped_case_and_its_reasons():
    case = bench_grouped.GroupedCase(bench_grouped.SMOKE, "einsum")
    rows = case.measure(OPTIONS)
    assert ["ms" in row for row in rows] == [True] * 3 + [False] * 3
    assert rows[-1]["failed"] == ["not available here", "needs groups of one size"]
    assert "needs groups of one size" in measuring.table(rows)


@pytest.mark.parametrize("leg", bench_grouped.LEGS)
def test_a_wrong_grouped_matmul_is_noticed(leg):
    shape = bench_grouped.SMOKE
    operands = bench_grouped.operands_of(shape, workloads.ZIPF)[0]
    run = bench_grouped.IMPLEMENTATIONS["ragged_dot"](leg, shape)[""]
    result = jax.jit(run)(operands)
    bench_grouped.check(leg, operands, result)
    with pytest.raises(ArithmeticError):
        bench_grouped.check(leg, operands, jnp.roll(result, 1, axis=0))


def test_balancing_evens_the_load_of_tokens_not_seen():
    config = tiny().replace(num_experts=16, balance_bias_rate=bench_system.BALANCE_RATE)
    supervisor = Supervisor(16, config.top_k_experts, balance_bias=True)
    embeddings = jax.random.normal(jax.random.key(1), (16, config.input_dim))
    x = jax.random.normal(jax.random.key(2), (64, 32, config.input_dim))
    params = jax.jit(supervisor.init)(jax.random.key(0), x[:1], embeddings)["params"]
    before = {"params": {"constellation": {"supervisor": params, "expert_embeddings": embeddings}}}
    after = bench_system.balance(config, before, 8, 32)

    def load(variables):
        own = {"params": variables["params"]["constellation"]["supervisor"]}
        chosen = jax.jit(supervisor.apply)(own, x, embeddings).choices.expert
        return workloads.max_over_mean(np.asarray(chosen), 16)

    assert load(after) < 1.2 < load(before)
    assert jax.tree.structure(before) == jax.tree.structure(after)


def test_every_call_has_its_turn():
    turns = []
    times, last = measuring.time_calls(lambda i: turns.append(i) or i, lambda result: None, 3)
    assert turns == list(range(measuring.most_calls(3)))
    assert last == turns[-1]
    assert len(times.single) == 3


def test_names_of_cases_are_unique():
    for smoke in (False, True):
        names = [case.name for case in bench.cases(smoke)]
        assert len(set(names)) == len(names)


SCRIPT = """
import os, measuring
class Case:
    flags = ""
    def __init__(self, name):
        self.name = name
    def measure(self, options):
        if self.name == "raises":
            raise ValueError("no good")
        if self.name == "dies":
            os._exit(3)
        times = measuring.Times(1.0, [0.5], 0.5)
        return [measuring.figures(self.name, times, flops=2e12, least_bytes=1e12, peak_bytes=None)]
ceilings = lambda options: {"matmul_tflops": 8.0, "copy_tb_per_s": 4.0}
options = measuring.parser("").parse_args()
measuring.run(options, map(Case, ("raises", "dies", "works", "unasked")), ceilings)
"""


def test_a_failed_case_leaves_the_others(tmp_path):
    script, found = tmp_path / "script.py", tmp_path / "found.json"
    script.write_text(SCRIPT)
    command = [sys.executable, script, "--json", found, "--only", "r", "d", "w"]
    done = subprocess.run(
        command, env={"PYTHONPATH": str(EXPERIMENTS)}, capture_output=True, text=True, check=True
    )
    raises, dies, works = json.loads(found.read_text())["cases"]
    assert raises["failed"] == ["failed", "no good"]
    assert dies["failed"] == ["failed", "exit status 3"]
    assert (works["useful_tflops"], works["of_matmul"], works["of_copy"]) == (4.0, 0.5, 0.5)
    assert "no good" in done.stdout
