"""Recall and speed of approximate search: `python experiments/cells.py --num-nodes 1000000`.

Each row is one setting of probes against exact `moe_jax.graph.search` of the same queries in the
same run. "us queued" is wall time per call, waiting once for a queue of calls; "us inside" is per
search with the whole queue in one compiled program, one search after the other, which leaves out
what the host does per call.

Data: "text" is what cells are for, the keys that a token memory of the standard library's source
holds, and held-out source as queries; it needs `--run`, a folder of `moe-jax train`. The others are
drawn: "clustered" takes a direction by Zipf's law for each node and adds noise of `rank` dimensions
that all directions share; "isotropic" is normal noise alone, which has no cells to find and is the
worst case.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from search import stacked

from moe_jax.data import load_corpus
from moe_jax.graph import (
    KnowledgeGraph,
    build_cells,
    num_missing,
    refine_cells,
    search,
    search_cells,
    update_cells,
)
from moe_jax.graph.state import with_keys
from moe_jax.memory import ContextVectors
from moe_jax.ops import normalize
from moe_jax.training import StreamReader
from moe_jax.training.run import open_run
from moe_jax.training.stream_reader import documents_by_name, first_documents

ROWS_AT_ONCE = 2**16


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        num_nodes: N, all live.
        dim: D.
        k: hits of a search.
        probes: cells probed, one row of the table each.
        batches: queries in a call, one part of the table each.
        first_pass: "codes" or "keys", see `search_cells`.
        reproducible: make certain of the last bit, in `search` and `search_cells`.
        num_cells: L; 0 for the default.
        slots_per_cell: P; 0 for the default.
        iterations: rounds of k-means.
        init: seeds of k-means.
        data: where nodes and queries come from.
        run: the trained model for "text".
        num_clusters: directions of clustered data; 0 for N / 50.
        zipf: exponent of the clusters' sizes.
        spread: length of the noise beside the unit direction.
        rank: dimensions of the noise; 0 for all.
        recall_queries: queries that recall is taken over.
        queue: calls in a row for one timing; 0 to measure recall alone.
        repeats: timings, of which the median is given.
        seed: of everything.
        json: also write the figures to this file.
    """

    num_nodes: int = 20_000
    dim: int = 64
    k: int = 10
    probes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    batches: tuple[int, ...] = (1, 128)
    first_pass: Literal["codes", "keys"] = "codes"
    reproducible: bool = False
    num_cells: int = 0
    slots_per_cell: int = 0
    iterations: int = 10
    init: Literal["random", "k-means++"] = "random"
    data: Literal["text", "clustered", "isotropic"] = "clustered"
    run: Path | None = None
    num_clusters: int = 0
    zipf: float = 1.0
    spread: float = 0.7
    rank: int = 32
    recall_queries: int = 1024
    queue: int = 32
    repeats: int = 7
    seed: int = 0
    json: Path | None = None


