"""The closing evaluation of a run: held-out text read with and without a token memory."""

from collections.abc import Callable
from typing import Any

from moe_jax._types import Variables
from moe_jax.config import RunConfig
from moe_jax.data import Batch, Corpus
from moe_jax.graph import KnowledgeGraph
from moe_jax.lm import MoELanguageModel
from moe_jax.memory import ContextVectors, MemoryInterpolation
from moe_jax.training.state import TrainState
from moe_jax.training.stream import TokenReader, fit_interpolation
from moe_jax.training.stream_reader import StreamReader, documents_by_name, first_documents

__all__ = ["evaluate_token_memory", "token_memory_evaluation"]

_FITTED_POSITIONS = 8192  # Of training text, for the projection: 64 components need no more.


def evaluate_token_memory(
    model: MoELanguageModel,
    params: Variables,
    corpus: Corpus,
    *,
    num_bytes: int,
    seq_len: int,
    reports: KnowledgeGraph | None = None,
    rows: int = 8,
) -> dict[str, Any]:
    """Held-out bits per byte alone, with a token memory, and with that memory shuffled.

    A hash of the names deals the held-out documents into two halves. Weight and sharpness of the
    memory are fitted on the beginnings of the one, on half as many bytes; the other half is what
    is reported. Each time the memory starts empty and remembers what it has seen of the text.

    Args:
        model: the model.
        params: of the model.
        corpus: the text.
        num_bytes: to report, at most; also the memory's nodes.
        seq_len: positions in a window; the first quarter only gives context.
        reports: the graph of a model that reads one itself.
        rows: documents read side by side, at most.

    Returns:
        {"token_memory": {bits_per_byte, without, shuffled (under the same gate), bytes,
        validation_bytes, nodes}}; nothing where fewer than two documents are held out.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax.config import smallest_run
        >>> from moe_jax.data import load_corpus
        >>> model = MoELanguageModel(smallest_run().model)
        >>> params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((2, 16), int))["params"]
        >>> how = {"num_bytes": 128, "seq_len": 32, "rows": 2}
        >>> sorted(evaluate_token_memory(model, params, load_corpus(), **how)["token_memory"])
        ['bits_per_byte', 'bytes', 'nodes', 'shuffled', 'validation_bytes', 'without']
    """
    held = documents_by_name(corpus, held_out=True)
    if len(held) < 2:
        return {}
    gate, rows = MemoryInterpolation(), min(rows, len(held) // 2)
    reader = StreamReader(
        model,
        params,
        corpus,
        reports=reports,
        vectors=ContextVectors(hidden_dim=min(64, model.config.moe.input_dim)),
        interpolation=gate,
        seq_len=seq_len,
        context=seq_len // 4,
        rows=rows,
        policy="reject",
    )

    def beginnings(documents: list[int], total: int) -> list[Batch]:
        most = -(-total // rows)
        batches = reader.batches(first_documents(corpus, documents, total, most), most)
        # Rows are not all of one length: what the longest have left is cut off, to bound the time.
        return batches[: max(total // reader.positions, 1)]

    learnt = beginnings(documents_by_name(corpus, held_out=False), _FITTED_POSITIONS)
    validation = beginnings(held[0::2], max(num_bytes // 2, 1))
    test, memory = beginnings(held[1::2], num_bytes), reader.empty(num_bytes)
    projection = reader.fit_projection(learnt)
    seen = reader.read(validation, memory, TokenReader(projection, reader.any_gate))
    fitted = fit_interpolation(gate, seen.evidence, seen.is_counted, steps=200, batch_size=2048)
    true, shuffled = (
        reader.read(test, memory, TokenReader(projection, fitted), is_shuffled=is_shuffled)
        for is_shuffled in (False, True)
    )
    figures = {
        "bits_per_byte": true.bits_per_byte,
        "without": true.without,
        "shuffled": shuffled.bits_per_byte,
        "bytes": int(true.sums.count),
        "validation_bytes": int(seen.sums.count),
        "nodes": num_bytes,
    }
    return {"token_memory": figures}


def token_memory_evaluation(
    config: RunConfig, corpus: Corpus
) -> Callable[[TrainState, KnowledgeGraph], dict[str, Any]] | None:
    """What `moe_jax.training.train` calls at the end of a run: see `evaluate_token_memory`.

    Args:
        config: of the run.
        corpus: the text.

    Returns:
        (state, graph) -> a record; None where `eval_memory_bytes` is 0.

    Example:
        >>> from moe_jax.config import smallest_run
        >>> from moe_jax.data import load_corpus
        >>> token_memory_evaluation(smallest_run(), load_corpus()) is None
        True
    """
    c = config.training
    if not c.eval_memory_bytes:
        return None

    def evaluate(state: TrainState, graph: KnowledgeGraph) -> dict[str, Any]:
        return evaluate_token_memory(
            MoELanguageModel(config.model),
            state.params,
            corpus,
            num_bytes=c.eval_memory_bytes,
            seq_len=c.seq_len,
            reports=graph if config.model.moe.memory_read else None,
        )

    return evaluate
