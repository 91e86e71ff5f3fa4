"""What each optimisation is worth: `python experiments/ladder.py --out ladder`.

Two ladders, inference (forward and graph write) and training (the same, with AdamW in float32).
Every rung adds one thing to the rung that it stands on, and runs in a process of its own:

- op by op: the step called without `jit`. Each operation of `jax.numpy`, `jax.lax` and Flax is
  dispatched by itself, as an eager framework does, and what Python takes for that counts; a loop
  is one operation. The graph's functions are compiled one by one wherever they are called from, so
  they are here, too.
- jit: the step as one program.
- bfloat16: arithmetic and, for inference, the experts' parameters.
- remat: the backward pass recomputes the experts, all but matmuls ("dots") or whole ("full").
- ahead of time: compiled for its shapes before the first call (`.lower().compile()`).
- command buffers: kernels, library calls, loops and branches in CUDA graphs; only on a GPU.
- donated: the state's memory (graph, parameters, moments) is used again for the new state. With it
  inference has all there is.

Times are medians of rounds of ten calls, the last of which is waited for. Memory is the allocator's
peak where it keeps one (a GPU), "at most" where building the parameters took as much as the step;
elsewhere what XLA plans for the program: arguments, results and temporaries. What each rung
computes (outputs and number of nodes written, or losses and gradients) is compared with the first.
Tokens that rounding has sent to other experts are counted, and left out of the outputs' difference;
of gradients, to which all tokens add, it may be larger for them.
On a CPU use `--size tiny` or `--size colab`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import harness
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rungs import SIZES, Rung, Task, measure, rungs

Rows = list[dict[str, Any]]
# Largest relative difference from the first rung that rounding explains. "tf32" is how a GPU
# multiplies float32 matrices.
TOLERANCE = {"float32": 1e-5, "tf32": 1e-2, "bfloat16": 5e-2}
# Largest share of tokens with other experts.
MOST_REROUTED = {"float32": 0.0, "tf32": 0.01, "bfloat16": 0.01}
COLUMNS = {
    "name": "rung",
    "on": "stands on",
    "ms": "ms",
    "speed_up": "speed-up",
    "over_last": "over the rung below",
    "gib": "",
    "ratio": "share",
    "promised": "promised by the original",
    "difference": "difference",
    "rerouted": "tokens with other experts",
}


def differences(
    found: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray]
) -> tuple[dict[str, float], float]:
    """The relative difference, by norm, of each of the numbers, and the share of tokens rerouted.

    Infinite for a NaN. Outputs are compared for the tokens that were not rerouted.
    """
    found, true = dict(found), dict(true)
    is_same = np.all(found.pop("experts") == true.pop("experts"), axis=-1)
    for numbers in found, true:
        if "output" in numbers:
            numbers["output"] = numbers["output"][is_same]
    share = 1.0 - float(is_same.mean())
    with np.errstate(invalid="ignore"):
        norm = np.linalg.norm
        each = {name: norm(found[name] - true[name]) / norm(true[name]) for name in true}
    return {n: float(np.nan_to_num(value, nan=np.inf)) for n, value in each.items()}, share


def compare(ladder: list[Rung], measured: Rows) -> Rows:
    """The rows of a ladder, as far as it was climbed, with what they gain over each other."""
    by_name = {rung.name: row for rung, row in zip(ladder, measured, strict=False)}
    numbers = next((row["numbers"] for row in measured if "ms" in row), {})
    first, whole = measured[0], next((gib for row in measured if (gib := _gib(row))), None)
    rows = []
    for rung, row in zip(ladder, measured, strict=False):
        below = rung.on
        while below and "ms" not in by_name.get(below.name, {}):
            below = below.on
        row = {"name": rung.name, "on": below and below.name, "promised": rung.promised} | row
        if "ms" in row:
            found, rerouted = differences(row.pop("numbers"), numbers)
            most, kind = max(found.values()), row["arithmetic"]
            allowed = dict.fromkeys(found, TOLERANCE[kind])
            if "gradient" in found:
                # So much of the norm of a sum of independent terms is that of this share of them.
                allowed["gradient"] += rerouted**0.5
            row |= {
                "speed_up": first["ms"] / row["ms"] if "ms" in first else None,
                "over_last": by_name[below.name]["ms"] / row["ms"] if below else None,
                "gib": _gib(row),
                "ratio": _gib(row) / whole if _gib(row) else None,
                "differences": found,
                "difference": most,
                "rerouted": rerouted,
                "agrees": rerouted <= MOST_REROUTED[kind]
                and all(value <= allowed[name] for name, value in found.items()),
            }
        if rung.times and "ms" in first:
            row["promised_ms"] = [first["ms"] / times for times in rung.times]
        if rung.share and _gib(first):
            row["promised_gib"] = [_gib(first) * share for share in rung.share]
        rows.append(row)
    return rows


def _gib(row: Mapping[str, Any]) -> float | None:
    return row.get("peak_gib") or row.get("planned_gib")


def table(task: Task, rows: Rows) -> str:
    """A ladder as Markdown."""
    factor, unit = harness.memory_unit(row.get("gib") for row in rows)
    shown = []
    for row in rows:
        cells = row | {"ms": harness.outcome(row), "gib": row.get("gib") and factor * row["gib"]}
        if row.get("is_at_most"):
            cells["gib"] = f"at most {cells['gib']:.3g}"
        if not row.get("agrees", True):
            cells["difference"] = f"{row['difference']:.2g}: TOO LARGE"
        shown.append(cells)
    is_peak = any(row.get("peak_gib") for row in rows)
    kind = "the allocator's peak" if is_peak else "XLA's plan of the program"
    whole = next((row["name"] for row in rows if row.get("gib")), "none")
    title = f"{task.capitalize()}; memory is {kind}, its share is that of {whole!r}."
    return f"{title}\n\n{harness.markdown(shown, COLUMNS | {'gib': unit})}\n"


def plot(ladders: Mapping[Task, Rows], title: str) -> Figure:
    """Bars of time and memory, two panels a ladder, with what was promised in orange."""
    heights = [len(rows) + 2.5 for rows in ladders.values()]
    figure = Figure(figsize=(11, 0.34 * sum(heights) + 0.7), layout="constrained")
    panels = figure.subplots(len(ladders), 2, squeeze=False, height_ratios=heights)
    for (task, rows), (left, right) in zip(ladders.items(), panels, strict=True):
        factor, unit = harness.memory_unit(row.get("gib") for row in rows)
        harness.finish(left, f"{task.capitalize()}: time of a step", "ms, logarithmic")
        harness.finish(right, "Memory", unit)
        left.set_xscale("log")
        _bars(left, rows, "ms", "speed_up", "{:.3g} ms", "  ({:.3g}x)")
        _bars(right, rows, "gib", "ratio", f"{{:.3g}} {unit}", "  ({:.2f})", factor)
        right.xaxis.set_major_locator(MaxNLocator(6))
        right.tick_params(labelleft=False)
    figure.suptitle(f"{title}; orange: promised by the original", fontsize=9, x=0.01, ha="left")
    return figure


def _bars(
    axes: Axes, rows: Rows, name: str, gain: str, label: str, gained: str, factor: float = 1.0
) -> None:
    """One bar a row; its figure and, if known, its gain at the right, where no bar reaches."""
    known = [row[name] for row in rows if row.get(name)]
    known += [value for row in rows for value in row.get(f"promised_{name}", ())]
    least, most = factor * min(known, default=1) / 2, factor * max(known, default=1)
    if axes.get_xscale() == "log":
        axes.set_xlim(least, most * (most / least) ** 0.45)
        harness.plain_decades(axes.xaxis)
    else:
        axes.set_xlim(0, 1.45 * most)
    for at, row in enumerate(rows):
        text = "unknown" if "ms" in row else str(harness.outcome(row))[:28]
        if row.get(name):
            text = label.format(factor * row[name])
            text += gained.format(row[gain]) if row.get(gain) else ""
            axes.barh(at, factor * row[name], color=harness.INK if row["on"] else harness.FAINT)
        place = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
        axes.text(1.0, at, text, fontsize=8, **place)
        if promised := row.get(f"promised_{name}"):
            axes.plot(
                [factor * v for v in promised], [at, at], "|-", color=harness.BRIGHT, ms=11, lw=2
            )
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)


def save(ladders: Mapping[Task, Rows], size: str, shape: Any, out: Path) -> None:
    """Writes ladder.json, ladder.md and ladder.png of what there is so far."""
    out.mkdir(parents=True, exist_ok=True)
    on = next((row["machine"] for rows in ladders.values() for row in rows if "ms" in row), {})
    title = f"Size {size}, {shape[0]} x {shape[1]}; {on.get('device')}, jax {on.get('jax')}"
    report = {"size": size, "shape": shape, "machine": on, "ladders": ladders}
    (out / "ladder.json").write_text(json.dumps(report, indent=1))
    text = "\n".join(table(task, rows) for task, rows in ladders.items())
    (out / "ladder.md").write_text(f"{title}, {on.get('date')}\n\n{text}")
    plot(ladders, title).savefig(out / "ladder.png", dpi=140)


def main(
    tasks: tuple[Task, ...] = ("inference", "training"),
    size: Literal["seed", "colab", "tiny"] = "seed",
    shape: tuple[int, int] | None = None,
    only: tuple[str, ...] = (),
    repeats: int = 5,
    limit: float = 400.0,
    out: Path | None = None,
) -> None:
    """Climbs the ladders.

    Args:
        tasks: which.
        size: the seed defaults, those of `moe_jax.config.colab`, or of `tiny`.
        shape: B and S; by default 8 and 128, and 2 and 16 for the tiny size.
        only: names of rungs; by default all.
        repeats: rounds of ten calls.
        limit: seconds that a rung may take.
        out: folder for ladder.json, ladder.md and ladder.png, written anew after every rung.
    """
    harness.prepare_environment()
    ladders: dict[Task, Rows] = {}
    for task in tasks:
        ladder, measured = [rung for rung in rungs(task) if not only or rung.name in only], []
        for rung in ladder:
            measured += harness.in_turn(measure, [(task, rung, size, shape, repeats)], limit)
            ladders[task] = compare(ladder, measured)
            harness.say(f"{task}, {rung.name}: {harness.outcome(ladders[task][-1])}")
            if out:
                save(ladders, size, shape or SIZES[size][1:], out)
    print("\n".join(table(task, rows) for task, rows in ladders.items()))
    if any(not row.get("agrees", True) for rows in ladders.values() for row in rows):
        raise SystemExit("a rung computes something else than the first one")


if __name__ == "__main__":
    tyro.cli(main)
