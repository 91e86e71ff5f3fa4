"""Metrics as JSON lines, and the closing numbers of a run."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax._files import replace_text
from moe_jax.graph import GraphHealth
from moe_jax.training.step import EvalSums, Metrics


def as_record(metrics: Metrics) -> dict[str, Any]:
    """Turns a step's metrics, already on the host, into plain values for one JSON line.

    Args:
        metrics: of one step, numpy arrays.

    Returns:
        loss and bits_per_byte; load, max_over_mean and dropped_fraction per layer; graph sizes.

    Example:
        >>> import numpy as np
        >>> zeros = Metrics(*([np.zeros(())] * len(Metrics._fields)))
        >>> as_record(zeros)["bits_per_byte"]
        0.0
    """
    plain = {name: np.asarray(value).tolist() for name, value in metrics._asdict().items()}
    plain["bits_per_byte"] = plain["loss"] / math.log(2)
    return plain


def summarise_eval(sums: EvalSums) -> dict[str, Any]:
    """Divides summed evaluations.

    Args:
        sums: of all held-out batches, on the host.

    Returns:
        eval_bits_per_byte; eval_load [L, E], eval_max_over_mean [L] and eval_dropped_fraction
        [L] over all real inputs of the sample.

    Example:
        >>> import numpy as np
        >>> ones = EvalSums(np.log(2.0), np.ones(()), np.ones((1, 4)), np.zeros(1), np.ones(()))
        >>> summarise_eval(ones)["eval_bits_per_byte"]
        1.0
    """
    load = np.asarray(sums.load) / max(float(sums.choices), 1.0)
    return {
        "eval_bits_per_byte": float(sums.nats / sums.count / math.log(2)),
        "eval_load": load.tolist(),
        "eval_max_over_mean": (load.max(axis=-1) * load.shape[-1]).tolist(),
        "eval_dropped_fraction": (sums.dropped / max(float(sums.choices), 1.0)).tolist(),
    }


def health_record(report: GraphHealth) -> dict[str, Any]:
    """Turns a health report, already on the host, into plain values for one JSON line.

    Args:
        report: from `moe_jax.graph.health`, numpy arrays.

    Returns:
        The report's fields by name; histograms as lists of 32 counts.

    Example:
        >>> import jax
        >>> from moe_jax.graph import KnowledgeGraph, health
        >>> health_record(jax.device_get(health(KnowledgeGraph.create(4, 2))))["occupancy"]
        0.0
    """
    return {name: np.asarray(value).tolist() for name, value in report._asdict().items()}


class JsonLines:
    """Appends records to a file, one JSON object a line; continues a run's file on resume.

    Args:
        path: of the file.
        last_step: on resume, the step that was restored: later lines, written after that
            checkpoint by the process that died, are dropped, as they will be written again.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lines = JsonLines(Path(folder) / "m.jsonl")
        ...     lines.write({"step": 1, "loss": 0.5})
        ...     read_metrics(Path(folder) / "m.jsonl")
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: Path, *, last_step: int = 0) -> None:
        self._path = path
        kept = [r for r in read_metrics(path) if r["step"] <= last_step] if path.exists() else []
        replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def has(self, name: str, step: int) -> bool:
        """Whether a record of the step holds such a value."""
        return any(r["step"] == step and name in r for r in read_metrics(self._path))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; its values must be plain."""
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads a metrics file; a last line cut short by a killed process is left out.

    Args:
        path: of the file.

    Returns:
        The records.

    Raises:
        ValueError: a line other than the last is no JSON object.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "m.jsonl").write_text('{"step": 1}' + chr(10) + '{"st')
        ...     read_metrics(Path(folder) / "m.jsonl")
        [{'step': 1}]
    """
    records = []
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is no JSON: {error}") from error
    return records
