"""The command line, ``moe-jax``: parses, calls, prints."""

import sys
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from moe_jax.checkpoint import CheckpointError
from moe_jax.config import byte_lm
from moe_jax.console import (
    TrainingProgress,
    closing_table,
    insight_table,
    print_paths,
    run_table,
)
from moe_jax.monitoring import save_plots
from moe_jax.training import DivergedError, read_metrics
from moe_jax.training.run import (
    RunError,
    baselines,
    open_run,
    read_config,
    resume_run,
    sample_queries,
    start_run,
)

app = tyro.extras.SubcommandApp()
_console = Console()


@app.command
def train(
    *,
    out: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(a new folder in runs/)")] = None,
    steps: int | None = None,
    seed: int | None = None,
    resume: bool = False,
    data: tuple[Path, ...] = (),
    config: Path | None = None,
) -> None:
    """Train a byte language model and its knowledge graph, then ask the graph.

    Args:
        out: Run folder.
        steps: Optimizer steps in all.
        seed: Seed of parameters, data order and dropout.
        resume: Go on with the run in --out from its newest complete checkpoint.
        data: Files and folders to learn from; by default the Python standard library's source.
        config: Sizes and all other options, a file like a run folder's config.json, or a run folder
            to take them from; by default a small model.
    """
    paths = list(data) or None
    if resume:
        if out is None:
            raise RunError("--resume needs --out, the folder of the run to go on with")
        if seed is not None and seed != read_config(out).training.seed:
            raise RunError(f"--seed cannot change on --resume, the run has its own, got {seed}")
        if config is not None:
            raise RunError(f"--config cannot change on --resume, the run has its own, got {config}")
        total = steps or read_config(out).training.steps
        with TrainingProgress(total, _console) as progress:
            result, corpus = resume_run(out, steps=steps, data=paths, on_step=progress.update)
    else:
        out = out or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
        chosen = byte_lm() if config is None else read_config(config)
        changes = {"steps": steps, "seed": seed}
        changes = {name: value for name, value in changes.items() if value is not None}
        chosen = chosen.replace(training=chosen.training.replace(**changes))
        with TrainingProgress(chosen.training.steps, _console) as progress:
            result, corpus = start_run(out, chosen, data=paths, on_step=progress.update)

    references = baselines(corpus, read_config(out))
    _console.print(closing_table(result.evaluation, references, int(result.graph.num_live)))
    run = open_run(out)
    for text in sample_queries(corpus):
        _console.print(insight_table(text, run.query(text, k=3)))
    records = read_metrics(out / "metrics.jsonl")
    plots = save_plots(out / "plots", records, result.graph, references=references)
    print_paths(_console, f"trained in {result.seconds:.0f} s; plots:", plots)
    print_paths(_console, "run folder:", [out])


@app.command
def query(run: tyro.conf.Positional[Path], text: tyro.conf.Positional[str], *, k: int = 5) -> None:
    """Ask a run's knowledge graph for the insights nearest to a text.

    Args:
        run: Run folder.
        text: Any text.
        k: Insights wanted.
    """
    opened = open_run(run)
    names = opened.config.model.moe.expert_specializations
    _console.print(insight_table(text, opened.query(text, k), names))


@app.command
def info(run: tyro.conf.Positional[Path]) -> None:
    """Show what a run folder holds.

    Args:
        run: Run folder.
    """
    metrics = run / "metrics.jsonl"
    opened = open_run(run)
    _console.print(run_table(opened, read_metrics(metrics) if metrics.is_file() else []))


def main() -> None:
    """Runs the command line; a wrong call ends with one line and exit code 2."""
    try:
        app.cli(
            prog="moe-jax",
            description="Train mixtures of experts that remember, and ask what they remember.",
        )
    except KeyboardInterrupt:
        print("moe-jax: interrupted; see `moe-jax train --resume --out DIR`", file=sys.stderr)
        sys.exit(130)
    except (RunError, CheckpointError, DivergedError, ValueError, OSError) as error:
        print(f"moe-jax: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
