"""Plots of a run and of a graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_jax.graph import GraphHealth, KnowledgeGraph, health

_INK, _FAINT = "#1f4e79", "#9aa5b1"
_SHARES = {
    "occupancy": "slots in use",
    "merge_rate": "items merged",
    "duplicate_rate": "near-duplicates",
    "never_read_share": "no read recorded",
    "isolated_share": "isolated",
    "hub_share": "edges into top 1%",
}


def save_plots(
    directory: Path,
    records: Sequence[Mapping[str, Any]],
    graph: KnowledgeGraph,
    *,
    references: Mapping[str, float] | None = None,
) -> list[Path]:
    """Draws a run's learning curve, expert load, knowledge graph and its health as PNG files.

    Args:
        directory: of the plots; created when absent.
        records: of ``metrics.jsonl``.
        graph: the graph at the end.
        references: bits per byte of other models, drawn beside the learning curve.

    Returns:
        The paths, in the order above.

    Example:
        >>> import tempfile
        >>> from moe_jax.graph import KnowledgeGraph
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     paths = save_plots(Path(folder), [], KnowledgeGraph.create(8, 2))
        ...     [path.name for path in paths]
        ['learning.png', 'load.png', 'graph.png', 'health.png']
    """
    directory.mkdir(parents=True, exist_ok=True)
    drawings = {
        "learning.png": lambda f: plot_learning(f.subplots(), records, references or {}),
        "load.png": lambda f: plot_load(f.subplots(), records),
        "graph.png": lambda f: plot_graph(f.subplots(), graph),
        "health.png": lambda f: plot_health(f, records, jax.device_get(health(graph))),
    }
    paths = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        draw(figure)
        figure.savefig(directory / name, dpi=120)
        paths.append(directory / name)
    return paths


def plot_learning(
    axes: Axes, records: Sequence[Mapping[str, Any]], references: Mapping[str, float]
) -> None:
    """Draws bits per byte against steps, with held-out evaluations and references.

    Args:
        axes: to draw on.
        records: of ``metrics.jsonl``.
        references: name to bits per byte, drawn as dotted lines.
    """
    losses = [(r["step"], r["bits_per_byte"]) for r in records if "bits_per_byte" in r]
    if losses:
        marker = "." if len(losses) < 3 else ""  # a line of one point is none
        axes.plot(*zip(*losses, strict=True), marker + "-", color=_INK, lw=1.2, label="training")
    held = [(r["step"], r["eval_bits_per_byte"]) for r in records if "eval_bits_per_byte" in r]
    if held:
        axes.plot(*zip(*held, strict=True), "o", color="#c0392b", label="held out")
    name = "eval_bits_per_byte_memory_off"
    off = [(r["step"], r[name]) for r in records if name in r]
    if off:
        style = {"color": "#c0392b", "mfc": "none", "label": "held out, memory off"}
        axes.plot(*zip(*off, strict=True), "D", **style)
    for name, value in references.items():
        axes.axhline(value, color=_FAINT, ls=":", lw=1.2)
        axes.annotate(
            f"{name} {value:.2f}",
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 2),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#5f6b76",
        )
    _finish(axes, "Learning", "step", "bits per byte")
    if losses or held:
        axes.legend(frameon=False)


def plot_load(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Draws each expert's share of the held-out choices, one group of bars per layer.

    Args:
        axes: to draw on.
        records: of ``metrics.jsonl``; the last evaluation is drawn, else the last step.
    """
    held_out = [r["eval_load"] for r in records if "eval_load" in r]
    loads = held_out or [r["load"] for r in records if "load" in r] or [np.zeros((1, 1))]
    load = np.atleast_2d(loads[-1])
    layers, experts = load.shape
    width = 0.8 / layers
    for layer in range(layers):
        at = np.arange(experts) + (layer - (layers - 1) / 2) * width
        shade = 0.45 + 0.55 * (layer + 1) / layers
        axes.bar(at, load[layer], width, color=_INK, alpha=shade, label=f"layer {layer}")
    axes.axhline(1 / experts, color="#c0392b", lw=1, ls="--", label="perfect balance")
    axes.set_ylim(0, max(float(load.max()) * 1.3, 1e-3))
    title = "Expert load, held out" if held_out else "Expert load"
    _finish(axes, title, "expert", "share of choices")
    axes.legend(frameon=False, ncols=3, fontsize=8)


