"""The smallest ladder and scaling curve of `experiments/`, and what their tables rest on."""
# ruff: noqa: E402

import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
if not EXPERIMENTS.is_dir():
    pytest.skip("the experiments are not part of this package", allow_module_level=True)
sys.path.append(str(EXPERIMENTS))
import harness
import ladder
import rungs
import scaling


@pytest.fixture(scope="module")
def climbed():
    """The first rung of inference that is a program, and the last, of a quickly compiled system."""
    chosen = [rung for rung in rungs.rungs("inference") if rung.name in ("jit", "all")]
    rungs.SIZES["test"] = (rungs.tiny().replace(expert="mlp", kg_link_top_k=1), 1, 8)
    yield chosen, [rungs.measure("inference", rung, "test", None, 1) for rung in chosen]
    del rungs.SIZES["test"]


def test_every_rung_agrees_with_the_first_within_its_tolerance(climbed):
    first, last = ladder.compare(*climbed)
    assert (first["arithmetic"], last["arithmetic"]) == ("float32", "bfloat16")
    assert first["agrees"]
    assert last["agrees"]
    assert first["difference"] == 0 < last["difference"]


def test_gains_are_ratios_to_the_first_rung_and_to_the_one_below(climbed):
    first, last = ladder.compare(*climbed)
    assert (first["on"], last["on"]) == (None, "jit")
    assert last["speed_up"] == last["over_last"] == pytest.approx(first["ms"] / last["ms"])
    assert last["ratio"] == pytest.approx(last["gib"] / first["gib"])
    assert last["promised_ms"] == pytest.approx([first["ms"] / 3, first["ms"] / 5])


@pytest.mark.parametrize("wrong", [1.1, np.nan])
def test_a_rung_that_computes_something_else_is_told_of(climbed, wrong):
    chosen, (first, last) = climbed
    output = last["numbers"]["output"] * wrong
    rows = ladder.compare(chosen, [first, last | {"numbers": last["numbers"] | {"output": output}}])
    assert [row["agrees"] for row in rows] == [True, False]
    assert "TOO LARGE" in ladder.table("inference", rows)


def test_a_token_with_other_experts_is_counted_and_left_out():
    rng = np.random.default_rng(0)
    true = {"output": rng.normal(size=(2, 50, 8)), "created": np.float32(7)}
    true["experts"] = np.tile([1.0, 4.0], (2, 50, 1))
    output = true["output"] * (1 + 1e-4 * rng.normal(size=(2, 50, 8)))
    experts = true["experts"].copy()
    output[1, 3], experts[1, 3] = rng.normal(size=8), [1, 5]
    each, rerouted = ladder.differences(true | {"output": output, "experts": experts}, true)
    assert rerouted == pytest.approx(0.01)
    assert set(each) == {"output", "created"}
    assert 0 < each["output"] < 3e-4
    assert each["created"] == 0


@pytest.mark.parametrize(("moved", "agrees"), [(0, False), (1, True), (9, False)])
def test_gradients_may_differ_more_where_tokens_have_other_experts(moved, agrees):
    experts = np.zeros((2, 100, 3), np.float32)
    true = {"gradient": np.ones(50), "losses": np.ones(4), "experts": experts}
    other = experts.copy()
    other[0, :moved, 2] = 1
    row = {"ms": 1.0, "planned_gib": 1.0, "arithmetic": "tf32"}
    off = {"gradient": 1.05 * true["gradient"], "losses": true["losses"], "experts": other}
    ladder_of_two = rungs.rungs("training")[:2]
    rows = ladder.compare(ladder_of_two, [row | {"numbers": true}, row | {"numbers": off}])
    assert [each["agrees"] for each in rows] == [True, agrees]


