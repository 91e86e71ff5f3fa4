"""Run folders: start, resume, open and ask them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax._files import replace_text
from moe_jax._types import Variables
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import RunConfig
from moe_jax.data import (
    BOS,
    ContextModel,
    Corpus,
    Manifest,
    Snippet,
    corpus_from_manifest,
    held_out_bytes,
    load_corpus,
    load_manifest,
    locate,
    save_manifest,
    xz_bits_per_byte,
)
from moe_jax.graph import KnowledgeGraph
from moe_jax.interop.faiss import FaissIndex
from moe_jax.lm import LanguageModelOutput, MoELanguageModel
from moe_jax.system import search_reports
from moe_jax.training.loop import TrainResult, train
from moe_jax.training.state import make_optimizer, run_shapes
from moe_jax.training.stream_eval import token_memory_evaluation

_CONFIG, _MANIFEST = "config.json", "data.json"
_QUERY_MULTIPLE = 32


class RunError(Exception):
    """A run folder cannot be used as asked; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Insight:
    """One node of the graph that answers a query.

    Attributes:
        node: its id.
        similarity: cosine to the query's closest report.
        expert: which expert reported it, by id.
        confidence: of that expert, 0 to 1.
        hits: reports that the node stands for.
        snippet: the source line it came from.
    """

    node: int
    similarity: float
    expert: int
    confidence: float
    hits: int
    snippet: Snippet


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or interrupted run, opened for reading.

    Attributes:
        directory: the run folder.
        config: of the run.
        step: the optimizer step of the newest complete checkpoint.
        model: the model.
        params: its parameters.
        graph: its knowledge graph.
        sources: the documents that nodes point into.
    """

    directory: Path
    config: RunConfig
    step: int
    model: MoELanguageModel
    params: Variables
    graph: KnowledgeGraph
    sources: Manifest

    def query(self, text: str, k: int = 5) -> list[Insight]:
        """Finds the insights nearest to a text.

        The text takes the way of any input; of a text longer than the model's `max_length` the
        end is used.

        Args:
            text: any text, not blank.
            k: insights wanted.

        Returns:
            At most k insights, nearest first.

        Raises:
            RunError: the text is blank, or k is out of range.
        """
        if not text.strip():
            raise RunError("the query is empty")
        if not 1 <= k <= self.graph.num_nodes:
            raise RunError(f"k must lie in [1, {self.graph.num_nodes}], got {k}")
        longest = self.config.model.max_length
        data = np.frombuffer(text.encode(), np.uint8)[-(longest - 1) :].astype(np.int32)
        length = min(longest, -(-(len(data) + 1) // _QUERY_MULTIPLE) * _QUERY_MULTIPLE)
        tokens, is_valid = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
        tokens[0, : len(data) + 1] = [BOS, *data]
        is_valid[0, : len(data) + 1] = True
        out = self._apply(
            {"params": self.params}, jnp.asarray(tokens), self.graph, is_valid=jnp.asarray(is_valid)
        )
        hits = search_reports(self.graph, out.moe, k, index=self._faiss_index)
        found = [int(i) for i, ok in zip(hits.ids[0], hits.is_valid[0], strict=True) if ok]
        return [
            self._insight(node, float(s)) for node, s in zip(found, hits.scores[0], strict=False)
        ]

    @functools.cached_property
    def _apply(self) -> Callable[..., LanguageModelOutput]:
        return jax.jit(self.model.apply)

    @functools.cached_property
    def _faiss_index(self) -> FaissIndex | None:
        return FaissIndex(self.graph) if self.config.model.moe.use_faiss else None

    def _insight(self, node: int, similarity: float) -> Insight:
        document, offset = (int(v) for v in self.graph.source[node])
        return Insight(
            node=node,
            similarity=similarity,
            expert=int(self.graph.expert_id[node]),
            confidence=float(self.graph.confidence[node]),
            hits=int(self.graph.hits[node]),
            snippet=locate(self.sources, document, offset),
        )


def start_run(
    directory: str | Path,
    config: RunConfig,
    *,
    data: Sequence[Path] | None = None,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> tuple[TrainResult, Corpus]:
    """Starts a new run in an empty or absent folder.

    Args:
        directory: of the run.
        config: of the run.
        data: files and folders; None for the Python standard library's source.
        on_step: see `moe_jax.training.train`.

    Returns:
        The training's result and the corpus.

    Raises:
        RunError: the folder holds something already.
        ValueError: the data cannot be used.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise RunError(f"{directory} is a file, not a folder")
    if directory.exists() and any(directory.iterdir()):
        raise RunError(f"{directory} is not empty: choose another folder, or resume the run in it")
    corpus = load_corpus(data)
    directory.mkdir(parents=True, exist_ok=True)
    replace_text(directory / _CONFIG, config.to_json() + "\n")
    save_manifest(corpus, directory / _MANIFEST)
    at_end = token_memory_evaluation(config, corpus)
    return train(config, corpus, directory=directory, on_step=on_step, at_end=at_end), corpus


