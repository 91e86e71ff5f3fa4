"""What `bench.py` and `peers.py` share: a process for each case, how it is timed, and the table.

Imports neither JAX nor PyTorch.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

SHORTEST_ROW, LONGEST_ROW, ROW_SECONDS = 10, 50, 0.1
NUM_INPUTS = 4
CEILINGS = "ceilings"
COLUMNS = {
    "name": "case",
    "ms": "ms",
    "ms_in_a_row": "ms in a row",
    "samples_per_s": "samples/s",
    "useful_tflops": "useful TFLOP/s",
    "of_matmul": "of the matmul",
    "of_copy": "of the copy",
    "peak_gib": "peak GiB",
    "max_over_mean": "load max/mean",
    "dropped": "dropped",
    "candidate": "blocks",
    "ratio": "moe_jax over this",
}

Row = dict[str, Any]


class UnavailableError(Exception):
    """A case cannot run here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a call.

    Attributes:
        first: of the first one, with compiling.
        single: waiting for each call, sorted.
        row: a call of some in a row, waiting for the last one, median.
    """

    first: float
    single: list[float]
    row: float


def most_calls(repeats: int, longest_row: int = LONGEST_ROW) -> int:
    """How often `time_calls` calls at most."""
    return NUM_INPUTS + repeats + longest_row * _rows(repeats)


def _rows(repeats: int) -> int:
    return max(3, repeats // 4)


def time_calls(
    call: Callable[[int], Any],
    wait: Callable[[Any], Any],
    repeats: int,
    longest_row: int = LONGEST_ROW,
) -> tuple[Times, Any]:
    """Times `call(i)`, the i-th call, which must use another input than the call before.

    Args:
        call: starts the work and returns its result.
        wait: waits for a result.
        repeats: calls that are waited for.
        longest_row: calls in a row at most; short ones, of which the host's start of the first
            would be a good part, come in rows of a tenth of a second.

    Returns:
        The times, and the last result.
    """
    clock, single, row = time.perf_counter, [], []
    began, count = clock(), iter(range(most_calls(repeats, longest_row)))
    wait(result := call(next(count)))
    first = clock() - began
    for _ in range(NUM_INPUTS - 1):
        wait(result := call(next(count)))
    for _ in range(repeats):
        began = clock()
        wait(result := call(next(count)))
        single.append(clock() - began)
    in_a_row = math.ceil(ROW_SECONDS / statistics.median(single))
    in_a_row = min(max(in_a_row, SHORTEST_ROW), longest_row)
    for _ in range(_rows(repeats)):
        began = clock()
        for _ in range(in_a_row):
            result = call(next(count))
        wait(result)
        row.append((clock() - began) / in_a_row)
    return Times(first, sorted(single), statistics.median(row)), result


def figures(
    name: str,
    times: Times,
    *,
    flops: float,
    least_bytes: float,
    peak_bytes: float | None,
    samples: int | None = None,
    load: float | None = None,
    dropped: float | None = None,
) -> Row:
    """One row. Rates go by the calls in a row.

    Args:
        name: of the case.
        times: of a call.
        flops: useful operations of a call.
        least_bytes: what a call must read and write at least.
        peak_bytes: most memory in use, None where nobody counts.
        samples: sequences of a call.
        load: largest over mean load.
        dropped: share of choices that found no slot.
    """
    return {
        "name": name,
        "ms": 1e3 * statistics.median(times.single),
        "ms_in_a_row": 1e3 * times.row,
        "spread_ms": [1e3 * times.single[0], 1e3 * times.single[-1]],
        "first_call_s": times.first,
        "samples_per_s": samples and samples / times.row,
        "useful_tflops": flops / times.row / 1e12,
        "least_tb_per_s": least_bytes / times.row / 1e12,
        "peak_gib": peak_bytes and peak_bytes / 2**30,
        "max_over_mean": load,
        "dropped": dropped,
    }


def with_fractions(row: Row, ceilings: Row) -> Row:
    """The row with its shares of the two ceilings that were measured in the same run."""
    if "useful_tflops" not in row:
        return row
    return row | {
        "of_matmul": row["useful_tflops"] / ceilings["matmul_tflops"],
        "of_copy": row["least_tb_per_s"] / ceilings["copy_tb_per_s"],
    }


def table(rows: list[Row]) -> str:
    """The rows as Markdown, and below it why some have no figures."""

    def text(row: Row, column: str) -> str:
        value = row.get(column)
        if value is None:
            return row.get("failed", ("", ""))[0] if column == "ms" else ""
        if isinstance(value, str):
            return value
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    shown = {k: v for k, v in COLUMNS.items() if any(row.get(k) is not None for row in rows)}
    lines = [" | ".join(shown.values()), " | ".join("---" for _ in shown)]
    lines += [" | ".join(text(row, column) for column in shown) for row in rows]
    reasons = [f"{row['name']}: {': '.join(row['failed'])}" for row in rows if "failed" in row]
    return "\n".join([*(f"| {line} |" for line in lines), *reasons])


class Case(Protocol):
    """One process of a benchmark."""

    @property
    def name(self) -> str:
        """What `--only` selects by."""

    @property
    def flags(self) -> str:
        """Options of XLA."""

    def measure(self, options: argparse.Namespace) -> list[Row]:
        """Runs the case in this process."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, help="also write the figures to this file, case by case")
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--only", nargs="+", default=[""], help="cases whose name starts with these")
    made.add_argument("--list", action="store_true", help="print the names of the cases")
    made.add_argument("--smoke", action="store_true", help="tiny sizes, to see that all of it runs")
    made.add_argument("--limit", type=float, default=240, help="seconds that one case may take")
    made.add_argument("--case", help=f"run one case in this process, or {CEILINGS!r}")
    return made


