"""Does reading the memory back pay? Held-out bits per byte with and without a token memory.

For each text (the standard library's source; the documentation inside installed packages) this
trains a byte language model, tunes the reading of a token memory on one half of the held-out
files, and reports the other half: without memory, and with memories of several sizes that hold
training text (static), what was seen of the stream so far (dynamic), or both; with their symbols
dealt out at random; and beside it a wider model and one with a gated cross-attention reader.

    python experiments/memory.py --json memory.json
    python experiments/memory.py --sizes 1000 10000 --test-bytes 32768 --texts stdlib  # small
"""

import functools
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from documentation import documentation

from moe_jax.config import RunConfig, byte_lm
from moe_jax.data import Corpus, load_corpus
from moe_jax.graph import KnowledgeGraph
from moe_jax.lm import MoELanguageModel
from moe_jax.memory import ContextVectors, Evidence, MemoryInterpolation
from moe_jax.training import create_graph, train
from moe_jax.training.run import open_run
from moe_jax.training.stream import TokenReader, fit_interpolation
from moe_jax.training.stream_reader import StreamReader, documents_by_name, first_documents

KINDS = {"static": (True, False), "dynamic": (False, True), "both": (True, True)}
"""Kind of memory: whether it starts with training text, and whether the stream is written."""

GATES = {"gate": MemoryInterpolation(), "constant share": MemoryInterpolation(is_constant=True)}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    texts: tuple[str, ...] = ("stdlib", "docs")
    """Of "stdlib" and "docs"."""
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Nodes of the token memories."""
    kinds: tuple[str, ...] = ("static", "dynamic", "both")
    """Of "static", "dynamic" and "both"."""
    compare: bool = True
    """Also train the wider model and the one with the cross-attention reader."""
    run: Path | None = None
    """A run folder to take the model for "stdlib" from, instead of training one."""
    steps: int | None = None
    """Training steps of each model; the preset's by default."""
    seed: int = 0
    """Of every training."""
    validation_bytes: int = 98_304
    """Held-out bytes that the gates are fitted on."""
    test_bytes: int = 196_608
    """Held-out bytes that are reported."""
    document_bytes: int = 32_768
    """Of each held-out document so many bytes are read, from its start."""
    docs_bytes: int = 8_388_608
    """Documentation to gather."""
    rows: int = 8
    """Documents read side by side."""
    context: int = 64
    """Of each window so many positions only give context."""
    k: int = 32
    """Seen positions that each position reads."""
    vectors: ContextVectors = field(default_factory=ContextVectors)
    """What a position looks like to the memory."""
    json: Path | None = None
    """Also write the figures to this file."""


@dataclass(frozen=True)
class Trained:
    """A model to be read with: `reports` is the graph of a model that reads one itself."""

    model: MoELanguageModel
    params: Any
    reports: KnowledgeGraph | None
    seconds: float

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def train_one(config: RunConfig, corpus: Corpus) -> Trained:
    result = train(config, corpus)
    reports = result.graph if config.model.moe.memory_read else None
    return Trained(MoELanguageModel(config.model), result.state.params, reports, result.seconds)


def plain_config(options: Options) -> RunConfig:
    config = byte_lm()
    changes = {"memory_write": False, "seed": options.seed, "eval_every": 0}
    if options.steps is not None:
        changes["steps"] = options.steps
    moe = config.model.moe.replace(memory_read=False, report_scope="none")
    model = config.model.replace(moe=moe)
    return config.replace(model=model, training=config.training.replace(**changes))


def reader_config(options: Options) -> RunConfig:
    plain, config = plain_config(options), byte_lm()
    training = plain.training.replace(memory_write=True)
    return config.replace(training=training)


def wider_config(options: Options, num_params: int) -> RunConfig:
    """The plain config, its experts widened until it has at least so many parameters."""
    config = plain_config(options)
    while _count_params(config) < num_params:
        moe = config.model.moe.replace(hidden_dim=config.model.moe.hidden_dim + 8)
        config = config.replace(model=config.model.replace(moe=moe))
    return config


