"""Mixture of experts in JAX and Flax whose experts leave a searchable memory on the device."""

from moe_jax.config import LanguageModelConfig as LanguageModelConfig
from moe_jax.config import MoEConfig as MoEConfig
from moe_jax.config import RunConfig as RunConfig
from moe_jax.config import TrainConfig as TrainConfig
from moe_jax.graph import KnowledgeGraph as KnowledgeGraph
from moe_jax.quantization import quantize as quantize
from moe_jax.reports import DraftReports as DraftReports
from moe_jax.routing import RoutingPlan as RoutingPlan
from moe_jax.system import MoEOutput as MoEOutput
from moe_jax.system import MoESystem as MoESystem

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Imports a room when it is first asked for, so that ``import moe_jax`` stays quick."""
    import importlib

    if name in ("checkpoint", "data", "experts", "interop", "lm", "monitoring", "training"):
        return importlib.import_module(f"moe_jax.{name}")
    raise AttributeError(f"module 'moe_jax' has no attribute {name!r}")
