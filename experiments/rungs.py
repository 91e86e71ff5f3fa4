"""The rungs of `ladder.py`: what each adds to a step, and how one is measured."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_system import SystemCase, cast_experts, half_full, make_step
from harness import GIB, machine, peak_bytes, planned_bytes

from moe_jax import MoESystem
from moe_jax.config import MoEConfig, colab, h100, tiny
from moe_jax.routing import RoutingPlan

Task = Literal["inference", "training"]
SIZES = {
    # All rungs with slots: the kernels of dropless dispatch have no float32.
    "seed": (h100().replace(dispatch="capacity"), 8, 128),
    "colab": (colab(), 8, 128),
    "tiny": (tiny(), 2, 16),
}
NUM_INPUTS, IN_A_ROW, SAMPLED = 4, 10, 4096
DROPPED = 2**16  # added to the number of an expert that had no room
BUFFERED = "command buffers"
BUFFERS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"


@dataclasses.dataclass(frozen=True)
class Rung:
    """One way to run a step.

    Attributes:
        name: what it adds.
        on: the rung that it adds it to; None for the first.
        dtype: of the arithmetic.
        remat: as in `MoEConfig`.
        is_jitted: whether the step is one program.
        is_ahead: whether that is compiled before the first call.
        has_buffers: whether it runs from command buffers, on a GPU.
        is_donated: whether its state is donated.
        times: least and largest speed-up over the first rung that the original promised.
        share: likewise of memory.
    """

    name: str
    on: "Rung | None" = None
    dtype: str = "float32"
    remat: str = "none"
    is_jitted: bool = False
    is_ahead: bool = False
    has_buffers: bool = False
    is_donated: bool = False
    times: tuple[float, float] | None = None
    share: tuple[float, float] | None = None

    def add(self, name: str, times: Any = None, share: Any = None, **changes: Any) -> "Rung":
        """The rung that stands on this one."""
        return dataclasses.replace(self, name=name, on=self, times=times, share=share, **changes)

    @property
    def promised(self) -> str:
        """The promise in words."""
        parts = ((self.times, "x"), (self.share, " memory"))
        words = [" to ".join(f"{v:g}" for v in sorted({*r})) + unit for r, unit in parts if r]
        return ", ".join(words)


def rungs(task: Task) -> list[Rung]:
    """The ladder of a task, every rung after the one that it stands on."""
    first = Rung("op by op")
    jit = first.add("jit", (1.5, 1.5), is_jitted=True)
    half = jit.add("bfloat16", (3, 3), dtype="bfloat16")
    ahead = half.add("ahead of time", is_ahead=True)
    buffers = ahead.add(BUFFERED, has_buffers=True)
    whole = (3, 5), (0.15, 0.5)
    if task == "inference":
        return [first, jit, half, ahead, buffers, buffers.add("all", *whole, is_donated=True)]
    dots = half.add("remat dots", (3, 3), (0.3, 0.3), remat="dots")
    full = half.add("remat full", (3, 3), (0.3, 0.3), remat="full")
    donated = buffers.add("donated", is_donated=True)
    end = [donated.add(f"all, remat {kind}", *whole, remat=kind) for kind in ("dots", "full")]
    return [first, jit, half, dots, full, ahead, buffers, donated, *end]


def build(task: Task, config: MoEConfig) -> tuple[Callable, Any, Any]:
    """The plain step, (fixed, state, x) -> (state, results), its fixed part and its state."""
    system = MoESystem(config)
    if task == "training":
        case = SystemCase("training/step+write", 0, 0, "float32", config)
        train, state = make_step(system, case)

        def training_step(fixed: None, state: Any, x: jax.Array) -> tuple[Any, dict]:
            state, (loss, _, plan) = train.__wrapped__(state, x)
            return state, {"loss": loss, "experts": experts_of(plan)}

        return training_step, None, state
    variables = jax.jit(lambda key: cast_experts(
        system.init(key, jnp.zeros((1, 8, config.input_dim))), config.compute_dtype
    ))(jax.random.key(0))  # fmt: skip
    infer = system.inference_step().__wrapped__

    def inference_step(variables: Any, graph: Any, x: jax.Array) -> tuple[Any, dict]:
        after, out, _ = infer(variables, graph, x)
        created = after.num_live - graph.num_live
        return after, {"output": out.output, "created": created, "experts": experts_of(out.plan)}

    return inference_step, variables, jax.jit(lambda: half_full(system.create_graph()))()


def experts_of(plan: RoutingPlan) -> jax.Array:
    """[B, S, K] the experts of every token in ascending order, plus `DROPPED` where dropped."""
    return jnp.sort(jnp.where(plan.is_kept, plan.expert, plan.expert + DROPPED), axis=-1)


def measure(task: Task, rung: Rung, size: str, shape: tuple[int, int] | None, repeats: int) -> dict:
    """Runs one rung in this process: its figures, and under "numbers" what it computed."""
    is_gpu = jax.default_backend() == "gpu"
    if rung.name == BUFFERED and not is_gpu:
        return {"skipped": "needs a GPU"}
    config, *usual = SIZES[size]
    config = config.replace(compute_dtype=rung.dtype, remat=rung.remat)
    plain, fixed, state = jax.block_until_ready(build(task, config))
    built = peak_bytes()
    # Rounded to bfloat16, so that all rungs route the very same tokens.
    x = jax.random.normal(jax.random.key(3), (NUM_INPUTS, *(shape or usual), config.input_dim))
    inputs = list(x.astype(jnp.bfloat16).astype(jnp.float32))
    step, planned = compile_step(plain, rung, (fixed, state, inputs[0]))
    run = Runner(step, fixed, state)
    del state  # or the first one would be there to the end
    numbers, rounds = first_numbers(run, inputs), []
    for _ in range(repeats):
        began = time.perf_counter()
        for i in range(IN_A_ROW):
            results = run(inputs[i % NUM_INPUTS])
        jax.block_until_ready((run.state, results))
        rounds.append(1e3 * (time.perf_counter() - began) / IN_A_ROW)
    peak = peak_bytes()
    return {
        "ms": statistics.median(rounds),
        "spread_ms": [min(rounds), max(rounds)],
        "planned_gib": planned and planned / GIB,
        "peak_gib": peak and peak / GIB,
        "is_at_most": peak is not None and peak == built,
        "arithmetic": "tf32" if is_gpu and rung.dtype == "float32" else rung.dtype,
        "numbers": numbers,
        "machine": machine(),
    }


def compile_step(plain: Callable, rung: Rung, args: tuple) -> tuple[Callable, int | None]:
    """The step as the rung runs it, and the memory that its program plans with, if it is one."""
    if not rung.is_jitted:
        return plain, None
    has_buffers = rung.has_buffers and jax.default_backend() == "gpu"
    options = {"xla_gpu_enable_command_buffer": BUFFERS} if has_buffers else None
    donated = 1 if rung.is_donated else ()
    jitted = jax.jit(plain, donate_argnums=donated, compiler_options=options)
    compiled = jitted.lower(*args).compile()
    return (compiled if rung.is_ahead else jitted), planned_bytes(compiled)


class Runner:
    """A step and its state, which nobody else holds."""

    def __init__(self, step: Callable, fixed: Any, state: Any) -> None:
        self.step, self.fixed, self.state = step, fixed, state

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Goes one step on, and gives its results."""
        self.state, results = self.step(self.fixed, self.state, x)
        return results


def first_numbers(run: Runner, inputs: list[jax.Array]) -> dict[str, np.ndarray]:
    """What the first steps compute: results of the first, its gradients, and everyone's loss."""
    numbers, losses = {}, []
    for x in inputs:
        results = {name: np.asarray(value, np.float32) for name, value in run(x).items()}
        if "loss" in results:
            losses.append(results.pop("loss"))
            if len(losses) == 1:  # The first moment is a tenth of the gradient.
                results["gradient"] = _sample(optax.tree_utils.tree_get(run.state, "mu"))
        numbers = numbers or results
    return numbers | ({"losses": np.stack(losses)} if losses else {})


def _sample(tree: Any) -> np.ndarray:
    """Evenly spaced entries of every leaf, picked on the device."""

    def pick(tree: Any) -> jax.Array:
        flat = [leaf.reshape(-1) for leaf in jax.tree.leaves(tree)]
        return jnp.concatenate([leaf[:: max(1, leaf.size // SAMPLED)] for leaf in flat])

    return np.asarray(jax.jit(pick)(tree))
