"""Frozen, checked, JSON-serialisable configuration, and presets.

Every config checks itself when it is made and raises `ValueError` naming the field, what it must
be and what it was. `to_json` and `from_json` are exact inverses.
"""

from moe_jax.config.moe import MoEConfig as MoEConfig
from moe_jax.config.presets import byte_lm as byte_lm
from moe_jax.config.presets import colab as colab
from moe_jax.config.presets import h100 as h100
from moe_jax.config.presets import original as original
from moe_jax.config.presets import smallest_run as smallest_run
from moe_jax.config.presets import tiny as tiny
from moe_jax.config.training import LanguageModelConfig as LanguageModelConfig
from moe_jax.config.training import RunConfig as RunConfig
from moe_jax.config.training import TrainConfig as TrainConfig
