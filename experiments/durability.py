"""Kills processes while they save, and looks at what is left: `python experiments/durability.py`.

Each trial forks a child that restores the newest checkpoint, checks it, goes on with a fixed stream
and saves after every step, telling of each save that has finished. The parent sends SIGKILL at a
random moment. What is restored next must be complete, never older than the last save that was told
of, and equal to the stream replayed from its beginning, by digest. Half of the trials wait for each
save, half go on while it is written. "runs" does the same with the checkpoints of a training run.
"cost" times whole and incremental saves of a graph of 100,000 nodes of width 512.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# A child has little to say before it is killed: let it load what the first one compiled.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="durability-cache-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import jax.numpy as jnp

from moe_jax.checkpoint import Checkpoints, GraphCheckpoints, complete_steps
from moe_jax.graph import KnowledgeGraph, digest, digest_hex, insert, link

N, D, ROWS, TRIALS_PER_FOLDER = 2048, 32, 8, 10
Say = Callable[[str], None]


@jax.jit
def advance(graph: KnowledgeGraph, step: int) -> KnowledgeGraph:
    keys = jax.random.normal(jax.random.fold_in(jax.random.key(0), step), (ROWS, D))
    graph, info = insert(graph, keys)
    return link(graph, info.node_id, info.node_id[::-1])[0]


def graph_child(folder: Path, waits: bool, say: Say) -> None:
    """Restores, compares with the replayed stream, goes on and saves until it is killed."""
    rolling = GraphCheckpoints(folder, interval=1, keep=3, full_every=4)
    new = jax.device_put(KnowledgeGraph.create(N, D), jax.devices()[0])
    graph, step = new, 0
    if complete_steps(folder):
        found = rolling.restore(new)
        while int(graph.num_updates) < int(found.num_updates):
            graph, step = advance(graph, step), step + 1
        is_right = digest_hex(found) == digest_hex(graph)
        say(f"restored {int(found.num_updates)} {is_right}")
        graph = found
    else:
        say("restored 0 True")
    before = 0
    while True:
        graph, step = advance(graph, step), step + 1
        number = rolling.save(graph)
        if waits:
            rolling.wait()
            say(f"saved {number}")
        elif before:
            say(f"saved {before}")  # A save begins when the one before it has finished.
        before = number


def run_child(folder: Path, waits: bool, say: Say) -> None:
    """The same with the checkpoints of a run, whose state is told by its step."""
    checkpoints = Checkpoints(folder, keep=3)
    step, tree = 0, {"w": jnp.zeros((512, 512)), "m": jnp.zeros((512, 512))}
    if complete_steps(folder):
        step, tree, note = checkpoints.restore(tree)
        is_right = all(bool((leaf == step).all()) for leaf in tree.values())
        say(f"restored {step} {is_right and note['step'] == step}")
    else:
        say("restored 0 True")
    while True:
        step, tree = step + 1, jax.tree.map(lambda leaf: leaf + 1, tree)
        checkpoints.save(step, tree, {"step": step})
        if waits:
            checkpoints.wait()
            say(f"saved {step}")
        elif step > 1:
            say(f"saved {step - 1}")


def trial(child: Callable, folder: Path, waits: bool, delay: float) -> tuple[list[str], bool]:
    """Forks a child and kills it some time after its first save.

    Returns:
        What it said, and whether the kill left an unfinished save behind.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            warnings.filterwarnings("error", message=".*trying the checkpoint before it")
            child(folder, waits, lambda text: os.write(writing, f"{text}\n".encode()))
        except BaseException as error:
            os.write(writing, f"failed {type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(1)
    os.close(writing)
    said = b""
    while b"saved" not in said and (part := os.read(reading, 4096)):
        said += part
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    while part := os.read(reading, 4096):
        said += part
    os.close(reading)
    os.waitpid(pid, 0)
    # A last line cut short by the kill was not told.
    lines = said.decode().rpartition("\n")[0].splitlines()
    return lines, any(folder.glob("*.orbax-checkpoint-tmp*"))


def judge(lines: list[str], last_saved: int) -> str | None:
    """What is wrong with what a child said, given the last save told of before."""
    if failed := [line for line in lines if line.startswith("failed")]:
        return failed[0]
    _, restored, is_right = lines[0].split()
    if is_right != "True":
        return f"{restored} differs from the replayed stream"
    if int(restored) < last_saved:
        return f"restored {restored}, older than {last_saved}"
    return None


def trials(child: Callable, count: int, longest: float, seed: int) -> int:
    """Kills so many children, a few in a row on one folder; how many checks failed."""
    rng, wrong, unfinished, saves, began = random.Random(seed), 0, 0, 0, time.perf_counter()
    for first in range(0, count, TRIALS_PER_FOLDER):
        folder, last_saved = Path(tempfile.mkdtemp(prefix="durability-")), 0
        kills = min(TRIALS_PER_FOLDER, count - first)
        # One more child judges the last kill.
        for i in range(kills + 1):
            lines, is_unfinished = trial(child, folder, i % 2 == 0, rng.uniform(0.0, longest))
            if problem := judge(lines, last_saved):
                wrong += 1
                print(f"trial {first + i}: {problem}", flush=True)
            told = [int(line.split()[1]) for line in lines if line.startswith("saved")]
            last_saved = max([last_saved, *told])
            unfinished, saves = unfinished + (is_unfinished and i < kills), saves + len(told)
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{child.__name__}: {count} kills, {unfinished} of them left an unfinished save behind; "
        f"{saves} saves told of, {wrong} checks failed, {time.perf_counter() - began:.0f} s"
    )
    return wrong


