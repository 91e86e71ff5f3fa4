"""Speed of exact search beside its limits and its peers: `python experiments/search.py`.

On a GPU the peer is `torch.topk(q @ keys.T, k)` in bfloat16, called as usual and replayed as a CUDA
graph; on a CPU it is faiss's flat index. Times are medians over rounds of a queue of searches, each
with other queries, divided by their number: "in one program" is a compiled program that holds the
queue, "by calls" one call a search without waiting in between. The floor is the larger of reading
the keys in bfloat16 (float32 on a CPU) at the measured copy bandwidth, read and written bytes
counted, and the products at the measured matmul rate.
"""

import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from moe_jax.graph import Hits, KnowledgeGraph, insert, search
from moe_jax.graph.state import with_keys
from moe_jax.ops import normalize

IS_GPU = jax.default_backend() == "gpu"
ROUNDS, SECONDS, IN_FLIGHT = 5, 0.3, 4


def microseconds(
    run: Callable[[], Any], count: int, wait: Callable[[Any], Any] = jax.block_until_ready
) -> float:
    """Median time of one of the `count` searches that `run` starts, some runs in flight."""

    def several() -> Any:
        return wait([run() for _ in range(IN_FLIGHT)])

    several()
    times = []
    # The first rounds after compiling can take twice as long as all that follow.
    while len(times) < ROUNDS or sum(times) < SECONDS:
        began = time.perf_counter()
        several()
        times.append(time.perf_counter() - began)
    return statistics.median(times) / (IN_FLIGHT * count) * 1e6


