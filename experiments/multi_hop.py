"""Two-hop questions: facts A->B and B->C are stored apart, A is asked, the node of B->C is wanted.

How the data is made. There are chains of three entities. Eight chains share a topic. An entity is
the unit vector of sqrt(overlap) * topic + sqrt(1 - overlap) * own, topic and own being random
unit vectors. A fact S->O is one node whose key is the unit vector of S + O + noise * (a random
unit vector). For each chain eight facts are stored: A->B and B->C, the two that the answer hangs
on; A->X and B->Y, which branch off at the same entities; and four between new entities of the same
topic. A question is the unit vector of A + hint * C + noise * (a random unit vector). So B->Y is
as good a continuation of A->B as B->C is, and nothing but the hint tells them apart.

What cosine can do: with overlap 0 and hint 0 the wanted key is orthogonal to the question up to
chance, so cosine finds it as often as any node. With overlap it is at least among its topic's 64
facts; with a hint it is seen directly. Chance (5 of N nodes) stands beside the results.

Edges, by the library's own functions: `similar`, each node linked to the 5 nearest above cosine
0.3, as `MoESystem.write` does; `stream`, each chain's facts arrive as a document in the order
A->X, A->B, Z, B->C, B->Y, Z, Z, Z (Z: the unrelated facts of the topic), linked one to the next
and back; and both.

Every method answers with 5 nodes: cosine; the 5 that k-hop finds first from the best hit; and
`retrieve`, its options as they are by default (chosen on seed 100, so run others). Printed is how
often B->C is among the five, then how often A->B is: what resembles the question must not be lost
to what lies behind it.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from moe_jax.graph import (
    KnowledgeGraph,
    insert,
    k_hop,
    link_similar,
    link_stream,
    retrieve,
    search,
)

CHAINS_PER_TOPIC = 8
FACTS = 8
WANTED = {"B->C": 3, "A->B": 1}  # places in a chain's document
TOP = 5
BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of making the data.

    Attributes:
        chains: how many questions; there are eight times as many nodes.
        dim: width of the keys.
        overlap: what entities of one topic have in common, their expected cosine.
        hint: how much of C the question holds.
        noise: length of the random vector added to every key and question.
    """

    chains: int = 256
    dim: int = 64
    overlap: float = 0.3
    hint: float = 0.0
    noise: float = 0.3


CASES = [
    Case(overlap=0.0),
    Case(overlap=0.3),
    Case(overlap=0.5),
    Case(chains=1024, overlap=0.3),
    Case(dim=256, overlap=0.3),
    Case(noise=0.6),
    Case(hint=0.2),
    Case(hint=0.4),
]


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys of facts [chains, FACTS, dim] in the order of their documents, and questions."""
    rng = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        return unit(rng.normal(size=(*shape, case.dim)))

    topic = np.repeat(noise(-(-case.chains // CHAINS_PER_TOPIC)), CHAINS_PER_TOPIC, axis=0)
    topic = topic[: case.chains, None]
    own = noise(case.chains, 5 + 2 * 4)
    entity = unit(np.sqrt(case.overlap) * topic + np.sqrt(1 - case.overlap) * own)
    a, b, c, x, y = (entity[:, i] for i in range(5))
    z = [entity[:, i] + entity[:, i + 1] for i in range(5, 13, 2)]
    facts = unit(np.stack([a + x, a + b, z[0], b + c, b + y, *z[1:]], axis=1))
    facts = unit(facts + case.noise * noise(case.chains, FACTS))
    question = unit(a + case.hint * c)
    return facts, unit(question + case.noise * noise(case.chains))


def store(facts: np.ndarray, edges: str, seed: int) -> tuple[KnowledgeGraph, np.ndarray]:
    """The graph of all facts, and the node of each [chains, FACTS]."""
    chains, _, dim = facts.shape
    size = chains * FACTS
    order = np.random.default_rng([seed, 1]).permutation(size)
    keys, nodes = facts.reshape(size, dim)[order].astype(np.float32), []
    graph = KnowledgeGraph.create(size, dim)
    for part in np.split(keys, range(BATCH, size, BATCH)):
        graph, info = insert(graph, part)
        nodes.append(info.node_id)
    if edges in ("similar", "both"):
        for part in nodes:
            graph, _ = link_similar(graph, part)
    node = jnp.concatenate(nodes)
    if edges in ("stream", "both"):
        graph, _, _ = link_stream(
            graph, node, order // FACTS, position=order % FACTS, symmetric=True
        )
    place = np.empty(size, int)
    place[order] = np.asarray(node)
    return graph, place.reshape(chains, FACTS)


def by_k_hop(graph: KnowledgeGraph, questions: jax.Array) -> jax.Array:
    best = search(graph, questions, 1)
    return k_hop(graph, best, 2, fan_out=4, max_nodes=TOP).ids


METHODS = {
    "cosine": lambda graph, questions: search(graph, questions, TOP).ids,
    "k-hop": by_k_hop,
    "retrieve": lambda graph, questions: retrieve(graph, questions, TOP).ids,
}


@functools.cache
def compiled(method: str):
    return jax.jit(METHODS[method])


def measure(case: Case, seed: int) -> dict[str, dict[str, float]]:
    """How often each wanted node is among the five, by method and kind of edge."""
    facts, questions = make(case, seed)
    found = {wanted: {} for wanted in WANTED}
    for edges in ("similar", "stream", "both"):
        graph, node = store(facts, edges, seed)
        for method in METHODS:
            name = method if method == "cosine" else f"{method}, {edges}"
            if name in found["B->C"]:
                continue
            ids = [
                np.asarray(compiled(method)(graph, jnp.asarray(part, jnp.float32)))
                for part in np.split(questions, range(64, len(questions), 64))
            ]
            for wanted, place in WANTED.items():
                hits = np.any(np.concatenate(ids) == node[:, place, None], axis=1)
                found[wanted][name] = float(hits.mean())
    return found


def table(rows: list[dict], wanted: str) -> str:
    """The rows as Markdown: mean and standard deviation over the seeds."""
    names = list(rows[0]["found"][0][wanted])
    head = ["nodes", "dim", "overlap", "hint", "noise", "chance", *names]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        case = row["case"]
        nodes = case["chains"] * FACTS
        cells = [f"{nodes:,}", *(f"{case[n]}" for n in ("dim", "overlap", "hint", "noise"))]
        cells.append(f"{TOP / nodes:.4f}")
        for name in names:
            values = [found[wanted][name] for found in row["found"]]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values):.3f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def main(
    seeds: int = 3, first_seed: int = 0, only: int | None = None, out: Path | None = None
) -> None:
    """Ask two-hop questions by cosine, by k-hop and by `retrieve`.

    Args:
        seeds: How many data sets of each case.
        first_seed: The seed of the first.
        only: Run only the case at this place of the list.
        out: Also write the figures to this JSON file.
    """
    rows = []
    for case in CASES if only is None else [CASES[only]]:
        found = [measure(case, first_seed + i) for i in range(seeds)]
        rows.append({"case": dataclasses.asdict(case), "found": found})
    for wanted in WANTED:
        print(f"\n{wanted} among the {TOP}:\n\n{table(rows, wanted)}")
    if out:
        out.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
