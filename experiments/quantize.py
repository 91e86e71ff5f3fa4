"""What do 8-bit experts cost? A trained model, held-out text, its matrices stored in fewer bits.

Takes the model of a run folder, or trains the byte language model first. Then it stores the
experts' matrices as float32 (the reference), bfloat16, int8 and float8, the last two also with
quantised inputs, and predicts the same held-out bytes with each: how many bytes the parameters
take, how many bits a predicted byte costs, and how far the predictions are from the reference's.

    python experiments/quantize.py --run RUN
    python experiments/quantize.py --steps 150 --json quantize.json
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from harness import machine, markdown, say

import moe_jax
from moe_jax.config import RunConfig, byte_lm
from moe_jax.data import Batch, held_out_batches, load_corpus
from moe_jax.graph import KnowledgeGraph
from moe_jax.lm import MoELanguageModel
from moe_jax.training import matrix_copies, train, with_copies
from moe_jax.training.run import open_run

MIB = 2**20

COLUMNS = {
    "matrices": "experts' matrices",
    "experts_mib": "they take, MiB",
    "model_mib": "whole model, MiB",
    "bits_per_byte": "bits per byte",
    "worse": "more than float32",
    "error": "relative error of the logits",
    "same_argmax": "same best byte",
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    run: Path | None = None
    """A run folder to take the model from; without one a model is trained."""
    steps: int | None = None
    """Training steps where there is no run; the preset's by default."""
    compute: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the experts, but for the reference, which computes in float32."""
    dispatch: Literal["capacity", "dropless"] | None = None
    """How tokens go to experts; as in the run by default."""
    held_out_bytes: int = 65_536
    """Held-out bytes to predict, at least."""
    json: Path | None = None
    """Also write the figures to this file."""


class Sums(NamedTuple):
    """Of one batch, next to the reference.

    Attributes:
        nats: [B] cross entropy of each window.
        count: [B] predicted bytes of each window.
        off: squared distance of the logits.
        size: squared size of the reference's logits.
        same: bytes for which both would predict the same.
    """

    nats: jax.Array
    count: jax.Array
    off: jax.Array
    size: jax.Array
    same: jax.Array


@jax.jit
def compare(logits: jax.Array, reference: jax.Array, batch: Batch) -> Sums:
    log_share = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_share, batch.targets[..., None], axis=-1)[..., 0]
    # What is added to all logits of a position changes no prediction.
    centred, wanted = (a - jnp.mean(a, axis=-1, keepdims=True) for a in (logits, reference))
    counts = batch.is_valid
    same = jnp.argmax(logits, axis=-1) == jnp.argmax(reference, axis=-1)
    return Sums(
        nats=-jnp.sum(jnp.where(counts, picked, 0.0), axis=1),
        count=jnp.sum(counts, axis=1),
        off=jnp.sum(jnp.where(counts[..., None], jnp.square(centred - wanted), 0.0)),
        size=jnp.sum(jnp.where(counts[..., None], jnp.square(wanted), 0.0)),
        same=jnp.sum(same & counts),
    )


def stored(params: Any, copies: dict[str, jax.Array]) -> dict[str, Any]:
    """The parameters with the experts' matrices in each way; `copies` are those in bfloat16."""
    return {
        "float32": params,
        "bfloat16": with_copies(params, copies),
        "int8": moe_jax.quantize(params, "int8"),
        "int8, inputs too": moe_jax.quantize(params, "int8", inputs=True),
        "float8": moe_jax.quantize(params, "float8"),
        "float8, inputs too": moe_jax.quantize(params, "float8", inputs=True),
    }