def cost(num_nodes: int = 100_000, dim: int = 512, changed: int = 1000) -> int:
    """Prints seconds and bytes of a whole save, of a delta, and of their restore."""
    graph = KnowledgeGraph.create(num_nodes, dim)
    graph = graph._replace(
        key=jax.random.normal(jax.random.key(0), graph.key.shape),
        value=jax.random.normal(jax.random.key(1), graph.value.shape),
    )
    folder = Path(tempfile.mkdtemp(prefix="durability-"))
    rolling = GraphCheckpoints(folder)
    for name in ("whole", "delta, compiling", "delta", "nothing changed"):
        began = time.perf_counter()
        number = rolling.save(graph)
        returned = time.perf_counter() - began
        rolling.wait()
        finished = time.perf_counter() - began
        size = sum(p.stat().st_size for p in (folder / str(number)).rglob("*") if p.is_file())
        print(f"{name}: returns after {returned:.3f} s, on disk after {finished:.3f} s, {size:,} B")
        if name != "delta":
            graph = graph._replace(reads=graph.reads.at[:changed].add(1))
    rolling.close()
    jax.block_until_ready(digest(graph))
    began = time.perf_counter()
    jax.block_until_ready(digest(graph))
    print(f"digest: {time.perf_counter() - began:.3f} s")
    began = time.perf_counter()
    jax.block_until_ready(GraphCheckpoints(folder).restore(graph))
    print(f"restore of a whole save and three deltas: {time.perf_counter() - began:.3f} s")
    shutil.rmtree(folder)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--what", choices=("graphs", "runs", "both", "cost"), default="both")
    parser.add_argument("--longest", type=float, default=0.5, help="seconds until the kill")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Forked children share what is imported; JAX starts its threads in each of them.
    warnings.filterwarnings("ignore", message=".*os.fork.*")
    print(f"jax {jax.__version__}, python {sys.version.split()[0]}")
    children = {"graphs": graph_child, "runs": run_child}
    if args.what == "cost":
        sys.exit(cost())
    chosen = children if args.what == "both" else {args.what: children[args.what]}
    wrong = [trials(child, args.trials, args.longest, args.seed) for child in chosen.values()]
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    sys.exit(any(wrong))


if __name__ == "__main__":
    main()
