"""Checkpoints of runs and graphs: Orbax, atomic, the newest complete one wins.

A step is complete when its folder carries Orbax's commit time. What a killed process left behind
has none and is never read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_jax.graph import KnowledgeGraph

FORMAT_VERSION = 1
_COMMIT_FILE = "_CHECKPOINT_METADATA"


class CheckpointError(Exception):
    """A checkpoint is absent, damaged or of another format; the message is one line."""


class Checkpoints:
    """Rolling checkpoints of a pytree with a JSON note, in one folder.

    Saving is asynchronous: arrays are copied off the device before `save` returns, and written
    in the background. Each save appears whole or not at all.

    Args:
        directory: created when absent.
        keep: how many are kept.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoints = Checkpoints(folder)
        ...     checkpoints.save(7, {"w": jnp.ones(2)}, {"seed": 0})
        ...     checkpoints.close()
        ...     step, tree, note = Checkpoints(folder).restore({"w": jnp.zeros(2)})
        >>> step, tree["w"].tolist(), note["seed"]
        (7, [1.0, 1.0], 0)
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None

    def save(self, step: int, tree: Any, note: Mapping[str, Any] | None = None) -> None:
        """Saves `tree` as `step`; a step that is already there complete is left as it is.

        Args:
            step: at least 0.
            tree: arrays.
            note: plain values, kept beside the arrays.
        """
        if step in complete_steps(self.directory):
            return
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(tree),
            note=ocp.args.JsonSave({**(note or {}), "format_version": FORMAT_VERSION}),
        )
        self._open().save(step, args=args)

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """Restores the newest complete step, or a given one.

        Args:
            like: a tree of arrays or `jax.ShapeDtypeStruct`, which gives structure, shapes and
                shardings: arrays come back on the mesh that `like` names.
            step: the step wanted; None for the newest complete one.

        Returns:
            (step, tree, note).

        Raises:
            CheckpointError: there is none, it is damaged, of another format, or of other shapes.
        """
        step = self._wanted(step)
        note = self.note(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
        tree = self._read(step, args).tree
        return step, tree, note

    def note(self, step: int | None = None) -> dict[str, Any]:
        """Reads the JSON note of a step without its arrays.

        Raises:
            CheckpointError: as for `restore`.
        """
        step = self._wanted(step)
        note = self._read(step, ocp.args.Composite(note=ocp.args.JsonRestore())).note
        version = note.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} has format version {version}, "
                f"this release reads {FORMAT_VERSION}"
            )
        return note

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(complete_steps(self.directory), default=None)

    def close(self) -> None:
        """Waits until everything is on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, create=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _wanted(self, step: int | None) -> int:
        complete = complete_steps(self.directory)
        if not complete:
            raise CheckpointError(f"no complete checkpoint in {self.directory}")
        if step is None:
            return complete[-1]
        if step not in complete:
            raise CheckpointError(
                f"no complete checkpoint of step {step} in {self.directory}; there are {complete}"
            )
        return step

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            return self._open().restore(step, args=args)
        except CheckpointError:
            raise
        except Exception as error:  # Orbax raises many kinds; all mean the same to the caller.
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read: "
                f"{type(error).__name__}: {reason}"
            ) from error


class GraphCheckpoints:
    """Rolling checkpoints of a knowledge graph, one every so many node updates.

    Args:
        directory: created when absent.
        interval: node updates (creations and merges) between two saves.
        keep: how many are kept.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from moe_jax.graph import insert
        >>> graph, _ = insert(KnowledgeGraph.create(8, 2), jnp.eye(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rolling = GraphCheckpoints(folder, interval=2)
        ...     saved = rolling.maybe_save(graph), rolling.maybe_save(graph)
        ...     rolling.close()
        ...     back = GraphCheckpoints(folder).restore(KnowledgeGraph.create(8, 2))
        >>> saved, int(back.num_live)
        ((True, False), 2)
    """

    def __init__(self, directory: str | Path, *, interval: int = 1000, keep: int = 5) -> None:
        if interval <= 0:
            raise ValueError(f"interval must be positive, got {interval}")
        self._interval = interval
        self._checkpoints = Checkpoints(directory, keep=keep)
        self._last = self._checkpoints.latest() or 0

    def maybe_save(self, graph: KnowledgeGraph) -> bool:
        """Saves when at least `interval` updates came since the last save.

        Reads one number from the device: call it between steps, not inside one.

        Returns:
            Whether it saved.
        """
        updates = int(jax.device_get(graph.num_updates))
        if updates - self._last < self._interval:
            return False
        self._checkpoints.save(updates, graph)
        self._last = updates
        return True

    def restore(self, like: KnowledgeGraph) -> KnowledgeGraph:
        """Restores the newest complete graph.

        Args:
            like: a graph of the same size, for shapes and shardings.

        Raises:
            CheckpointError: there is none, or it is damaged or of another size.
        """
        return self._checkpoints.restore(like)[1]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._checkpoints.close()


def complete_steps(directory: str | Path) -> list[int]:
    """Steps in a folder that were saved to the end, ascending.

    Args:
        directory: of the checkpoints; may be absent.

    Returns:
        The steps.

    Example:
        >>> complete_steps("no such folder")
        []
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    names = (child.name for child in directory.iterdir() if child.is_dir())
    return sorted(int(n) for n in names if n.isdigit() and _is_committed(directory / n))


def _is_committed(step: Path) -> bool:
    try:
        commit = json.loads((step / _COMMIT_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(commit, dict) and bool(commit.get("commit_timestamp_nsecs"))
