"""Rolling checkpoints of any pytree of arrays.

A step is complete when its folder carries Orbax's commit time. What a killed process left behind
has none and is never read.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

FORMAT_VERSION = 2
_COMMIT_FILE = "_CHECKPOINT_METADATA"
_UNFINISHED = "*.orbax-checkpoint-tmp*"


class CheckpointError(Exception):
    """A checkpoint is absent, damaged or of another format; the message is one line."""


class DamagedError(CheckpointError):
    """A checkpoint was saved to the end and cannot be read back."""


class Checkpoints:
    """Rolling checkpoints of a pytree with a JSON note, in one folder.

    Saving is asynchronous: arrays are copied off the device before `save` returns, and written
    in the background. Each save appears whole or not at all, and older ones go only once it is
    there. What a killed process left unfinished is removed at the first save.

    Args:
        directory: created when absent.
        keep: how many are kept.
        also_keep: gives, for a step that is kept, the older steps that it cannot be read without.

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

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        also_keep: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.directory = Path(directory).absolute()
        self._policy = _Newest(keep, also_keep or (lambda step: ()))
        self._manager: ocp.CheckpointManager | None = None
        self._is_swept = False

    def save(self, step: int, tree: Any, note: Mapping[str, Any] | None = None) -> None:
        """Saves `tree` as `step`; a step that is already there complete is left as it is.

        Args:
            step: at least 0, and above all that are there.
            tree: arrays.
            note: plain values, kept beside the arrays.

        Raises:
            CheckpointError: a later step is there.
        """
        if step in complete_steps(self.directory):
            return
        if not self._is_swept:
            # Only who saves may sweep: a reader could meet a save of another process.
            for remains in self.directory.glob(_UNFINISHED):
                shutil.rmtree(remains, ignore_errors=True)
            self._set_aside_incomplete()
            self._is_swept = True
        args = ocp.args.Composite(
            tree=ocp.args.StandardSave(tree),
            note=ocp.args.JsonSave({**(note or {}), "format_version": FORMAT_VERSION}),
        )
        if not self._open().save(step, args=args):
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be saved after step "
                f"{self._open().latest_step()}"
            )

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """Restores the newest complete step, or a given one.

        Args:
            like: a tree of arrays or `jax.ShapeDtypeStruct`, which gives structure, shapes and
                shardings: arrays come back on the mesh that `like` names.
            step: the step wanted; None for the newest complete one.

        Returns:
            (step, tree, note).

        Raises:
            CheckpointError: there is none, or it is of another format, or of other shapes or dtypes
                than `like`.
            DamagedError: it cannot be read.
        """
        step = self._wanted(step)
        note = self.note(step)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._check_same_arrays(step, abstract)
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
        if not isinstance(note, dict):
            raise DamagedError(f"checkpoint {self.directory / str(step)} has no note")
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

    def wait(self) -> None:
        """Waits until everything saved so far is on disk."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk, and lets go of the folder."""
        if self._manager is not None:
            self.wait()
            self._manager.close()
            self._manager = None

    def _set_aside_incomplete(self) -> None:
        """Renames the steps that cannot be restored: Orbax would save nothing up to them again."""
        complete = complete_steps(self.directory)
        for step in self.directory.glob("[0-9]*"):
            if step.name.isdecimal() and int(step.name) not in complete:
                self.close()  # an open manager still counts it
                step.rename(step.with_name(f"incomplete-{step.name}-{time.time_ns()}"))

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(preservation_policy=self._policy, create=True)
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

    def _check_same_arrays(self, step: int, like: Any) -> None:
        """Orbax would cast other dtypes in silence, and call other shapes what damage is called."""
        try:
            described = ocp.StandardCheckpointHandler().metadata(self.directory / f"{step}/tree")
            stored = _by_path(described.tree)
        except Exception:  # what is damaged is told by who reads it
            return
        for path, leaf in _by_path(like).items():
            there = stored.get(path, leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                continue
            if (*there.shape, there.dtype) != (*leaf.shape, leaf.dtype):
                raise CheckpointError(
                    f"checkpoint {self.directory / str(step)} has {path} as {there.dtype} of shape "
                    f"{tuple(there.shape)}, asked for as {leaf.dtype} of shape {tuple(leaf.shape)}"
                )

    def _read(self, step: int, args: ocp.args.Composite) -> Any:
        try:
            return self._open().restore(step, args=args)
        except Exception as error:  # Orbax raises many kinds; all mean the same to the caller.
            reason = " ".join(str(error).split())[:200]
            raise DamagedError(
                f"checkpoint {self.directory / str(step)} cannot be read: "
                f"{type(error).__name__}: {reason}"
            ) from error


def _by_path(tree: Any) -> dict[str, Any]:
    """Leaves that have a shape by path, the same for fields, keys and places."""

    def name(key: Any) -> str:
        return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(map(name, path)): x for path, x in leaves if hasattr(x, "shape")}


class _Newest:
    """Orbax's rule of what stays: the newest steps, and those that they cannot do without."""

    def __init__(self, keep: int, also_keep: Callable[[int], Sequence[int]]) -> None:
        self._keep, self._also_keep = keep, also_keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Whether each checkpoint stays, in the given order."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = sorted(steps)[-self._keep :]
        stays = {*newest, *(older for step in newest for older in self._also_keep(step))}
        return [step in stays for step in steps]


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
    return [step for step in all_steps(directory) if _is_committed(directory / str(step))]


def all_steps(directory: str | Path) -> list[int]:
    """Steps in a folder that have their name, complete or not, ascending.

    Args:
        directory: of the checkpoints; may be absent.

    Returns:
        The steps.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return []
    names = (child.name for child in directory.iterdir() if child.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def _is_committed(step: Path) -> bool:
    try:
        commit = json.loads((step / _COMMIT_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(commit, dict) and bool(commit.get("commit_timestamp_nsecs"))