def ceilings() -> dict[str, float]:
    """Copy bandwidth in TB/s and matmul rate in TFLOP/s of this machine."""
    dtype = jnp.bfloat16 if IS_GPU else jnp.float32
    size = 8192 if IS_GPU else 2048
    x = jax.random.normal(jax.random.key(0), (2**29 if IS_GPU else 2**26,))
    # In place on a CPU, where the first touch of fresh memory would be what is measured; on a GPU
    # that is slower than from one place to another.
    copy = jax.jit(jnp.negative, donate_argnums=() if IS_GPU else 0)

    def copies() -> jax.Array:
        nonlocal x
        for _ in range(10):
            x = copy(x)
        return x.ravel()[:1]

    us = microseconds(copies, 10)
    square = jax.random.normal(jax.random.key(1), (size, size), dtype)
    matmul = jax.jit(lambda a: a @ a.T)
    matmul_us = microseconds(lambda: [matmul(square) for _ in range(10)][-1], 10)
    return {
        "copy_tb_s": 2 * x.nbytes / us / 1e6,
        "matmul_tflop_s": 2 * size**3 / matmul_us / 1e6,
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def random_graph(num_nodes: int, dim: int) -> KnowledgeGraph:
    """A full graph of random keys; few edge slots, which a search does not read."""
    graph = KnowledgeGraph.create(num_nodes, dim, num_edge_slots=1)
    graph = graph._replace(is_live=jnp.ones(num_nodes, bool), value=jnp.zeros((num_nodes, dim)))
    part = 100_000 if num_nodes % 100_000 == 0 else num_nodes

    def fill(i: jax.Array, graph: KnowledgeGraph) -> KnowledgeGraph:
        keys = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (part, dim))
        return with_keys(graph, i * part + jnp.arange(part), normalize(keys))

    return jax.lax.fori_loop(0, num_nodes // part, fill, graph)


def measure(graph: KnowledgeGraph, num_queries: int, k: int, queue: int) -> dict[str, float]:
    """Our own times, and how many of the true k nearest the quick search finds."""
    queries = jax.random.normal(jax.random.key(1), (queue, num_queries, graph.dim))
    each = [queries[i] for i in range(queue)]
    certain = functools.partial(search, k=k)
    quick = functools.partial(certain, reproducible=False)

    def by_calls(find: Callable[..., Hits]) -> float:
        return microseconds(lambda: [find(graph, q) for q in each][-1], queue)

    program = jax.jit(functools.partial(stacked, quick))
    row = {
        "quick_calls_us": by_calls(quick),
        "quick_program_us": microseconds(functools.partial(program, graph, each), queue),
        "certain_calls_us": by_calls(certain),
    }
    some = each[0][:64]
    found, true = (find(graph, some).ids for find in (quick, certain))
    return {**row, "recall": share_found(found.tolist(), true.tolist())}


def stacked(find: Callable[..., Hits], graph: Any, queue: list[jax.Array]) -> Hits:
    """The hits of a queue; what a program returns costs the host, so it is one array of each."""
    return jax.tree.map(lambda *each: jnp.stack(each), *[find(graph, q) for q in queue])


def share_found(found: list[list[int]], true: list[list[int]]) -> float:
    """How many of the true nearest were found."""
    same = [len(set(a) & set(b)) for a, b in zip(found, true, strict=True)]
    return sum(same) / sum(map(len, true))


def measure_torch(num_nodes: int, dim: int, num_queries: int, k: int, queue: int) -> dict:
    """The same through PyTorch, called as usual and as a CUDA graph."""
    import torch

    def unit(rows: int) -> torch.Tensor:
        x = torch.randn(rows, dim, device="cuda")
        return x / x.norm(dim=1, keepdim=True)

    some, scores = unit(64), []
    keys = torch.empty(num_nodes, dim, dtype=torch.bfloat16, device="cuda")
    for rows in keys.split(100_000):
        part = unit(len(rows))
        scores.append(some @ part.T)
        rows.copy_(part)
    true = torch.topk(torch.cat(scores, dim=1), k).indices
    del scores
    found = torch.topk(some.bfloat16() @ keys.T, k).indices
    each = [unit(num_queries).bfloat16() for _ in range(queue)]

    def calls() -> None:
        for q in each:
            torch.topk(q @ keys.T, k)

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    row = {"torch_calls_us": microseconds(calls, queue, wait)}
    row["torch_recall"] = share_found(found.tolist(), true.tolist())
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        calls()
    row["torch_program_us"] = microseconds(recorded.replay, queue, wait)
    del keys, recorded
    torch.cuda.empty_cache()
    return row


def measure_faiss(graph: KnowledgeGraph, num_queries: int, k: int, queue: int) -> dict:
    """The same through faiss's flat index."""
    import faiss

    index = faiss.IndexFlatIP(graph.dim)
    index.add(np.asarray(graph.key))
    queries = np.asarray(jax.random.normal(jax.random.key(1), (num_queries, graph.dim)))
    count = max(1, queue // 4)
    return {
        "faiss_us": microseconds(lambda: [index.search(queries, k) for _ in range(count)], count)
    }


def measure_insert(graph: KnowledgeGraph, rows: int, queue: int) -> dict[str, float]:
    """Insert-or-merge of random rows into a half-full graph, donated, beside searching for them."""
    half = jax.tree.map(jnp.copy, graph)
    half = half._replace(is_live=jnp.arange(graph.num_nodes) < graph.num_nodes // 2)
    make = jax.jit(lambda key: jax.random.normal(key, (rows, graph.dim)))
    batches = [make(key) for key in jax.random.split(jax.random.key(2), queue + 2)]
    write = jax.jit(lambda g, x: insert(g, x)[0], donate_argnums=0)
    for x in batches[:2]:
        half = write(half, x)
    jax.block_until_ready(half)
    began = time.perf_counter()
    for x in batches[2:]:
        half = write(half, x)
    jax.block_until_ready(half)
    return {"insert_us": (time.perf_counter() - began) / queue * 1e6}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for row in rows:
        cells = [row.get(name, "") for name in columns]
        lines.append(" | ".join(f"{c:,.4g}" if isinstance(c, float) else f"{c}" for c in cells))
    return "\n".join(f"| {line} |" for line in lines)


def main(
    nodes: tuple[int, ...] = (100_000,),
    queries: tuple[int, ...] = (1, 128),
    dim: int = 512,
    k: int = 10,
    queue: int = 20,
    insert_rows: int = 0,
    json_file: Path | None = None,
) -> None:
    """Measures search.

    Args:
        nodes: N of each graph.
        queries: Q of each search.
        dim: D.
        k: hits wanted.
        queue: searches in a row.
        insert_rows: also insert so many rows at a time into a half-full graph; 0 for not.
        json_file: where to write the figures.
    """
    limits = ceilings()
    device = jax.devices()[0].device_kind
    print(device, platform.python_version(), jax.__version__, limits)
    key_bytes = 2 if IS_GPU else 4
    rows = []
    for num_nodes in nodes:
        peers = {}
        for num_queries in queries if IS_GPU else ():
            # More would take PyTorch's scores past the memory of one GPU.
            if num_nodes * num_queries <= 5e9:
                peers[num_queries] = measure_torch(
                    num_nodes, dim, num_queries, k, queue if num_queries < 1000 else 4
                )
        graph = jax.block_until_ready(random_graph(num_nodes, dim))
        for num_queries in queries:
            row = {"N": num_nodes, "Q": num_queries}
            work = 2.0 * num_nodes * num_queries * dim / limits["matmul_tflop_s"] / 1e6
            row["floor_us"] = max(num_nodes * dim * key_bytes / limits["copy_tb_s"] / 1e6, work)
            row |= measure(graph, num_queries, k, queue if num_queries < 1000 else 4)
            row |= peers.get(num_queries, {})
            if not IS_GPU:
                row |= measure_faiss(graph, num_queries, k, queue)
            if insert_rows == num_queries:
                row |= measure_insert(graph, insert_rows, queue)
            rows.append(row)
            print(table([row]), flush=True)
        del graph
    print(table(rows))
    if json_file is not None:
        versions = {"python": platform.python_version(), "jax": jax.__version__}
        result = {"device": device, "versions": versions, "ceilings": limits, "rows": rows}
        json_file.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
