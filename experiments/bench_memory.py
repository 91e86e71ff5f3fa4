"""Cases of `bench.py`: search, insert and write of a half-full graph of the seed's sizes."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from bench_layers import peak_bytes
from bench_system import half_full
from measuring import SHORTEST_ROW, Row, figures, most_calls, time_calls

from moe_jax import MoESystem
from moe_jax.config import MoEConfig, h100, tiny
from moe_jax.graph import KnowledgeGraph, insert, search
from moe_jax.librarian import Proposals
from moe_jax.ops import normalize

# How often each operation looks for the nearest nodes.
SEARCHES = {"search": 1, "insert": 1, "write": 2}


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """One operation on a graph; every call has rows of its own, since a second time they merge.

    Useful operations are the products of rows with live nodes, once for each search in it, and the
    least to move are the nodes' codes, likewise.

    Attributes:
        operation: "search", the exact one; "insert", insert or merge, with eviction compiled in;
            or "write", a system's: insert, and link to what is similar.
        rows: vectors of a call, R.
        config: sizes and policies.
        flags: options of XLA.
    """

    operation: str
    rows: int
    config: MoEConfig
    flags: str = ""

    @property
    def name(self) -> str:
        """What `--only` selects by."""
        return f"memory/{self.operation}/{self.rows}"

    def measure(self, options: argparse.Namespace) -> list[Row]:
        """Runs the case and takes its figures."""
        graph = jax.jit(lambda: half_full(MoESystem(self.config).create_graph()))()
        live, count = int(graph.num_live), most_calls(options.repeats, SHORTEST_ROW)
        least = graph.code.nbytes + graph.code_scale.nbytes
        shape = (self.rows, self.config.output_dim)
        make = jax.jit(lambda key: normalize(jax.random.normal(key, shape)))
        inputs = [make(key) for key in jax.random.split(jax.random.key(4), count)]
        step = self._step()

        def call(i: int) -> Any:
            nonlocal graph
            graph, result = step(graph, inputs[i])
            return graph, result

        times, _ = time_calls(call, jax.block_until_ready, options.repeats, SHORTEST_ROW)
        if self.operation != "search" and int(graph.num_updates) != count * self.rows:
            raise ArithmeticError(f"{int(graph.num_updates)} of {count * self.rows} rows arrived")
        searches = SEARCHES[self.operation]
        row = figures(
            self.name,
            times,
            flops=2.0 * self.rows * live * self.config.output_dim * searches,
            least_bytes=float(least * searches),
            peak_bytes=peak_bytes(),
        )
        return [row]

    def _step(self) -> Callable[[KnowledgeGraph, jax.Array], tuple[KnowledgeGraph, Any]]:
        c = self.config
        if self.operation == "search":
            return lambda graph, x: (graph, search(graph, x, c.kg_link_top_k))
        if self.operation == "insert":
            options = {"merge_threshold": c.kg_merge_threshold, "policy": c.kg_policy}
            return jax.jit(lambda graph, x: insert(graph, x, **options), donate_argnums=0)
        system = MoESystem(c)
        return jax.jit(lambda graph, x: system.write(graph, proposals(x)), donate_argnums=0)


def proposals(x: jax.Array) -> Proposals:
    """Every row as a report that repeats no other."""
    ids = jnp.arange(x.shape[0], dtype=jnp.int32)
    return Proposals(
        key=x,
        value=x,
        confidence=jnp.linspace(0.1, 0.9, x.shape[0]),
        expert_id=ids,
        source=jnp.full((x.shape[0], 2), -1, jnp.int32),
        weight=jnp.ones_like(ids),
        leader=ids,
        is_kept=jnp.ones(ids.shape, bool),
    )


def cases(smoke: bool) -> list[MemoryCase]:
    """As many rows as 8 sequences have reports; the graph has room for those of every call."""
    config, rows = h100(), 256
    if smoke:
        config, rows = tiny().replace(max_kg_nodes=1024), 4
    return [MemoryCase(operation, rows, config) for operation in SEARCHES]
