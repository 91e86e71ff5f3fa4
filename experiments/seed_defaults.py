"""Speed and memory of the seed defaults on one GPU: `python experiments/seed_defaults.py`.

Every case runs in its own process, so that the allocator's peak is that case's alone. Times are
medians after a warm-up; "ms" waits for each call, "ms in a row" for the last of ten. Inputs rotate,
the graph is half full, and the sizes are `moe_jax.config.h100()`: bfloat16 with tanh GELU.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax import MoESystem
from moe_jax.config import MoEConfig, h100
from moe_jax.graph import KnowledgeGraph
from moe_jax.graph.state import with_keys
from moe_jax.ops import normalize
from moe_jax.training import write_before_update

IN_A_ROW = 10
_ON_DEVICE = " --xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
NUM_INPUTS = 4
COLUMNS = {
    "name": "case",
    "params": "parameters",
    "shape": "batch",
    "ms": "ms",
    "ms_in_a_row": "ms in a row",
    "samples_per_s": "samples/s",
    "useful_tflops": "useful TFLOP/s",
    "peak_gib": "peak GiB",
    "max_over_mean": "load max/mean",
    "dropped": "dropped",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: "forward", "forward + write", "training" or "training + write".
        batch: B.
        length: S.
        params: dtype of the experts' parameters.
        remat: as in `MoEConfig`.
        on_device: let the device decide loops and branches, an option of XLA off by default.
    """

    name: str
    batch: int
    length: int
    params: str = "float32"
    remat: str = "none"
    on_device: bool = False

    @property
    def trains(self) -> bool:
        """Whether a step updates the parameters."""
        return self.name.startswith("training")

    @property
    def writes(self) -> bool:
        """Whether a step writes the graph."""
        return self.name.endswith("write")


CASES = [
    Case(name, batch, length, params)
    for batch, length in ((8, 128), (32, 512))
    for name, params in (
        ("forward", "float32"),
        ("forward", "bfloat16"),
        ("forward + write", "bfloat16"),
        ("training", "float32"),
        ("training + write", "float32"),
    )
] + [
    Case("forward + write", 8, 128, "bfloat16", on_device=True),
    Case("training", 32, 512, remat="full"),
]


def flops_per_token(config: MoEConfig, length: int, kept: float) -> float:
    """Operations of one token's forward pass through its kept experts; nothing else counts.

    Two per multiply-add: the matrices of a transformer expert (encoder D*H, attention 4*H*H,
    feed-forward 8*H*H, decoder H*H and H*O), and the scores and mixing of attention over the
    K*S/E tokens that an expert holds of a sequence on average. Empty slots, the supervisor, the
    librarian and the graph are work, too, but not counted as useful.
    """
    d, h, o = config.input_dim, config.hidden_dim, config.output_dim
    seen = config.top_k_experts * length / config.num_experts * kept
    matrices = d * h + 13 * h * h + h * o
    return 2 * (matrices + 2 * seen * h) * config.top_k_experts * kept


def cast_experts(variables: Any, dtype: str) -> Any:
    """The variables with the experts' parameters cast; the float32 supervisor stays."""

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        is_expert = any(getattr(part, "key", None) == "bank" for part in path)
        return leaf.astype(dtype) if is_expert else leaf

    return jax.tree_util.tree_map_with_path(cast, variables)


def half_full(graph: KnowledgeGraph) -> KnowledgeGraph:
    """The graph with every second half of its slots taken by random nodes."""
    key = normalize(jax.random.normal(jax.random.key(2), graph.key.shape))
    is_live = jnp.arange(graph.num_nodes) < graph.num_nodes // 2
    at = jnp.where(is_live, jnp.arange(graph.num_nodes), graph.num_nodes)
    return with_keys(graph, at, key)._replace(value=key + 0, is_live=is_live)


def make_step(system: MoESystem, case: Case) -> tuple[Callable, Any]:
    """The compiled step, (state, x) -> (state, stats), and its first state, which it donates."""
    variables = jax.jit(lambda key: cast_experts(
        system.init(key, jnp.zeros((1, 8, system.config.input_dim))), case.params
    ))(jax.random.key(0))  # fmt: skip
    graph = jax.jit(lambda: half_full(system.create_graph()))() if case.writes else None
    if case.trains:
        return _training_step(system, variables, graph)
    if case.writes:
        write = system.inference_step()

        def step(graph, x):
            graph, out, _ = write(variables, graph, x)
            return graph, (out.output, out.stats)

        return step, graph
    forward = jax.jit(system.apply)

    def forward_step(state, x):
        out = forward(variables, x)
        return state, (out.output, out.stats)

    return forward_step, None


