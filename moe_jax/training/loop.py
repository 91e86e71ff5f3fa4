"""The training loop: batches in, metrics, evaluations and checkpoints out."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax._types import Array, Variables
from moe_jax.checkpoint import Checkpoints, GraphCheckpoints
from moe_jax.config import RunConfig
from moe_jax.data import Batch, Corpus, held_out_batches, training_batches
from moe_jax.graph import KnowledgeGraph, health
from moe_jax.lm import MoELanguageModel
from moe_jax.training.copies import matrix_copies
from moe_jax.training.metrics import JsonLines, as_record, health_record, summarise_eval
from moe_jax.training.state import (
    TrainState,
    create_graph,
    create_state,
    make_optimizer,
    run_shapes,
)
from moe_jax.training.step import EvalSums, Metrics, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training leaves behind.

    Attributes:
        state: after the last step.
        graph: the knowledge graph.
        evaluation: the last held-out evaluation, see `Evaluator`.
        seconds: wall time of the steps, compilation and evaluations included.
    """

    state: TrainState
    graph: KnowledgeGraph
    evaluation: dict[str, Any]
    seconds: float


def train(
    config: RunConfig,
    corpus: Corpus,
    *,
    directory: str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
    at_end: Callable[[TrainState, KnowledgeGraph], dict[str, Any]] | None = None,
) -> TrainResult:
    """Trains a language model and its knowledge graph.

    Writes ``metrics.jsonl`` and ``checkpoints/`` under `directory`; for a run folder, which
    `moe-jax` can open, resume and query, use `moe_jax.training.run.start_run`. A step's batch,
    dropout and routing noise depend on the seed and the step alone, and a checkpoint holds
    everything else, so a resumed run repeats the unbroken one number for number on the same
    machine and the same corpus.

    Args:
        config: of the run.
        corpus: the text.
        directory: of the run; None to write nothing.
        resume: go on from the newest complete checkpoint of `directory`, or from the start where
            there is none.
        on_step: called with (step, record) after every logged step; with an empty record after
            every other.
        at_end: called after the last step; its record joins the last evaluation.

    Returns:
        The last state, graph and evaluation.

    Raises:
        DivergedError: a loss or gradient is not finite; checkpoints saved before stay.
        ValueError: `directory` holds checkpoints and `resume` is False, or they are of another
            model, seed, batch or corpus.

    Example:
        >>> from moe_jax.config import smallest_run
        >>> from moe_jax.data import load_corpus
        >>> result = train(smallest_run(), load_corpus())
        >>> int(result.state.step)
        6
    """
    c = config.training
    directory = None if directory is None else Path(directory)
    model, optimizer = MoELanguageModel(config.model), make_optimizer(c)
    init_key, step_key = jax.random.split(jax.random.key(c.seed))
    keeper = Keeper(config, directory, corpus)
    latest = keeper.latest()
    if latest is None:
        state, graph = create_state(model, optimizer, init_key), create_graph(model)
    elif resume:
        # By shapes alone: new arrays beside the restored ones would take twice the memory.
        state, graph = keeper.restore(*run_shapes(model, optimizer))
    else:
        raise ValueError(
            f"directory {directory} holds checkpoints up to step {latest}: give another one, or "
            "resume=True"
        )
    first = int(state.step)
    batches = training_batches(corpus, batch_size=c.batch_size, seq_len=c.seq_len, seed=c.seed)
    step_fn = make_train_step(model, optimizer, config)
    evaluate = Evaluator(model, corpus, config)
    evaluation: dict[str, Any] = {}

    def last_evaluation() -> dict[str, Any]:
        record = evaluate(state.params, graph, memory_off=True)
        return record | (at_end(state, graph) if at_end is not None else {})

    began = time.perf_counter()
    log = _Log(directory, first, c.batch_size * c.seq_len)
    try:
        for step in range(first + 1, c.steps + 1):
            batch = jax.device_put(batches[step - 1])
            state, graph, metrics = step_fn(state, graph, batch, step_key)
            log.count(metrics)
            record: dict[str, Any] = {}
            is_last = step == c.steps
            is_saved, is_logged, is_evaluated = (
                is_last or bool(every and step % every == 0)
                for every in (c.save_every, c.log_every, c.eval_every)
            )
            if is_saved or is_logged:
                metrics = jax.device_get(metrics)
                _check_finite(step, metrics)
            if is_logged:
                record = log.of_step(step, metrics)
            if is_evaluated:
                try:
                    evaluation = last_evaluation() if is_last else evaluate(state.params, graph)
                except BaseException:  # what fails there must not cost the training
                    log.write(record)
                    keeper.save(state, graph)
                    raise
                record = {"step": step, **record, **evaluation}
                log.restart_clock(step)
            log.write(record)
            if is_saved:
                keeper.save(state, graph)
            if on_step is not None:
                on_step(step, record)
    finally:
        keeper.close()
    if not evaluation:
        evaluation = last_evaluation()
        if not log.has("eval_bits_per_byte", first):
            log.write({"step": first, **evaluation})
    return TrainResult(state, graph, evaluation, time.perf_counter() - began)