def plot_graph(axes: Axes, graph: KnowledgeGraph, *, max_nodes: int = 600) -> None:
    """Draws live nodes on the two main axes of their keys, with the edges between them.

    Args:
        axes: to draw on.
        graph: the graph.
        max_nodes: nodes drawn, those with the most hits first.
    """
    live = np.flatnonzero(np.asarray(graph.is_live))
    hits = np.asarray(graph.hits)
    live = live[np.argsort(-hits[live], kind="stable")][:max_nodes]
    drawn = f"{len(live):,} of " if len(live) < int(graph.num_live) else ""
    _finish(axes, f"Knowledge graph: {drawn}{int(graph.num_live):,} nodes", "", "")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    if len(live) < 3:
        axes.text(0.5, 0.5, "too few nodes to draw", ha="center", transform=axes.transAxes)
        return
    keys = np.asarray(graph.key)[live]
    keys = keys - keys.mean(axis=0)
    _, _, basis = np.linalg.svd(keys, full_matrices=False)
    spots = keys @ basis[:2].T
    place = {int(node): spot for node, spot in zip(live, spots, strict=True)}
    targets = np.asarray(graph.edge_target)[live]
    for start, ends in zip(live, targets, strict=True):
        for end in ends:
            if int(end) in place:
                line = np.stack([place[int(start)], place[int(end)]])
                axes.plot(line[:, 0], line[:, 1], color=_FAINT, lw=0.4, alpha=0.35, zorder=1)
    experts = np.asarray(graph.expert_id)[live]
    size = 8 + 22 * np.log1p(hits[live]) / np.log1p(max(int(hits[live].max()), 1))
    dots = axes.scatter(*spots.T, c=experts, s=size, cmap="turbo", zorder=2, linewidths=0)
    axes.figure.colorbar(dots, ax=axes, label="expert")


def plot_health(figure: Figure, records: Sequence[Mapping[str, Any]], report: GraphHealth) -> None:
    """Draws hits and ages of the nodes, and the shares of `GraphHealth` now and through the run.

    Args:
        figure: to draw on.
        records: of ``metrics.jsonl``; those with graph_health make the curves.
        report: of the graph as it is, on the host.
    """
    figure.set_size_inches(9.0, 5.8)
    (hits, ages), (through, now) = figure.subplots(2, 2)
    _plot_bins(hits, np.asarray(report.hits_histogram), "Hits of a node", "items it stands for")
    _plot_bins(ages, np.asarray(report.age_histogram), "Age of a node", "logical time")
    past = [(r["step"], r["graph_health"]) for r in records if "graph_health" in r]
    colours = ("#1f4e79", "#c0392b", "#d98e04", "#2e8b57", "#7d5ba6", "#5f6b76")
    for name, colour in zip(_SHARES, colours, strict=True):
        line = [(step, values[name]) for step, values in past]
        if line:
            through.plot(*zip(*line, strict=True), "o-", color=colour, ms=3, lw=1.2)
    through.set_ylim(-0.02, 1.02)
    if past:  # a single evaluation, too, lies on the way from the first step
        through.set_xlim(0, 1.05 * max(1, past[-1][0]))
    _finish(through, "Shares through the run", "step", "share")
    values = [float(getattr(report, name)) for name in _SHARES]
    names = _SHARES | ({"never_read_share": "never read"} if report.has_reads else {})
    bars = now.barh(list(names.values()), values, color=colours)
    now.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize=7)
    now.set_xlim(0, 1.3)
    now.set_xticks([0, 0.5, 1])
    now.invert_yaxis()
    now.tick_params(axis="y", labelsize=7)
    _finish(now, f"Shares now ({int(report.dead_edges)} dead edges)", "share", "")


def _plot_bins(axes: Axes, counts: np.ndarray, title: str, x: str) -> None:
    """Draws a histogram in powers of two, up to its last bin in use."""
    used = int(np.flatnonzero(counts).max(initial=1)) + 1
    axes.bar(np.arange(used), counts[:used], color=_INK)
    names = ["0", *(f"{2**b:,}" if b < 10 else f"$2^{{{b}}}$" for b in range(used - 1))]
    axes.set_xticks(np.arange(used), names, fontsize=7, rotation=0 if used < 9 else 45)
    _finish(axes, title, f"{x} (from)", "nodes")


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