def draw(options: Options, rows: int, key: jax.Array) -> jax.Array:
    """Unit vectors, float32 [rows, D]; the directions depend on the seed alone."""
    which, noise = jax.random.split(key)
    world, shared = jax.random.split(jax.random.key(options.seed))
    if options.data == "isotropic":
        return normalize(jax.random.normal(noise, (rows, options.dim)))
    count = options.num_clusters or max(1, options.num_nodes // 50)
    share = jnp.cumsum((1.0 + jnp.arange(count)) ** -options.zipf)
    own = jnp.searchsorted(share / share[-1], jax.random.uniform(which, (rows,)))
    centre = normalize(jax.random.normal(world, (count, options.dim)))[own.clip(0, count - 1)]
    rank = min(options.rank or options.dim, options.dim)
    beside = jax.random.normal(noise, (rows, rank))
    if options.rank:
        beside = beside @ jax.random.orthogonal(shared, options.dim)[:rank]
    return normalize(centre + options.spread * beside / rank**0.5)


def filled(options: Options, keys: Callable[[int, int], jax.Array]) -> KnowledgeGraph:
    """A graph with the keys `keys(start, rows)`, written in chunks on the device."""
    chunk = min(ROWS_AT_ONCE, options.num_nodes)

    @functools.partial(jax.jit, donate_argnums=0)
    def write(graph: KnowledgeGraph, start: jax.Array, keys: jax.Array) -> KnowledgeGraph:
        at = start + jnp.arange(len(keys))
        return with_keys(graph, at, keys)._replace(
            is_live=graph.is_live.at[at].set(True, mode="drop")
        )

    graph = KnowledgeGraph.create(options.num_nodes, options.dim, num_edge_slots=1)
    for start in range(0, options.num_nodes, chunk):
        graph = write(graph, jnp.int32(start), keys(start, chunk))
    return graph


def drawn_graph(options: Options) -> KnowledgeGraph:
    """A full graph of keys that are drawn."""

    @functools.partial(jax.jit, static_argnums=1)
    def keys(start: int, rows: int) -> jax.Array:
        return draw(options, rows, jax.random.fold_in(jax.random.key(options.seed + 1), start))

    return filled(options, keys)


def text_graph(options: Options) -> tuple[KnowledgeGraph, jax.Array]:
    """A graph of the keys of as much training text as fills it, and the keys of held-out text."""
    if options.run is None:
        raise SystemExit('data "text" needs --run, a folder of `moe-jax train`')
    run, corpus = open_run(options.run), load_corpus()
    reports = run.graph if run.config.model.moe.memory_read else None
    vectors = ContextVectors(signature_dim=options.dim - ContextVectors().hidden_dim)
    size = run.config.training.seq_len
    reader = StreamReader(
        run.model, run.params, corpus, reports=reports, vectors=vectors, seq_len=size,
        context=size // 4, rows=32,
    )  # fmt: skip

    def batches(held_out: bool, total: int) -> list:
        ids = documents_by_name(corpus, held_out=held_out)
        return reader.batches(first_documents(corpus, ids, total, 2**16), 2**16)

    learnt = batches(False, options.num_nodes + options.num_nodes // 8)
    projection = reader.fit_projection(learnt[: 1 + 2**16 // reader.positions])
    encode = jax.jit(vectors)

    def keys_of(batches: list) -> np.ndarray:
        keys = []
        for batch in batches:
            hidden, _ = reader.hidden_step(reader.params, batch, reports)
            found = encode(projection, hidden, batch.tokens)
            keys.append(np.asarray(found)[np.asarray(batch.is_valid)])
        return np.concatenate(keys)[: options.num_nodes]

    keys = keys_of(learnt)
    return filled(options, lambda start, rows: keys[start : start + rows]), keys_of(
        batches(True, 2**16)
    )


def seconds(function: Callable, calls: list, repeats: int) -> float:
    """Median wall time of a call, over a queue of them that is waited for once."""
    jax.block_until_ready([function(call) for call in calls])
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready([function(call) for call in calls])
        times.append((time.perf_counter() - started) / len(calls))
    return statistics.median(times)


def timings(
    find: Callable, state: Any, options: Options, rows: jax.Array, batch: int
) -> dict[str, float]:
    """Microseconds per call of `find(state, queries)`, queued and inside one program."""
    queries = rows[: 8 * batch].reshape(8, batch, options.dim)
    calls = [queries[i % 8] for i in range(options.queue)]
    queued = seconds(lambda q: find(state, q), calls, options.repeats)

    inside = jax.jit(functools.partial(stacked, find))
    within = seconds(lambda queue: inside(state, queue), [calls] * 2, options.repeats)
    within /= options.queue
    return {"us_queued": 1e6 * queued, "us_inside": 1e6 * within}


def recall(found: jax.Array, exact: jax.Array, nodes: int) -> float:
    """The share of the exact hits that were found."""
    is_found = (exact[:, :, None] == found[:, None, :]).any(axis=2) & (exact < nodes)
    return float(is_found.sum() / (exact < nodes).sum())


def measure(options: Options) -> dict[str, Any]:
    """All figures of one run."""
    if options.data == "text":
        graph, pool = text_graph(options)
        picked = np.random.default_rng(options.seed).permutation(len(pool))
        queries = pool[picked[: max(options.recall_queries, 8 * max(options.batches))]]
        queries = jnp.asarray(queries)
    else:
        graph = jax.block_until_ready(drawn_graph(options))
        count = max(options.recall_queries, 8 * max(options.batches))
        queries = draw(options, count, jax.random.key(options.seed + 4))
    build = functools.partial(
        build_cells,
        graph,
        options.num_cells or None,
        slots_per_cell=options.slots_per_cell or None,
        iterations=options.iterations,
        init=options.init,
    )
    started = time.perf_counter()
    cells = jax.block_until_ready(build(key=jax.random.key(options.seed + 3)))
    spent = {"build_with_compiling_s": time.perf_counter() - started}
    if options.queue:
        started = time.perf_counter()
        cells = jax.block_until_ready(build(key=jax.random.key(options.seed + 3)))
        spent["build_s"] = time.perf_counter() - started
        spent |= maintenance(graph, cells, options)
    figures = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "live": int(graph.num_live),
        "cells": cells.members.shape,
        "largest_cell": int(cells.counts.max()),
        "full_cells": int((cells.counts == cells.members.shape[1]).sum()),
        "in_overflow": int((cells.overflow < options.num_nodes).sum()),
        "missing": int(num_missing(graph, cells)),
        **spent,
    }
    state = (graph, cells)
    parts = [queries[i : i + 64] for i in range(0, options.recall_queries, 64)]

    def exact(state: Any, q: jax.Array) -> Any:
        return search(state[0], q, options.k, reproducible=options.reproducible)

    # The quick search picks by codes, too, and where keys lie close together it misses some.
    truth = jnp.concatenate([search(graph, part, options.k).ids for part in parts])
    batches = options.batches if options.queue else ()
    base = {batch: timings(exact, state, options, queries, batch) for batch in batches}
    quick = jnp.concatenate([exact((graph, None), part).ids for part in parts])
    figures["exact_recall"] = recall(quick, truth, options.num_nodes)
    figures["exact"] = [{"batch": batch} | base[batch] for batch in batches]
    figures["rows"] = []
    for probes in options.probes:
        find = functools.partial(_probe, options, probes)
        found = jnp.concatenate([find(state, part).ids for part in parts])
        of_probes = {"probes": probes, "recall": recall(found, truth, options.num_nodes)}
        rows = [of_probes | {"batch": batch} for batch in batches] or [of_probes]
        for row in rows:
            if batches:
                batch = row["batch"]
                row |= timings(find, state, options, queries, batch)
                for name in ("us_queued", "us_inside"):
                    row[name.replace("us", "gain")] = base[batch][name] / row[name]
            print({name: round(value, 4) for name, value in row.items()}, flush=True)
        figures["rows"] += rows
    return figures


def _probe(options: Options, probes: int, state: Any, queries: jax.Array) -> Any:
    return search_cells(
        *state, queries, options.k, probes=probes, first_pass=options.first_pass,
        reproducible=options.reproducible,
    )  # fmt: skip


def maintenance(graph: KnowledgeGraph, cells: Any, options: Options) -> dict[str, float]:
    """Milliseconds of telling the cells of 256 nodes, and of a refinement."""
    rows = min(256, options.num_nodes)
    ids = [jnp.arange(rows) + i for i in range(8)]
    update = seconds(lambda i: update_cells(graph, cells, i), ids, 3)
    key = jax.random.key(options.seed + 5)
    refine = seconds(lambda k: refine_cells(graph, cells, key=k), [key], 1)
    return {"update_256_ms": 1e3 * update, "refine_ms": 1e3 * refine}


def main() -> None:
    options = tyro.cli(Options, description=__doc__.split("\n")[0])
    figures = measure(options)
    print(json.dumps({name: value for name, value in figures.items() if name != "rows"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
