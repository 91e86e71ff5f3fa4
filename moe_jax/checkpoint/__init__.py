"""Checkpoints of runs and of graphs: Orbax, atomic, the newest complete one wins."""

from moe_jax.checkpoint.graphs import GraphCheckpoints as GraphCheckpoints
from moe_jax.checkpoint.store import FORMAT_VERSION as FORMAT_VERSION
from moe_jax.checkpoint.store import CheckpointError as CheckpointError
from moe_jax.checkpoint.store import Checkpoints as Checkpoints
from moe_jax.checkpoint.store import DamagedError as DamagedError
from moe_jax.checkpoint.store import complete_steps as complete_steps
