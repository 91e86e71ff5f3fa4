"""Cases of `bench.py`: one layer of SwiGLU experts, routed by given choices."""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from measuring import NUM_INPUTS, Row, figures, time_calls
from workloads import (
    BALANCED,
    BOTH,
    DECODING,
    FORWARD,
    LAYERS,
    SMOKE_DECODING,
    SMOKE_LAYER,
    ZIPF,
    LayerShape,
    draw_choices,
    max_over_mean,
    number_used,
)

from moe_jax.experts import ExpertBank, Rows, SwiGLUExpert
from moe_jax.ops.grouped import is_row
from moe_jax.routing import (
    Choices,
    combine,
    combine_rows,
    dispatch,
    dispatch_index,
    dispatch_rows,
    expert_capacity,
    make_plan,
    row_index,
)

DTYPE = jnp.bfloat16
# Relative error of a result that is right; rounding to bfloat16 explains a third of it.
TOLERANCE = 0.02
CHECKED = 4


class LayerInput(NamedTuple):
    """What a layer gets.

    Attributes:
        x: [T, D] tokens.
        expert: [T, K] choices.
        weight: [T, K] float32, theirs.
        dy: [T, D] gradient of the result.
    """

    x: jax.Array
    expert: jax.Array
    weight: jax.Array
    dy: jax.Array


# (variables, x [T, D], expert [T, K], weight [T, K]) -> y [T, D], is_kept [T, K].
Apply = Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def bank_of(shape: LayerShape) -> ExpertBank:
    """The layer's experts."""
    expert = SwiGLUExpert(shape.hidden, shape.dim, dtype=DTYPE)
    return ExpertBank(expert, num_experts=shape.experts)


def with_capacity(shape: LayerShape, factor: float) -> Apply:
    """The layer with C slots for each expert, which all tokens share."""
    bank = bank_of(shape)
    capacity = expert_capacity(shape.tokens, shape.experts, shape.chosen, factor)

    def apply(variables, x, expert, weight):
        choices = Choices(expert[None], weight[None])
        plan = make_plan(choices, num_experts=shape.experts, capacity=capacity)
        index = dispatch_index(plan, shape.experts, capacity)
        inputs = dispatch(x[None], index)
        outputs = bank.apply(variables, inputs.x, inputs.is_valid, inputs.position).output
        return combine(outputs, plan.weight, index)[0], plan.is_kept[0]

    return apply