def _training_step(system: MoESystem, variables: Any, graph: KnowledgeGraph | None):
    optimizer = optax.adamw(1e-4)

    def loss(variables, x, key):
        target = jax.random.normal(key, (*x.shape[:2], system.config.output_dim))
        rngs = {"dropout": jax.random.fold_in(key, 1)}
        out = system.apply(variables, x, is_training=True, rngs=rngs)
        error = jnp.mean(jnp.square(out.output.astype(jnp.float32) - target))
        return error + out.losses.total, out

    def step(state, x):
        variables, moments, graph, key = state
        key, own = jax.random.split(key)
        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(variables, x, own)
        if graph is not None:
            graph, _ = system.write(graph, out.proposals)
            moments = write_before_update(graph, moments)
        updates, moments = optimizer.update(grads, moments, variables)
        variables = optax.apply_updates(variables, updates)
        return (variables, moments, graph, key), (value, out.stats)

    state = (variables, jax.jit(optimizer.init)(variables), graph, jax.random.key(1))
    return jax.jit(step, donate_argnums=0), state


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Runs one case in this process."""
    config = h100().replace(remat=case.remat)
    step, state = make_step(MoESystem(config), case)
    shape = (NUM_INPUTS, case.batch, case.length, config.input_dim)
    inputs = list(jax.random.normal(jax.random.key(3), shape))
    for x in inputs:
        state, (result, stats) = jax.block_until_ready(step(state, x))
    single, row = [], []
    for i in range(repeats):
        started = time.perf_counter()
        state, (result, stats) = jax.block_until_ready(step(state, inputs[i % NUM_INPUTS]))
        single.append(time.perf_counter() - started)
    for _ in range(max(3, repeats // 4)):
        started = time.perf_counter()
        for i in range(IN_A_ROW):
            state, (result, stats) = step(state, inputs[i % NUM_INPUTS])
        jax.block_until_ready((state, result))
        row.append((time.perf_counter() - started) / IN_A_ROW)
    if not bool(jnp.all(jnp.isfinite(result))):
        raise FloatingPointError(f"{case} gave numbers that are not finite")
    spread = {"spread_ms": [1e3 * min(single), 1e3 * max(single)]}
    figures = _figures(case, config, statistics.median(single), statistics.median(row), stats)
    return figures | spread


def _figures(case: Case, config: MoEConfig, single: float, row: float, stats: Any) -> dict:
    dropped = float(stats.dropped_fraction)
    flops = flops_per_token(config, case.length, 1 - dropped) * case.batch * case.length
    flops *= 3 if case.trains else 1
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return _labels(case) | {
        "ms": 1e3 * single,
        "ms_in_a_row": 1e3 * row,
        "samples_per_s": case.batch / row,
        "useful_tflops": flops / row / 1e12,
        "peak_gib": peak / 2**30,
        "max_over_mean": float(stats.max_over_mean),
        "dropped": dropped,
    }


def _labels(case: Case) -> dict[str, str]:
    name = case.name + ("" if case.remat == "none" else f", remat {case.remat}")
    name += ", loops on the device" if case.on_device else ""
    return {"name": name, "params": case.params, "shape": f"{case.batch} x {case.length}"}


def ceilings(repeats: int) -> dict[str, Any]:
    """What the machine gives at best: one large bfloat16 product, one large copy."""
    size = 8192
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    matmul, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    large = jax.random.normal(jax.random.key(1), (2**30,))

    def seconds(function: Callable, *args: jax.Array) -> float:
        times = []
        for _ in range(repeats + 2):
            started = time.perf_counter()
            for _ in range(IN_A_ROW):
                result = function(*args)
            jax.block_until_ready(result)
            times.append((time.perf_counter() - started) / IN_A_ROW)
        return statistics.median(times[2:])

    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflops": 2 * size**3 / seconds(matmul, a, b) / 1e12,
        "copy_tb_per_s": 2 * large.nbytes / seconds(copy, large) / 1e12,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""

    def text(value: Any) -> str:
        if isinstance(value, str):
            return value
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    lines = [" | ".join(COLUMNS.values()), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(text(row.get(name, "failed")) for name in COLUMNS) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", help="run only the cases whose name starts with this")
    parser.add_argument("--case", type=int, help="run one case in this process; -1: the ceilings")
    args = parser.parse_args()
    if args.case is not None:
        run = ceilings if args.case < 0 else functools.partial(measure, CASES[args.case])
        print(json.dumps(run(args.repeats)))
        return
    chosen = [i for i, case in enumerate(CASES) if case.name.startswith(args.only or "")]
    with tempfile.TemporaryDirectory() as folder:
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", folder)
        found = [_in_own_process(i, args.repeats, cache) for i in [-1, *chosen]]
    limits, rows = found[0], found[1:]
    print(json.dumps(limits), table(rows), sep="\n")
    if args.json:
        args.json.write_text(json.dumps({"ceilings": limits, "cases": rows}, indent=2))


def _in_own_process(index: int, repeats: int, cache: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", str(index), "--repeats", str(repeats)]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    if index >= 0 and CASES[index].on_device:
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + _ON_DEVICE
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        print(done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
        return json.loads(done.stdout.splitlines()[-1])
    print(done.stderr[-2000:], file=sys.stderr)
    if index < 0:
        raise SystemExit("the ceilings could not be measured")
    return _labels(CASES[index])


if __name__ == "__main__":
    main()