def resume_run(
    directory: str | Path,
    *,
    steps: int | None = None,
    data: Sequence[Path] | None = None,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> tuple[TrainResult, Corpus]:
    """Goes on with an interrupted run from its newest complete checkpoint.

    Args:
        directory: of the run.
        steps: another number of steps in all, which the learning rate's schedule is stretched to;
            None for the run's own.
        data: the same files and folders as at the start; None for the files that the run's
            manifest names.
        on_step: see `moe_jax.training.train`.

    Returns:
        The training's result and the corpus.

    Raises:
        RunError: there is no run in the folder, or its data has changed.
        CheckpointError: a checkpoint cannot be read.
    """
    directory = Path(directory)
    config, described = read_config(directory), load_manifest(directory / _MANIFEST)
    try:
        corpus = corpus_from_manifest(described) if data is None else load_corpus(data)
    except ValueError as error:
        raise RunError(f"the data of {directory} cannot be read again: {error}") from error
    if corpus.digest != described.get("digest"):
        raise RunError(f"the data is not what {directory} was started with")
    if steps is not None and steps != config.training.steps:
        done = Checkpoints(directory / "checkpoints").latest() or 0
        if steps < done:
            raise RunError(f"steps must be at least the {done} that are done, got {steps}")
        config = config.replace(training=config.training.replace(steps=steps))
        replace_text(directory / _CONFIG, config.to_json() + "\n")
    how = {"on_step": on_step, "at_end": token_memory_evaluation(config, corpus)}
    return train(config, corpus, directory=directory, resume=True, **how), corpus


def open_run(directory: str | Path) -> Run:
    """Opens a run folder for reading.

    Args:
        directory: of the run.

    Returns:
        The run at its newest complete checkpoint.

    Raises:
        RunError: there is no such run, or its files are damaged.
        CheckpointError: there is no complete checkpoint, or it cannot be read.
    """
    directory = Path(directory)
    config = read_config(directory)
    try:
        sources = load_manifest(directory / _MANIFEST)
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{directory / _MANIFEST} cannot be read: {error}") from error
    model = MoELanguageModel(config.model)
    optimizer = make_optimizer(config.training)
    state, graph = run_shapes(model, optimizer)
    like = {"state": state.saved, "graph": graph}
    step, tree, _ = Checkpoints(directory / "checkpoints").restore(like)
    return Run(directory, config, step, model, tree["state"].params, tree["graph"], sources)


def read_config(path: str | Path) -> RunConfig:
    """Reads the config of a run folder, or one in a JSON file of its own.

    Args:
        path: the folder or the file.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = Path(path)
    file = path if path.is_file() else path / _CONFIG
    if not file.is_file():
        raise RunError(f"no run in {path}: it has no {_CONFIG}")
    try:
        return RunConfig.from_json(file.read_text())
    except (ValueError, OSError) as error:
        raise RunError(f"{file} cannot be read: {error}") from error


def baselines(corpus: Corpus, config: RunConfig) -> dict[str, float]:
    """Bits per byte of context models and xz on the very bytes that the model is judged by.

    Args:
        corpus: the text.
        config: of the run; gives the held-out sample.

    Returns:
        Name to bits per byte.

    Example:
        >>> from moe_jax.config import smallest_run
        >>> sorted(baselines(load_corpus(), smallest_run()))
        ['order-0 context model', 'order-2 context model', 'xz -9e']
    """
    c = config.training
    samples = held_out_bytes(
        corpus, seq_len=c.seq_len, min_bytes=c.eval_bytes, context=c.eval_context
    )
    documents = corpus.split(held_out=False)
    result = {
        f"order-{order} context model": ContextModel.fit(documents, order=order).bits_per_byte(
            samples
        )
        for order in (0, 2)
    }
    return {**result, "xz -9e": xz_bits_per_byte(samples)}


def sample_queries(corpus: Corpus, count: int = 3) -> list[str]:
    """Lines of held-out text to ask a fresh graph about; the same for the same corpus.

    Args:
        corpus: the text.
        count: lines wanted.

    Returns:
        At most `count` lines, from the middle of different held-out documents.

    Example:
        >>> len(sample_queries(load_corpus()))
        3
    """
    found: list[str] = []
    documents = corpus.split(held_out=True)
    for document in sorted(documents, key=len, reverse=True):
        lines = document.tobytes().decode("utf-8", errors="replace").splitlines()
        for line in lines[len(lines) // 2 :]:
            if 20 <= len(line.strip()) <= 60:
                found.append(line.strip())
                break
        if len(found) == count:
            break
    return found
