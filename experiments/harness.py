"""What the experiments share: processes of their own, memory, the machine, tables and axes."""

import atexit
import gc
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter

GIB = 2**30
INK, FAINT, BRIGHT = "#1f4e79", "#9aa5b1", "#e67e22"


def in_turn(
    function: Callable[..., dict], arguments: Iterable[tuple], limit: float | None = None
) -> Iterator[dict]:
    """Yields what `function` gives for each tuple of arguments, all called in one fresh process.

    A call that raises yields {"error": why}. So does one that kills its process or takes more than
    `limit` seconds, and those that are left go on in another process.
    """
    worker = None
    try:
        for args in arguments:
            worker = worker or _Worker()
            result, is_alive = worker.call(function, args, limit)
            if not is_alive:
                worker.end()
                worker = None
            yield result
    finally:
        if worker:
            worker.end()


class _Worker:
    """A process that is sent calls."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, function: Callable[..., dict], args: tuple, limit: float | None):
        """The result, and whether the process can be used again."""
        try:
            self.ours.send((function, args))
            if not self.ours.poll(limit):
                return {"error": f"took more than {limit:g} s"}, False
            return self.ours.recv(), True
        except (EOFError, OSError):
            self.process.join()
            return {"error": f"its process died ({self.process.exitcode})"}, False

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def _serve(connection: Connection) -> None:
    while True:
        function, args = connection.recv()
        connection.send(attempt(function, *args))


def attempt(function: Callable[..., dict], *args: Any) -> dict:
    """What `function` gives, or {"error": why it failed}; the whole story goes to stderr."""
    try:
        return function(*args)
    except Exception as error:
        traceback.print_exc()
        gc.collect()  # what failed may hold much of the device's memory
        text = str(error)
        is_memory = isinstance(error, MemoryError) or any(
            sign in text for sign in ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")
        )
        first = (text.splitlines() or [""])[0]
        return {"error": "out of memory" if is_memory else f"{type(error).__name__}: {first}"[:200]}


def prepare_environment() -> None:
    """For processes to come: most of a GPU's memory, and one folder of compiled programs."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="moe_jax-experiment-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def machine() -> dict[str, str]:
    """What the figures were measured on; call it in the process that measures."""
    return {
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def planned_bytes(compiled: Any) -> int:
    """Memory of a compiled program: arguments, results and temporaries, shared ones once."""
    plan = compiled.memory_analysis()
    own = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    return own - plan.alias_size_in_bytes


def peak_bytes() -> int | None:
    """The allocator's peak in this process; None where it keeps none, as on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def number(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """The rows as a Markdown table; `columns` gives names and titles."""
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[number(row.get(name)) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def memory_unit(gib: Iterable[float | None]) -> tuple[float, str]:
    """What to multiply GiB by so that the largest reads well, and the unit that this gives."""
    return (1.0, "GiB") if max((g or 0 for g in gib), default=0) >= 1 else (1024.0, "MiB")


def outcome(row: Mapping[str, Any]) -> float | str:
    """The time in ms, or why there is none."""
    return row.get("ms") or row.get("error") or row["skipped"]


def say(text: str) -> None:
    """Prints progress."""
    print(text, file=sys.stderr, flush=True)


def finish(axes: Axes, title: str, x: str, y: str = "") -> None:
    """Titles and labels in the one style of the plots."""
    axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def plain_decades(axis: Axis, subs: Sequence[int] = (1, 2, 5)) -> None:
    """Plain numbers at these multiples of powers of ten, along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