class DivergedError(FloatingPointError):
    """The training has lost its numbers; the message is one line."""


_COUNTS = "nodes_created", "nodes_merged", "proposals_rejected"


class _Log:
    """The lines of metrics.jsonl, if there is a directory, and how fast steps went."""

    def __init__(self, directory: Path | None, first: int, tokens: int) -> None:
        self._lines = None
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(directory / "metrics.jsonl", last_step=first)
        self._tokens = tokens  # of a step
        self._counts: list[list[Array]] = []
        self.restart_clock(first)

    def count(self, metrics: Metrics) -> None:
        """Takes note of what a step wrote; a step between two lines counts for the second."""
        self._counts.append([getattr(metrics, name) for name in _COUNTS])

    def restart_clock(self, step: int) -> None:
        """Counts the time of the steps after this one."""
        self._step, self._began = step, time.perf_counter()

    def of_step(self, step: int, metrics: Metrics) -> dict[str, Any]:
        """A step's metrics, what was written since the line before, and the steps' speed."""
        tokens = (step - self._step) * self._tokens
        speed = tokens / (time.perf_counter() - self._began)
        self.restart_clock(step)
        counts = np.sum(jax.device_get(self._counts), axis=0).tolist()
        self._counts.clear()
        return {
            "step": step,
            **as_record(metrics),
            **dict(zip(_COUNTS, counts, strict=True)),
            "tokens_per_second": speed,
        }

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line, unless the record is empty."""
        if record and self._lines is not None:
            self._lines.write(record)

    def has(self, name: str, step: int) -> bool:
        """Whether a line of that step holds that value."""
        return self._lines is not None and self._lines.has(name, step)


def _check_finite(step: int, metrics: Metrics) -> None:
    loss, norm = float(metrics.loss), float(metrics.grad_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DivergedError(
            f"training diverged: at step {step} the loss is {loss} and the gradient's norm {norm}; "
            "nothing of it was saved. A lower learning_rate may help, from an earlier checkpoint"
        )


class Evaluator:
    """Held-out bits per byte, load, drops, and the graph's health; compiled once for a run.

    Args:
        model: the model.
        corpus: the text; its held-out files are sampled, each at least once.
        config: of the run.

    Example:
        >>> from moe_jax.config import smallest_run
        >>> from moe_jax.data import load_corpus
        >>> config = smallest_run()
        >>> model = MoELanguageModel(config.model)
        >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 16), int))["params"]
        >>> result = Evaluator(model, load_corpus(), config)(params, create_graph(model))
        >>> result["eval_bits_per_byte"] > 5
        True
    """

    def __init__(self, model: MoELanguageModel, corpus: Corpus, config: RunConfig) -> None:
        c = config.training
        self._step = make_eval_step(model)
        self._reads = config.model.moe.memory_read
        self._batches: list[Batch] = held_out_batches(
            corpus,
            batch_size=c.batch_size,
            seq_len=c.seq_len,
            min_bytes=c.eval_bytes,
            context=c.eval_context,
        )

    def __call__(
        self, params: Variables, graph: KnowledgeGraph, *, memory_off: bool = False
    ) -> dict[str, Any]:
        """Evaluates on the whole held-out sample.

        Args:
            params: of the model.
            graph: that the model reads.
            memory_off: evaluate once more with nothing to read, where the model reads memory.

        Returns:
            What `summarise_eval` gives; graph_health, see `health_record`; and with `memory_off`
            eval_bits_per_byte_memory_off.
        """
        record = summarise_eval(self._sums(params, graph))
        record["graph_health"] = health_record(jax.device_get(health(graph)))
        if memory_off and self._reads:
            # The same shapes, so nothing is compiled again: no node is live, so none is found.
            empty = graph._replace(is_live=jnp.zeros_like(graph.is_live))
            off = summarise_eval(self._sums(params, empty))
            record["eval_bits_per_byte_memory_off"] = off["eval_bits_per_byte"]
        return record

    def _sums(self, params: Variables, graph: KnowledgeGraph) -> EvalSums:
        total = None
        for batch in self._batches:
            sums = self._step(params, graph, jax.device_put(batch))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return jax.device_get(total)


class Keeper:
    """The run's checkpoints: everything at given steps, the graph by its own count of updates."""

    def __init__(self, config: RunConfig, directory: Path | None, corpus: Corpus) -> None:
        self._config, self._corpus = config, corpus.digest
        moe, training = config.model.moe, config.training
        self._run = None
        if directory is not None:
            self._run = Checkpoints(directory / "checkpoints", keep=training.checkpoints_kept)
        self._graphs = None
        if moe.kg_checkpoint_dir is not None:
            self._graphs = GraphCheckpoints(
                moe.kg_checkpoint_dir, interval=moe.kg_save_interval, keep=moe.kg_checkpoints_kept
            )

    def save(self, state: TrainState, graph: KnowledgeGraph) -> None:
        """Saves the state, and the graph besides if its updates are due."""
        step = int(jax.device_get(state.step))
        if self._run is not None:
            note = {"config": self._config.to_dict(), "data_position": step, "corpus": self._corpus}
            self._run.save(step, {"state": state.saved, "graph": graph}, note)
        if self._graphs is not None:
            self._graphs.maybe_save(graph)

    def restore(
        self, state: TrainState, graph: KnowledgeGraph
    ) -> tuple[TrainState, KnowledgeGraph]:
        """Returns the newest checkpoint's, like what it got, of which shapes will do."""
        _, tree, note = self._run.restore({"state": state.saved, "graph": graph})
        saved = RunConfig.from_dict(note["config"])
        if saved.model != self._config.model:
            raise ValueError("the checkpoint was saved with another config.model")
        for name in ("seed", "batch_size", "seq_len"):  # what each step sees depends on them
            now, then = (getattr(c.training, name) for c in (self._config, saved))
            if now != then:
                raise ValueError(f"the checkpoint was saved with {name}={then}, got {now}")
        if note.get("corpus", self._corpus) != self._corpus:
            raise ValueError("the checkpoint was saved with another corpus")
        copy = jax.jit(matrix_copies, static_argnums=1)
        copies = copy(tree["state"].params, self._config.model.moe.compute_dtype)
        return TrainState(*tree["state"], copies), tree["graph"]

    def latest(self) -> int | None:
        """The newest complete step of the run, or None."""
        return None if self._run is None else self._run.latest()

    def close(self) -> None:
        """Waits until everything is on disk."""
        for checkpoints in (self._run, self._graphs):
            if checkpoints is not None:
                checkpoints.close()
