"""What a run shows on a terminal: progress, the closing table, insights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from moe_jax.graph import GraphHealth, health
from moe_jax.training.run import Insight, Run


class TrainingProgress:
    """A progress bar with the last logged loss and speed.

    Args:
        steps: optimizer steps in all.
        console: to draw on.

    Example:
        >>> with TrainingProgress(2, Console(quiet=True)) as progress:
        ...     progress.update(1, {"bits_per_byte": 3.0, "tokens_per_second": 1e4})
    """

    def __init__(self, steps: int, console: Console) -> None:
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("training", total=steps, note="compiling")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self, step: int, record: Mapping[str, Any]) -> None:
        """Moves the bar; a logged step's record refreshes the numbers beside it."""
        note = {}
        if "bits_per_byte" in record:
            text = f"{record['bits_per_byte']:.2f} bits per byte"
            if "tokens_per_second" in record:
                text += f", {record['tokens_per_second']:,.0f} tokens/s"
            note = {"note": text}
        self._bar.update(self._task, completed=step, **note)


def closing_table(
    evaluation: Mapping[str, Any], baselines: Mapping[str, float], graph_nodes: int
) -> Table:
    """The held-out result beside the baselines', with balance, drops and graph size.

    Args:
        evaluation: see `moe_jax.training.summarise_eval`.
        baselines: name to bits per byte on the same bytes.
        graph_nodes: live nodes.

    Returns:
        A table to print.

    Example:
        >>> evaluation = {"eval_bits_per_byte": 1.5, "eval_max_over_mean": [1.1],
        ...               "eval_dropped_fraction": [0.01]}
        >>> closing_table(evaluation, {"xz -9e": 2.5}, 10).row_count
        5
    """
    table = Table(title="held-out result", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("bits per byte: this model", f"{evaluation['eval_bits_per_byte']:.3f}")
    if (off := evaluation.get("eval_bits_per_byte_memory_off")) is not None:
        table.add_row("bits per byte: this model, memory off", f"{off:.3f}")
    for name, value in baselines.items():
        table.add_row(f"bits per byte: {name}", f"{value:.3f}")
    worst = max(evaluation["eval_max_over_mean"])
    table.add_row("expert load, max over mean (worst layer)", f"{worst:.2f}")
    dropped = max(evaluation["eval_dropped_fraction"])
    table.add_row("dropped choices (worst layer)", f"{dropped:.2%}")
    table.add_row("knowledge graph nodes", f"{graph_nodes:,}")
    _add_token_memory(table, evaluation.get("token_memory"))
    return table


def _add_token_memory(table: Table, figures: Mapping[str, Any] | None) -> None:
    """Adds what reading whole documents with a token memory gave, where it was measured."""
    if figures is None:
        return
    text = f"bits per byte of a stream of {figures['bytes']:,} held-out bytes"
    table.add_row(f"{text}: this model", f"{figures['without']:.3f}")
    gain = 1 - figures["bits_per_byte"] / figures["without"]
    with_memory = f"{figures['bits_per_byte']:.3f} ({-gain:+.1%})"
    table.add_row("... remembering what it has seen of it", with_memory)
    table.add_row("... the same memory, shuffled", f"{figures['shuffled']:.3f}")


def insight_table(query: str, insights: Sequence[Insight], names: Sequence[str] = ()) -> Table:
    """Insights found for a query, nearest first.

    Args:
        query: what was asked.
        insights: what was found.
        names: of the experts; empty to show ids.

    Returns:
        A table to print.

    Example:
        >>> insight_table("def f():", []).row_count
        1
    """
    # Text, not str: source code is full of what rich would take for markup.
    table = Table(title=Text(f"query: {query}"), title_justify="left", expand=True, box=SIMPLE_HEAD)
    for name in ("similarity", "expert", "confidence"):
        table.add_column(name, justify="right", width=len(name))
    table.add_column("source", overflow="fold", ratio=1)
    for insight in insights:
        snippet = insight.snippet
        source = Text(snippet.name, style="bold")
        if snippet.problem:
            source.append(f"\n({snippet.problem})", style="not bold")
        else:
            source.append(f":{snippet.line_number}")
            source.append(f"\n{snippet.text.strip()}", style="not bold")
        expert = names[insight.expert] if names else str(insight.expert)
        sure = f"{insight.confidence:.2f}"
        table.add_row(f"{insight.similarity:.3f}", Text(expert), sure, source)
    if not insights:
        table.add_row("", "", "", "nothing: the graph is empty, since no write was due yet")
    return table


def run_table(run: Run, records: Sequence[Mapping[str, Any]]) -> Table:
    """What a run folder holds.

    Args:
        run: an opened run.
        records: of its metrics.

    Returns:
        A table to print.
    """
    c = run.config
    table = Table(title=Text(str(run.directory)), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    moe = c.model.moe
    table.add_row("step", f"{run.step} of {c.training.steps}")
    table.add_row("model", f"{c.model.num_layers} layers, width {moe.input_dim}")
    table.add_row("experts", f"{moe.num_experts} {moe.expert}, {moe.num_choices} per token")
    table.add_row("graph", f"{int(run.graph.num_live):,} of {run.graph.num_nodes:,} nodes")
    table.add_row("documents", f"{len(run.sources['files']):,}")
    for name, key in {
        "held-out bits per byte": "eval_bits_per_byte",
        "held-out bits per byte, memory off": "eval_bits_per_byte_memory_off",
    }.items():
        held = [record[key] for record in records if key in record]
        if held:
            table.add_row(name, f"{held[-1]:.3f}")
    streamed = [record["token_memory"] for record in records if "token_memory" in record]
    _add_token_memory(table, streamed[-1] if streamed else None)
    _add_health(table, jax.device_get(health(run.graph)))
    return table


def _add_health(table: Table, report: GraphHealth) -> None:
    """Adds what the graph of a run is like."""
    edges = f"{report.mean_out_degree:.1f} out of a node, at most {report.max_in_degree:,} into one"
    table.add_row("graph: items merged", f"{report.merge_rate:.1%} of the stored")
    table.add_row("graph: near-duplicates", f"{report.duplicate_rate:.1%} of nodes")
    # A graph that nothing reads, or whose readers record nothing, is not one full of useless nodes.
    unread = "never read" if report.has_reads else "no read recorded"
    table.add_row(f"graph: {unread}", f"{report.never_read_share:.1%} of nodes")
    table.add_row("graph: isolated", f"{report.isolated_share:.1%} of nodes")
    table.add_row("graph: edges", edges)
    table.add_row("graph: edges into the top 1% of nodes", f"{report.hub_share:.1%}")
    table.add_row("graph: dead edges", f"{report.dead_edges:,}")


def print_paths(console: Console, title: str, paths: Sequence[Path]) -> None:
    """Prints paths one a line, unwrapped so that they can be copied.

    Args:
        console: to print on.
        title: said first.
        paths: to print.
    """
    console.print(title)
    for path in paths:
        console.print(f"  {path}", soft_wrap=True, highlight=False, markup=False)