def num_bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def predictor(config: RunConfig, options: Options, compute: str) -> Callable[..., jax.Array]:
    """(parameters, graph, batch) -> logits, compiled."""
    changes = {"compute_dtype": compute, "dispatch": options.dispatch or config.model.moe.dispatch}
    moe = config.model.moe.replace(**changes)
    model = MoELanguageModel(config.model.replace(moe=moe))

    def predict(params: Any, graph: KnowledgeGraph, batch: Batch) -> jax.Array:
        out = model.apply({"params": params}, batch.tokens, graph, is_valid=batch.is_input)
        return out.logits

    return jax.jit(predict)


def measure(config: RunConfig, params: Any, graph: KnowledgeGraph, options: Options) -> list[dict]:
    """One row for each way of storing the matrices."""
    c = config.training
    batches = held_out_batches(
        load_corpus(),
        batch_size=c.batch_size,
        seq_len=c.seq_len,
        min_bytes=options.held_out_bytes,
        context=c.eval_context,
    )
    reference, predict = (predictor(config, options, d) for d in ("float32", options.compute))
    copies = matrix_copies(params, "bfloat16")
    ways = stored(params, copies)
    sums: dict[str, list[Sums]] = {"reference": [], **{name: [] for name in ways}}
    for i, batch in enumerate(map(jax.device_put, batches)):
        wanted = reference(params, graph, batch)
        sums["reference"].append(jax.device_get(compare(wanted, wanted, batch)))
        for name, way in ways.items():
            logits = predict(way, graph, batch)
            sums[name].append(jax.device_get(compare(logits, wanted, batch)))
        if i % 8 == 0:
            say(f"batch {i + 1} of {len(batches)}")
    rest = num_bytes(ways["bfloat16"]) - num_bytes(copies)
    return [
        {
            "matrices": name,
            "experts_mib": (num_bytes(way) - rest) / MIB,
            "model_mib": num_bytes(way) / MIB,
            **figures(sums[name], sums["reference"]),
        }
        for name, way in ways.items()
    ]


def figures(sums: list[Sums], reference: list[Sums]) -> dict[str, float]:
    """Bits per byte, and against the reference; the windows give the standard error."""
    found, wanted = (Sums(*map(np.concatenate, _columns(s))) for s in (sums, reference))
    count = found.count.sum()
    more = (found.nats - wanted.nats) / np.log(2)
    mean = more.sum() / count
    spread = np.sqrt(np.sum(np.square(more - mean * found.count))) / count
    return {
        "bits_per_byte": found.nats.sum() / np.log(2) / count,
        "more_bits": mean,
        "standard_error": spread,
        "error": np.sqrt(found.off.sum() / found.size.sum()),
        "same_argmax": found.same.sum() / count,
        "bytes": count,
    }


def _columns(sums: list[Sums]) -> zip:
    return zip(*(map(np.atleast_1d, s) for s in sums), strict=True)


def table(rows: list[dict]) -> str:
    cells = [
        row
        | {
            "bits_per_byte": f"{row['bits_per_byte']:.4f}",
            "worse": f"{row['more_bits']:+.5f} ± {row['standard_error']:.5f}",
            "error": f"{100 * row['error']:.2f} %",
            "same_argmax": f"{100 * row['same_argmax']:.2f} %",
        }
        for row in rows
    ]
    return markdown(cells, COLUMNS)


def main(options: Options) -> None:
    found = machine()
    if options.run is not None:
        run = open_run(options.run)
        config, params, graph = run.config, run.params, run.graph
    else:
        config = byte_lm()
        if options.steps is not None:
            training = config.training.replace(steps=options.steps, eval_every=0)
            config = config.replace(training=training)
        say(f"training for {config.training.steps} steps")
        result = train(config, load_corpus())
        params, graph = result.state.params, result.graph
    rows = measure(config, params, graph, options)
    print(json.dumps(found))
    print(f"{rows[0]['bytes']:,} held-out bytes; experts compute in {options.compute}\n")
    print(table(rows))
    if options.json:
        report = {"machine": found, "options": asdict(options), "rows": rows}
        options.json.write_text(json.dumps(report, indent=2, default=_plain))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