def test_a_failed_rung_leaves_the_others(climbed, tmp_path):
    chosen, (first, last) = climbed
    three = [chosen[0], chosen[0].add("fails"), chosen[1]]
    rows = ladder.compare(three, [first, {"error": "out of memory"}, last])
    assert [row["on"] for row in rows] == [None, "jit", "jit"]
    ladder.save({"inference": rows}, "test", (1, 8), tmp_path)
    assert "out of memory" in (tmp_path / "ladder.md").read_text()
    assert len(json.loads((tmp_path / "ladder.json").read_text())["ladders"]["inference"]) == 3
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


def test_a_ladder_without_its_first_rung_draws_what_it_knows(climbed):
    chosen, (first, last) = climbed
    three = [chosen[0].add("fails"), chosen[0], chosen[1]]
    rows = ladder.compare(three, [{"error": "took more than 50 s"}, first, last])
    figure = ladder.plot({"inference": rows}, "title")
    shown = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert shown[:2] == ["took more than 50 s", f"{first['ms']:.3g} ms"]
    assert not any("nan" in text for text in shown)


def test_op_by_op_is_the_plain_step():
    plain = object()
    assert rungs.compile_step(plain, rungs.rungs("training")[0], ()) == (plain, None)


def test_training_is_compared_by_losses_and_gradients():
    optimizer = optax.adam(0.1)

    def step(fixed, state, x):
        params, moments = state
        loss, grad = jax.value_and_grad(lambda p: jax.numpy.sum(p * x))(params)
        updates, moments = optimizer.update(grad, moments)
        return (optax.apply_updates(params, updates), moments), {"loss": loss}

    params, x = np.ones(3, np.float32), np.arange(3, dtype=np.float32)
    run = rungs.Runner(step, None, (params, optimizer.init(params)))
    numbers = rungs.first_numbers(run, [x, 2 * x])
    np.testing.assert_allclose(numbers["gradient"], 0.1 * x, rtol=1e-6)
    # Adam's first step moves every entry that has a gradient by its rate.
    np.testing.assert_allclose(numbers["losses"], [3.0, 6.0 * 0.9], rtol=1e-5)


def test_exponents_are_those_of_known_powers():
    x = [1, 2, 4, 8]
    assert scaling.exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)
    assert scaling.exponent(x[:1], [1.0]) is None
    points = [{"value": v, "ms": max(4.0, v), "gib": 2.0 * v} for v in x[:3]]
    points += [{"value": 16, "ms": 16.0, "gib": 32.0}, {"value": 32, "error": "out of memory"}]
    row = scaling.growth("forward: batch", points)
    assert row["time_above"] == pytest.approx(1.0)
    assert row["time"] < 1.0
    assert (row["memory"], row["memory_above"]) == pytest.approx((1.0, 1.0))
    assert (row["from"], row["to"]) == (1, 16)


def test_a_curve_keeps_what_it_has_when_a_point_fails(tmp_path):
    curve, values = "search: nodes", (512, 1024, -1)
    found = [harness.attempt(scaling.measure, curve, value, "tiny", 1) for value in values]
    assert "ValueError" in found[2]["error"]
    # All that a search reads or makes, but the queries, is as many as the nodes.
    assert 1.7 < found[1]["gib"] / found[0]["gib"] < 2.0
    curves = {curve: [{"value": v} | point for v, point in zip(values, found, strict=True)]}
    scaling.save(curves, "tiny", tmp_path)
    assert "ValueError" in (tmp_path / "scaling.md").read_text()
    assert len(json.loads((tmp_path / "scaling.json").read_text())["curves"][curve]) == 3
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_what_kills_its_process_is_told_of_and_the_rest_goes_on():
    calls = ["{'pid': __import__('os').getpid()}", "1 / 0", "__import__('os')._exit(3)", "{'a': 1}"]
    first, raised, died, last = harness.in_turn(eval, [(call,) for call in calls])
    assert first["pid"] != harness.os.getpid()
    assert raised == {"error": "ZeroDivisionError: division by zero"}
    assert died == {"error": "its process died (3)"}
    assert last == {"a": 1}