def _count_params(config: RunConfig) -> int:
    model = MoELanguageModel(config.model)
    graph = jax.eval_shape(lambda: create_graph(model)) if config.model.moe.memory_read else None
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), int), graph)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))


class Reading:
    """One model on one text, with any memory."""

    def __init__(self, options: Options, corpus: Corpus, trained: Trained) -> None:
        self.options = options
        self.reader = StreamReader(
            trained.model,
            trained.params,
            corpus,
            reports=trained.reports,
            vectors=options.vectors,
            interpolation=GATES["gate"],
            seq_len=byte_lm().training.seq_len,
            context=options.context,
            rows=options.rows,
            k=options.k,
        )
        held = documents_by_name(corpus, held_out=True)
        learnt = documents_by_name(corpus, held_out=False)
        parts = {
            "validation": (held[0::2], options.validation_bytes),
            "test": (held[1::2], options.test_bytes),
            "stored": (learnt, max(*options.sizes, 65_536)),
        }
        most = options.document_bytes
        self.batches = {
            name: self.reader.batches(first_documents(corpus, ids, total, most), most)
            for name, (ids, total) in parts.items()
        }

    @functools.cached_property
    def projection(self) -> Any:
        """Fitted to training text."""
        return self.reader.fit_projection(self.batches["stored"][: 65_536 // self.reader.positions])

    def without(self, reports: KnowledgeGraph | None) -> dict[str, float]:
        """Bits per byte of the model alone on the test text, and its time."""
        for _ in range(2):
            began, nats = time.perf_counter(), []
            for batch in self.batches["test"]:
                nats.append(self.reader.hidden_step(self.reader.params, batch, reports)[1])
            total = float(sum(jax.device_get(nats)))
            seconds = time.perf_counter() - began
        count = sum(int(np.sum(batch.is_valid)) for batch in self.batches["test"])
        return {
            "bits_per_byte": total / count / math.log(2),
            "us_per_byte": 1e6 * seconds / count,
            "bytes": count,
        }

    def stored(self, size: int) -> KnowledgeGraph:
        """A memory filled with training text."""
        batches = self.batches["stored"][: -(-size // self.reader.positions)]
        reader = TokenReader(self.projection, self.reader.any_gate)
        return self.reader.written(batches, self.reader.empty(size), reader)

    def stream(
        self,
        part: str,
        memory: KnowledgeGraph,
        variables: Any,
        is_writing: bool,
        is_shuffled: bool = False,
    ) -> tuple[dict[str, float], Evidence, jax.Array]:
        """Reads a text with a memory; what it cost, and the evidence of every position."""
        found = self.reader.read(
            self.batches[part],
            memory,
            TokenReader(self.projection, variables),
            is_writing=is_writing,
            is_shuffled=is_shuffled,
        )
        figures = {
            "bits_per_byte": found.bits_per_byte,
            "without": found.without,
            "us_per_byte": 1e6 * found.seconds / found.sums.count,
            "found": found.sums.count_found / found.sums.count,
        }
        return figures, found.evidence, found.is_counted

    def rows_of(self, size: int, say: Callable[[dict], None]) -> None:
        """Every kind of memory of one size."""
        stored = self.stored(size) if any(KINDS[k][0] for k in self.options.kinds) else None
        gate = GATES["gate"]
        for kind in self.options.kinds:
            starts_full, is_writing = KINDS[kind]
            memory = stored if starts_full else self.reader.empty(size)
            _, *seen = self.stream("validation", memory, self.reader.any_gate, is_writing)
            fitted = {name: fit_interpolation(g, *seen) for name, g in GATES.items()}
            figures, *told = self.stream("test", memory, fitted["gate"], is_writing)
            constant = _bits(GATES["constant share"], fitted["constant share"], *told)
            scalars = jax.tree.map(lambda a: np.asarray(a).tolist(), fitted["gate"]["params"])
            say(
                {"memory": kind, "nodes": size, **figures, "constant": constant, "scalars": scalars}
            )

            _, *seen = self.stream("validation", memory, self.reader.any_gate, is_writing, True)
            figures, *told = self.stream(
                "test", memory, fit_interpolation(gate, *seen), is_writing, True
            )
            same = _bits(gate, fitted["gate"], *told)
            say({"memory": f"{kind}, shuffled", "nodes": size, **figures, "unshuffled_gate": same})


def _bits(gate: MemoryInterpolation, variables: Any, evidence: Evidence, counts: Any) -> float:
    return float(_nats_of(gate, variables, evidence, counts) / math.log(2))


@functools.partial(jax.jit, static_argnums=0)
def _nats_of(
    gate: MemoryInterpolation, variables: Any, evidence: Evidence, counts: jax.Array
) -> jax.Array:
    log_prob = gate.apply(variables, evidence, method="target_log_prob")
    return -jnp.sum(jnp.where(counts, log_prob, 0.0)) / jnp.sum(counts)


def measure(options: Options, text: str, corpus: Corpus) -> Iterator[dict[str, Any]]:
    """Every row of one text."""
    if options.run is not None and text == "stdlib":
        run = open_run(options.run)
        trained = Trained(run.model, run.params, run.graph, 0.0)
    else:
        trained = train_one(plain_config(options), corpus)
    reading = Reading(options, corpus, trained)
    base = reading.without(trained.reports)
    rows: list[dict[str, Any]] = []

    def row(name: str, figures: dict[str, Any], num_params: int = trained.num_params) -> dict:
        gain = 1 - figures["bits_per_byte"] / figures.get("without", base["bits_per_byte"])
        found = {"text": text, "memory": name, "gain": gain, "params": num_params} | figures
        show(found)
        return found

    yield row("none", base | {"seconds": trained.seconds})
    for size in options.sizes:
        reading.rows_of(size, lambda figures: rows.append(row(figures["memory"], figures)))
        yield from rows
        rows.clear()
    if options.compare:
        yield from _comparisons(options, corpus, row)


def _comparisons(options: Options, corpus: Corpus, row: Callable) -> Iterator[dict[str, Any]]:
    """The model with a cross-attention reader, and one with as many parameters without memory."""
    reader = train_one(reader_config(options), corpus)
    reading = Reading(options, corpus, reader)
    figures = reading.without(reader.reports)
    yield row("cross-attention reader", figures | {"seconds": reader.seconds}, reader.num_params)
    off = reading.without(create_graph(reader.model))
    yield row("cross-attention reader, memory off", off, reader.num_params)

    width = options.vectors.hidden_dim + 1
    extra = byte_lm().model.moe.input_dim * width + sum(
        leaf.size for leaf in jax.tree.leaves(reading.reader.any_gate)
    )
    wider = train_one(wider_config(options, reader.num_params + extra), corpus)
    hidden = wider.model.config.moe.hidden_dim
    figures = Reading(options, corpus, wider).without(None)
    yield row(f"none, wider experts ({hidden})", figures | {"seconds": wider.seconds},
              wider.num_params)  # fmt: skip


HEADER = ("text", "memory", "nodes", "bits per byte", "gain", "constant share", "us per byte")


def show(row: dict[str, Any]) -> None:
    """Prints one line of the table."""
    nodes = f"{row['nodes']:,}" if "nodes" in row else ""
    constant = f"{row['constant']:.4f}" if "constant" in row else ""
    gain = f"{100 * row['gain']:.1f} %" if row["gain"] else ""
    cells = (row["text"], row["memory"], nodes, f"{row['bits_per_byte']:.4f}", gain, constant,
             f"{row['us_per_byte']:.1f}")  # fmt: skip
    print("| " + " | ".join(cells) + " |", flush=True)


def machine() -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def main(options: Options) -> None:
    began, found = time.perf_counter(), machine()
    print(json.dumps(found))
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        if not jax.config.jax_compilation_cache_dir:
            # Both texts compile the same programs.
            jax.config.update("jax_compilation_cache_dir", cache)
        for text in options.texts:
            corpus = (
                load_corpus()
                if text == "stdlib"
                else documentation(Path(folder), options.docs_bytes)
            )
            for row in measure(options, text, corpus):
                rows.append(row)
                if options.json:
                    report = {"machine": found, "options": asdict(options), "rows": rows}
                    options.json.write_text(json.dumps(report, indent=2, default=str))
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
