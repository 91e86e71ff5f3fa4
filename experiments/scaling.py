"""How time and memory grow: `python experiments/scaling.py --out scaling` (CPU: `--size tiny`).

Each curve varies one size and keeps the others: experts, batch and sequence of a forward pass (and,
with `--curves`, of a training step), nodes of a half-full graph that is searched or inserted into.
A curve has a process of its own. Times are medians of single calls, each waited for; memory is what
XLA plans for the compiled program: arguments, results and temporaries. A point that fails is
recorded with its reason, and the rest goes on.

The growth exponent is the slope of a straight line through the points, both axes logarithmic: of
all of them, and of the upper half, where what does not grow (launches, the work of other sizes)
weighs less. 1 is linear growth, the dashed lines, which end in the last point.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import harness
import jax
import numpy as np
import tyro
from bench_system import SystemCase, cast_experts, half_full, make_step
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax import MoESystem
from moe_jax.config import MoEConfig, colab, h100, tiny
from moe_jax.graph import KnowledgeGraph, insert, search

Point = dict[str, Any]
Axis = Literal["experts", "batch", "sequence", "nodes"]


@dataclasses.dataclass(frozen=True)
class Size:
    """What is held while one thing varies, and the values that each takes.

    Attributes:
        config: of the system.
        batch: B.
        sequence: S.
        rows: queries of a search, and rows of an insert.
        values: of each axis.
    """

    config: MoEConfig
    batch: int
    sequence: int
    rows: int
    values: Mapping[Axis, tuple[int, ...]]


def _doubled(first: int, last: int, by: int = 2) -> tuple[int, ...]:
    return tuple(first * by**i for i in range(32) if first * by**i <= last)


SIZES = {
    "seed": Size(h100(), 8, 128, 128, {
        "experts": _doubled(8, 256), "batch": _doubled(1, 64), "sequence": _doubled(64, 2048),
        "nodes": (1_000, 4_000, 16_000, 64_000, 250_000, 1_000_000),
    }),
    "colab": Size(colab(), 4, 128, 128, {
        "experts": _doubled(8, 64), "batch": _doubled(1, 16), "sequence": _doubled(64, 1024),
        "nodes": _doubled(1_000, 64_000, 4),
    }),
    "tiny": Size(tiny(), 4, 32, 16, {
        "experts": _doubled(4, 32), "batch": _doubled(1, 16), "sequence": _doubled(16, 128),
        "nodes": _doubled(512, 32_768, 4),
    }),
}  # fmt: skip
# What is timed, what varies, and the growth to expect.
CURVES: dict[str, tuple[str, Axis, str]] = {
    "forward: experts": ("forward", "experts", "linear: every expert's weights are read"),
    "forward: batch": ("forward", "batch", "linear, once weights are not most of what is read"),
    "forward: sequence": ("forward", "sequence", "linear while K S / E is far below H"),
    "search: nodes": ("search", "nodes", "linear: every key is read"),
    "insert: nodes": ("insert", "nodes", "linear: every key is read"),
    "training: experts": ("training", "experts", "linear: weights, gradients and moments"),
    "training: batch": ("training", "batch", "linear, once the optimizer is not most of it"),
    "training: sequence": ("training", "sequence", "linear, once the optimizer is not most of it"),
}
USUAL = tuple(name for name in CURVES if not name.startswith("training"))
COLUMNS = {
    "curve": "curve",
    "from": "from",
    "to": "to",
    "time": "time, exponent",
    "time_above": "upper half",
    "memory": "memory, exponent",
    "memory_above": "upper half",
    "expected": "expected",
}


def prepare(curve: str, value: int, size: Size) -> tuple[Callable, Callable[[Any], tuple]]:
    """The jitted function of a point, and what gives its next arguments after a result."""
    what, axis, _ = CURVES[curve]
    if what in ("search", "insert"):
        return _prepare_graph(what, value, size)
    config = size.config.replace(num_experts=value) if axis == "experts" else size.config
    batch = value if axis == "batch" else size.batch
    length = value if axis == "sequence" else size.sequence
    system = MoESystem(config)
    x = jax.random.normal(jax.random.key(3), (batch, length, config.input_dim))
    if what == "training":
        case = SystemCase("training/step", batch, length, "float32", config)
        step, state = make_step(system, case)
        return step, lambda result: (result[0] if result else state, x)

    @jax.jit
    def create(key: jax.Array) -> Any:
        return cast_experts(system.init(key, x[:1, :8]), config.compute_dtype)

    variables = create(jax.random.key(0))
    return jax.jit(lambda variables, x: system.apply(variables, x)), lambda _: (variables, x)


def _prepare_graph(what: str, nodes: int, size: Size) -> tuple[Callable, Callable[[Any], tuple]]:
    dim, slots = size.config.output_dim, size.config.kg_edge_slots
    graph = jax.jit(lambda: half_full(KnowledgeGraph.create(nodes, dim, num_edge_slots=slots)))()
    rows = jax.random.normal(jax.random.key(4), (size.rows, dim))
    if what == "search":
        return jax.jit(lambda graph, rows: search(graph, rows, k=10)), lambda _: (graph, rows)
    # Every insert meets the same graph, in memory of its own that it may write.
    return (
        jax.jit(lambda graph, rows: insert(graph, rows), donate_argnums=0),
        lambda _: (jax.tree.map(lambda leaf: leaf.copy(), graph), rows),
    )


def measure(curve: str, value: int, size: str, repeats: int) -> Point:
    """One point of a curve, in this process."""
    function, arguments = prepare(curve, value, SIZES[size])
    args = arguments(None)
    compiled = function.lower(*args).compile()
    times, result = [], None
    for _ in range(repeats + 2):
        args = jax.block_until_ready(arguments(result))
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(*args))
        times.append(1e3 * (time.perf_counter() - began))
    return {
        "ms": statistics.median(times[2:]),
        "spread_ms": [min(times[2:]), max(times[2:])],
        "gib": harness.planned_bytes(compiled) / harness.GIB,
        "peak_gib_so_far": (harness.peak_bytes() or 0) / harness.GIB or None,
        "machine": harness.machine(),
    }


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The slope of the straight line nearest to (log x, log y); None for fewer than two points."""
    if len(x) < 2:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def exponents(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, float | None]:
    """Of all points, and of their upper half, two at least."""
    half = max(0, min(len(x) // 2, len(x) - 2))
    return exponent(x, y), exponent(x[half:], y[half:])


def known(points: Sequence[Point], name: str) -> tuple[list[float], list[float]]:
    """Values and figures of the points that have any."""
    some = [(point["value"], point[name]) for point in points if name in point]
    return [x for x, _ in some], [y for _, y in some]


def growth(curve: str, points: Sequence[Point]) -> dict[str, Any]:
    """A row of the table: the exponents of a curve."""
    row = {"curve": curve, "expected": CURVES[curve][2]}
    for name, title in (("ms", "time"), ("gib", "memory")):
        x, y = known(points, name)
        row |= dict(zip((title, f"{title}_above"), exponents(x, y), strict=True))
        row |= {"from": x[0], "to": x[-1]} if x else {}
    return row


def report(curves: Mapping[str, list[Point]]) -> str:
    """The tables: growth of each curve, and its points."""
    parts = [harness.markdown([growth(curve, points) for curve, points in curves.items()], COLUMNS)]
    for curve, points in curves.items():
        what, axis, _ = CURVES[curve]
        factor, unit = harness.memory_unit(point.get("gib") for point in points)
        rows = [
            {
                axis: f"{p['value']:,}",
                "ms": harness.outcome(p),
                "gib": p.get("gib") and factor * p["gib"],
            }
            for p in points
        ]
        parts.append(harness.markdown(rows, {axis: axis, "ms": f"{what}, ms", "gib": unit}))
    return "\n\n".join(parts) + "\n"


def plot(curves: Mapping[str, list[Point]], title: str) -> Figure:
    """Time above memory, a column for each axis, with dashed lines of linear growth."""
    axes = list(dict.fromkeys(CURVES[curve][1] for curve in curves))
    figure = Figure(figsize=(3.6 * len(axes) + 0.6, 6.4), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        own = {CURVES[c][0]: points for c, points in curves.items() if CURVES[c][1] == axis}
        scale, unit = harness.memory_unit(p.get("gib") for points in own.values() for p in points)
        top, bottom = panels[:, column]
        _lines(top, own, "ms", 1.0)
        _lines(bottom, own, "gib", scale)
        harness.finish(top, axis.capitalize(), "", "ms" if column == 0 else "")
        harness.finish(bottom, "", axis, f"{unit}, planned")
    figure.suptitle(f"{title}; dashed: linear growth", fontsize=9, x=0.01, ha="left")
    return figure


def _lines(axes: Axes, own: Mapping[str, list[Point]], name: str, factor: float) -> None:
    """One line for each thing timed, with room for the legend above them; crosses for failures."""
    figures = [factor * v for points in own.values() for v in known(points, name)[1]] or [1.0]
    for what, points in own.items():
        colour = harness.INK if what in ("forward", "search") else harness.BRIGHT
        x, y = known(points, name)
        if len(x) > 1:
            label = "{}, exponent {:.2f}, upper half {:.2f}".format(what, *exponents(x, y))
            axes.plot(x, [factor * v for v in y], "o-", color=colour, ms=4, lw=1.5, label=label)
            linear = [factor * y[-1] * v / x[-1] for v in x]
            axes.plot(x, linear, "--", color=colour, lw=1, alpha=0.6)
        if failed := [point["value"] for point in points if "error" in point]:
            at_bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(failed, [0.02] * len(failed), "x", color=colour, label="failed", **at_bottom)
    spread = max(max(figures) / min(figures), 10.0)
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(min(figures) / spread**0.15, min(figures) * spread**1.4)
    values = sorted({point["value"] for points in own.values() for point in points})
    axes.set_xticks(values, [_short(value) for value in values])
    harness.plain_decades(axes.yaxis, (1, 2, 5) if spread < 500 else (1,))
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="upper left")


def _short(value: int) -> str:
    if value % 10**6 == 0:
        return f"{value // 10**6}M"
    return str(value) if value % 1000 else f"{value // 1000}k"


def walk(curve: str, size: str, repeats: int, limit: float) -> Iterator[Point]:
    """The points of a curve as they come, all from one process."""
    values = SIZES[size].values[CURVES[curve][1]]
    points = harness.in_turn(measure, [(curve, value, size, repeats) for value in values], limit)
    for value, point in zip(values, points, strict=True):
        harness.say(f"{curve} {value:,}: {harness.outcome(point)}")
        yield {"value": value} | point


def main(
    curves: tuple[str, ...] = USUAL,
    size: Literal["seed", "colab", "tiny"] = "seed",
    repeats: int = 10,
    limit: float = 200.0,
    out: Path | None = None,
) -> None:
    """Measures the curves.

    Args:
        curves: names or beginnings of names, such as "forward", "search" or "training: batch".
        size: the seed defaults, those of `moe_jax.config.colab`, or of `tiny`.
        repeats: calls of each point.
        limit: seconds that a point may take.
        out: folder for scaling.json, scaling.md and scaling.png, written anew after every curve.
    """
    harness.prepare_environment()
    measured: dict[str, list[Point]] = {}
    for curve in [name for name in CURVES if name.startswith(curves)]:
        measured[curve] = list(walk(curve, size, repeats, limit))
        if out:
            save(measured, size, out)
    print(report(measured))


def save(curves: Mapping[str, list[Point]], size: str, out: Path) -> None:
    """Writes what there is so far."""
    out.mkdir(parents=True, exist_ok=True)
    on = next((p["machine"] for points in curves.values() for p in points if "ms" in p), {})
    title = f"Size {size}; {on.get('device')}, jax {on.get('jax')}"
    grown = [growth(curve, points) for curve, points in curves.items()]
    result = {"size": size, "machine": on, "growth": grown, "curves": curves}
    (out / "scaling.json").write_text(json.dumps(result, indent=1))
    (out / "scaling.md").write_text(f"{title}, {on.get('date')}\n\n{report(curves)}")
    plot(curves, title).savefig(out / "scaling.png", dpi=140)


if __name__ == "__main__":
    tyro.cli(main)