def with_rows(shape: LayerShape, factor: float) -> Apply:
    """The layer with a row for every choice."""
    del factor
    bank = bank_of(shape)

    def apply(variables, x, expert, weight):
        index = row_index(expert, shape.experts)
        whose = Rows(index.groups, sequence=index.token_of_row // shape.tokens)
        args = dispatch_rows(x, index), is_row(index.groups), index.token_of_row
        outputs = bank.apply(variables, *args, rows=whose).output
        return combine_rows(outputs, weight, index), jnp.ones(expert.shape, bool)

    return apply


# What `--dispatch` chooses from: (shape, capacity factor) -> the layer.
DISPATCHES: dict[str, Callable[[LayerShape, float], Apply]] = {
    "capacity": with_capacity,
    "dropless": with_rows,
}


def bank_variables(shape: LayerShape) -> Any:
    """Random bfloat16 parameters of unit gain, made one by one, so that memory has no peak here."""
    slots = jax.ShapeDtypeStruct((shape.experts, 1, 8), jnp.int32)
    x = jax.ShapeDtypeStruct((*slots.shape, shape.dim), DTYPE)
    valid = jax.ShapeDtypeStruct(slots.shape, bool)
    tree = jax.eval_shape(bank_of(shape).init, jax.random.key(0), x, valid, slots)
    leaves, structure = jax.tree.flatten(tree)
    made = [normal(i, leaf.shape, leaf.shape[1]) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, made)


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(seed: int, shape: tuple[int, ...], fan_in: int = 1) -> jax.Array:
    """Random bfloat16 numbers of variance 1 / fan_in."""
    return jax.random.normal(jax.random.key(seed), shape, DTYPE) * DTYPE(fan_in**-0.5)


def forward(apply: Apply) -> Callable:
    """(variables, input) -> y, is_kept, and no gradients."""

    def step(variables, inputs):
        return *apply(variables, inputs.x, inputs.expert, inputs.weight), ()

    return step


def forward_and_backward(apply: Apply) -> Callable:
    """(variables, input) -> y, is_kept, and gradients of the parameters, x and weight."""

    def step(variables, inputs):
        y, pull, is_kept = jax.vjp(
            lambda variables, x, weight: apply(variables, x, inputs.expert, weight),
            variables,
            inputs.x,
            inputs.weight,
            has_aux=True,
        )
        return y, is_kept, pull(inputs.dy)

    return step


def check(shape: LayerShape, variables: Any, inputs: LayerInput, result: tuple) -> None:
    """Compares some tokens' results, and gradients if there are any, with each expert's alone.

    Raises:
        ArithmeticError: they differ by more than rounding.
    """
    y, is_kept, grads = result
    expert = SwiGLUExpert(shape.hidden, shape.dim)

    def one(params, x, chosen):
        """One token through one expert, in float32."""
        own = jax.tree.map(lambda a: a[chosen].astype(jnp.float32), params["expert"])
        args = x[None], jnp.ones(1, bool), jnp.zeros(1, jnp.int32)
        return expert.apply({"params": own}, *args).output[0]

    @jax.jit
    def reference(params, x, chosen, weight, dy):
        y, pull = jax.vjp(lambda x: one(params, x, chosen), x.astype(jnp.float32))
        return weight * y, pull(weight * dy.astype(jnp.float32))[0]

    for t in range(0, shape.tokens, max(1, shape.tokens // CHECKED)):
        weight = inputs.weight[t] * is_kept[t]
        each = [
            reference(
                variables["params"], inputs.x[t], inputs.expert[t, k], weight[k], inputs.dy[t]
            )
            for k in range(shape.chosen)
        ]
        wanted = [sum(parts) for parts in zip(*each, strict=True)]
        must_be_near(y[t], wanted[0], f"result of token {t}")
        if grads:
            must_be_near(grads[1][t], wanted[1], f"gradient of token {t}")


def must_be_near(result: jax.Array, wanted: jax.Array, what: str) -> None:
    """Raises an ArithmeticError where two arrays differ by more than rounding."""
    result, wanted = (np.asarray(a, np.float64) for a in (result, wanted))
    error, size = np.linalg.norm(result - wanted), np.linalg.norm(wanted)
    if not error <= TOLERANCE * size:
        raise ArithmeticError(f"the {what} is off by {error:.3g}, where its norm is {size:.3g}")


def peak_bytes() -> int | None:
    """Most memory that the device has had in use, where it keeps account."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """Gather by plan, experts, weighted combine.

    The choices and their weights are given; what follows from them (slots, order) is timed.

    Attributes:
        shape: sizes.
        passes: "forward", or "forward+backward" with the gradients of parameters, x and weight.
        skew: of the choices.
        flags: options of XLA.
    """

    shape: LayerShape
    passes: str
    skew: str
    flags: str = ""

    @property
    def name(self) -> str:
        """What `--only` selects by."""
        return f"layer/swiglu-{self.shape.name}/{self.passes}/{self.skew}"

    def measure(self, options: argparse.Namespace) -> list[Row]:
        """Runs the case, checks a few tokens and takes its figures."""
        shape = self.shape
        apply = DISPATCHES[options.dispatch](shape, options.capacity_factor or 1.0)
        step = jax.jit(forward(apply) if self.passes == FORWARD else forward_and_backward(apply))
        variables = bank_variables(shape)
        inputs = [self._input(seed) for seed in range(NUM_INPUTS)]

        times, _ = time_calls(
            lambda i: step(variables, inputs[i % NUM_INPUTS]),
            jax.block_until_ready,
            options.repeats,
        )
        peak = peak_bytes()
        check(shape, variables, inputs[0], step(variables, inputs[0]))
        kept = float(np.mean([jnp.mean(step(variables, each)[1]) for each in inputs]))
        experts = [np.asarray(each.expert) for each in inputs]
        load = np.mean([max_over_mean(expert, shape.experts) for expert in experts])
        used = float(np.mean([number_used(expert) for expert in experts]))
        row = figures(
            f"{self.name}/{options.dispatch}",
            times,
            flops=shape.flops(self.passes, kept),
            least_bytes=shape.least_bytes(self.passes, used),
            peak_bytes=peak,
            load=float(load),
            dropped=1 - kept,
        )
        return [row]

    def _input(self, seed: int) -> LayerInput:
        expert, weight = map(jnp.asarray, draw_choices(self.shape, self.skew, seed))
        size = self.shape.tokens, self.shape.dim
        return LayerInput(normal(100 + seed, size), expert, weight, normal(200 + seed, size))


def cases(smoke: bool) -> list[LayerCase]:
    """Every shape, forward and with the backward pass, balanced and skewed; decoding, forward."""
    shapes, few = ([SMOKE_LAYER], [SMOKE_DECODING]) if smoke else (LAYERS, DECODING)
    return [
        LayerCase(shape, passes, skew)
        for shape in shapes
        for passes in (FORWARD, BOTH)
        for skew in (BALANCED, ZIPF)
    ] + [LayerCase(shape, FORWARD, BALANCED) for shape in few]
