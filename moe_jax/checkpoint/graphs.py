"""Rolling, incremental, verified checkpoints of a knowledge graph."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_jax.checkpoint.delta import (
    Delta,
    Fingerprint,
    count_changed,
    delta_like,
    delta_rows,
    fingerprint,
    gather,
    scatter,
)
from moe_jax.checkpoint.store import (
    CheckpointError,
    Checkpoints,
    DamagedError,
    all_steps,
    complete_steps,
)
from moe_jax.graph import KnowledgeGraph
from moe_jax.graph.digest import as_hex


class GraphCheckpoints:
    """Rolling checkpoints of a knowledge graph, one every so many node updates.

    A save writes what changed since the save before it: rows whose hash is no longer the one of
    then are gathered on the device, and only they leave it. Such a delta names its base. Whole
    graphs are saved at first, every `full_every` saves, and when more than about half has changed.
    What is kept can always be read: no base goes before the last delta that needs it. Writing is
    asynchronous, and each save appears whole or not at all. A restore is checked against the
    digest taken at the save; where a file is damaged, the next older checkpoint takes its place.

    A checkpoint is named by the graph's count of node updates, or by the next free number above
    all others when the graph has gone back to an earlier count: the newest save has the highest.

    Args:
        directory: created when absent.
        interval: node updates (creations and merges) between two saves.
        keep: how many are kept, beside the bases that these need.
        full_every: each so many saves, one is of the whole graph.

    Raises:
        ValueError: a number is below 1.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from moe_jax.graph import insert
        >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rolling = GraphCheckpoints(folder, interval=2)
        ...     saved = rolling.maybe_save(graph), rolling.maybe_save(graph)
        ...     rolling.close()
        ...     back = GraphCheckpoints(folder).restore(KnowledgeGraph.create(4, 2))
        >>> saved, int(back.num_live)
        ((True, False), 2)
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        interval: int = 1000,
        keep: int = 5,
        full_every: int = 10,
    ) -> None:
        for name, number in {"interval": interval, "full_every": full_every}.items():
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self._interval, self._full_every = interval, full_every
        self._checkpoints = Checkpoints(directory, keep=keep, also_keep=self._bases)
        self._base: dict[int, int | None] = {}
        self._updates = 0
        # The save that the next delta may be based on, its sizes and its row hashes.
        self._step: int | None = None
        self._sizes: dict[str, int] = {}
        self._rows = np.zeros((0, 2), np.uint32)
        self._read_notes()

    @property
    def directory(self) -> Path:
        """The folder of the checkpoints."""
        return self._checkpoints.directory

    def maybe_save(self, graph: KnowledgeGraph) -> bool:
        """Saves when at least `interval` updates came since the last save.

        A graph with fewer updates than the last save has another history, and its updates count
        from zero. Reads one number from the device: call it between steps, not inside one.

        Args:
            graph: the graph.

        Returns:
            Whether it saved.
        """
        updates = int(jax.device_get(graph.num_updates))
        if updates < self._updates:
            self._updates = 0
        if updates - self._updates < self._interval:
            return False
        self.save(graph)
        return True

    def save(self, graph: KnowledgeGraph) -> int:
        """Saves now; the graph may be donated as soon as this returns.

        Args:
            graph: the graph.

        Returns:
            The step's number.
        """
        self._checkpoints.wait()
        now, sizes = fingerprint(graph), _sizes(graph)
        delta = self._delta(graph, now) if sizes == self._sizes else None
        base, size = (None, None) if delta is None else (self._step, delta.ids.shape[0])
        updates, words, rows = jax.device_get((graph.num_updates, now.digest, now.rows))
        step = max(int(updates), max(all_steps(self.directory), default=-1) + 1)
        note = {"base": base, "rows": size, "digest": as_hex(words), "updates": int(updates)}
        self._base[step] = base
        tree = graph if delta is None else delta
        self._checkpoints.save(step, tree, {**note, "sizes": sizes})
        self._step, self._sizes, self._rows, self._updates = step, sizes, rows, int(updates)
        return step

    def restore(self, like: KnowledgeGraph, step: int | None = None) -> KnowledgeGraph:
        """Restores the newest graph that can be read, or a given one.

        Args:
            like: a graph of the same size, or `jax.ShapeDtypeStruct`s, for shapes and shardings:
                the graph comes back on the devices that `like` names.
            step: the step wanted; None for the newest. Damaged steps that are newer than the one
                returned are warned of.

        Returns:
            The graph, to the bit as it was saved.

        Raises:
            CheckpointError: there is none, or it is of another size or format.
            DamagedError: the given step, or every one, is damaged.
        """
        self._checkpoints.wait()
        like = jax.tree.map(_abstract, like)
        if step is not None:
            return self._adopt(step, *self._rebuild(step, like))
        first = None
        for step in reversed(complete_steps(self.directory)):
            try:
                graph, now, note = self._rebuild(step, like)
            except DamagedError as error:
                first = first or error
                warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=2)
                continue
            return self._adopt(step, graph, now, note)
        if first is None:
            raise CheckpointError(f"no complete checkpoint in {self.directory}")
        raise DamagedError(f"every checkpoint in {self.directory} is damaged: {first}") from first

    def wait(self) -> None:
        """Waits until everything saved so far is on disk."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits until everything is on disk, and lets go of the folder."""
        self._checkpoints.close()

    def _delta(self, graph: KnowledgeGraph, now: Fingerprint) -> Delta | None:
        """What changed since the last save, or None where the whole graph is to be saved."""
        if self._step not in complete_steps(self.directory):
            return None
        if len(self._bases(self._step)) + 1 >= self._full_every:
            return None
        before = jax.device_put(self._rows, now.rows.sharding)
        changed = int(jax.device_get(count_changed(now.rows, before)))
        size = delta_rows(changed, graph.num_nodes)
        return None if size is None else gather(graph, now.rows, before, size=size)

    def _bases(self, step: int) -> list[int]:
        """The older steps that a step is read from, newest first."""
        older: list[int] = []
        while (base := self._base.get(step)) is not None:
            older.append(base)
            step = base
        return older

    def _read_notes(self) -> None:
        for step in complete_steps(self.directory):
            try:
                note = self._note(step)
            except CheckpointError:  # Said when it is to be restored.
                continue
            self._base[step], self._updates = note["base"], note["updates"]

    def _note(self, step: int) -> dict[str, Any]:
        note = self._checkpoints.note(step)
        if not {"base", "rows", "digest", "updates", "sizes"} <= note.keys():
            raise CheckpointError(f"checkpoint {self.directory / str(step)} is not of a graph")
        if note["base"] is not None and not note["base"] < step:
            raise DamagedError(f"checkpoint {self.directory / str(step)} is based on a later one")
        return note

    def _rebuild(
        self, step: int, like: KnowledgeGraph
    ) -> tuple[KnowledgeGraph, Fingerprint, dict[str, Any]]:
        """The graph of one step, read from its whole base and the deltas since."""
        name, note = self.directory / str(step), self._note(step)
        if note["sizes"] != _sizes(like):
            raise CheckpointError(
                f"checkpoint {name} holds a graph of the sizes {_shown(note['sizes'])}, "
                f"and one of {_shown(_sizes(like))} is wanted"
            )
        chain = [(step, note)]
        while (base := chain[-1][1]["base"]) is not None:
            if base not in complete_steps(self.directory):
                raise DamagedError(f"checkpoint {name} needs step {base}, which is not there")
            chain.append((base, self._note(base)))
        # Another object may have written them since this one was made.
        self._base.update({number: its_note["base"] for number, its_note in chain})
        _, graph, _ = self._checkpoints.restore(like, chain.pop()[0])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
        write = jax.jit(scatter, donate_argnums=0, out_shardings=shardings)
        for later, its_note in reversed(chain):
            delta = self._checkpoints.restore(delta_like(like, its_note["rows"]), later)[1]
            graph = write(graph, delta)
        now = fingerprint(graph)
        found = as_hex(jax.device_get(now.digest))
        if found != note["digest"]:
            raise DamagedError(
                f"checkpoint {name} has the digest {found}, {note['digest']} was saved"
            )
        return graph, now, note

    def _adopt(
        self, step: int, graph: KnowledgeGraph, now: Fingerprint, note: Mapping[str, Any]
    ) -> KnowledgeGraph:
        """Lets the next save be a delta from what was just restored."""
        self._step, self._sizes, self._updates = step, dict(note["sizes"]), note["updates"]
        self._rows = jax.device_get(now.rows)
        return graph


def _sizes(graph: KnowledgeGraph) -> dict[str, int]:
    if graph.key.ndim != 2:
        raise ValueError(f"graph.key must have shape [N, D], got {graph.key.shape}")
    return {"N": graph.num_nodes, "D": graph.dim, "M": graph.num_edge_slots}


def _shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