def run(
    options: argparse.Namespace,
    cases: Iterable[Case],
    ceilings: Callable[[argparse.Namespace], Row],
    finish: Callable[[Row], Row] = lambda row: row,
) -> None:
    """Runs the chosen cases, each in its own process, or the one case that this process is for.

    A case that fails leaves its error in the table, and the others go on. `finish` is given each
    row with its figures.
    """
    by_name = {case.name: case for case in cases}
    if options.case == CEILINGS:
        return print(json.dumps(ceilings(options)))
    if options.case is not None:
        return print(json.dumps(_caught(by_name[options.case], options)))
    chosen = [name for name in by_name if name.startswith(tuple(options.only))]
    if not chosen:
        raise SystemExit(f"--only: no case's name starts with {' or '.join(options.only)}")
    if options.list:
        return print(*chosen, sep="\n")
    report = {"arguments": sys.argv[1:], "date": time.strftime("%Y-%m-%d %H:%M %Z"), "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        # Cases share what they compile; each is the only one to touch the device in its time.
        shared = {"JAX_COMPILATION_CACHE_DIR": folder} | os.environ
        report["ceilings"] = limits = _child(CEILINGS, options.limit, shared)
        if "failed" in limits:
            raise SystemExit(f"the ceilings could not be measured: {limits['failed'][1]}")
        for name in chosen:
            flags = f"{os.environ.get('XLA_FLAGS', '')} {by_name[name].flags}".strip()
            rows = _child(name, options.limit, shared | {"XLA_FLAGS": flags})
            rows = rows if isinstance(rows, list) else [rows]
            rows = [{"case": name} | with_fractions(row, limits) for row in rows]
            report["cases"] += map(finish, rows)
            if options.json:
                options.json.write_text(json.dumps(report, indent=2))
    return print(json.dumps(limits), table(report["cases"]), sep="\n")


def _child(name: str, limit: float, environment: dict[str, str]) -> Any:
    command = [sys.executable, *sys.argv, "--case", name]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": ["failed", f"took more than {limit} s"]}
    if done.returncode or '"failed"' in done.stdout:
        print(done.stderr[-2000:], file=sys.stderr)
    if done.returncode == 0:
        print(done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return {"name": name, "failed": ["failed", reason[:300]]}


def _caught(case: Case, options: argparse.Namespace) -> list[Row]:
    try:
        return case.measure(options)
    except Exception as error:
        return [failure(case.name, error)]


def failure(name: str, error: Exception) -> Row:
    """The row of what could not be measured; what failed is told in full on stderr."""
    if not isinstance(error, UnavailableError):
        traceback.print_exception(error)
    kind = "not available here" if isinstance(error, UnavailableError) else "failed"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return {"name": name, "failed": [kind, reason[:300]]}
