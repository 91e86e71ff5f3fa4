"""The whole system: memory, supervisor, experts, librarian and graph, from one config."""

from moe_jax.system.inputs import checked_mask as checked_mask
from moe_jax.system.model import MoESystem as MoESystem
from moe_jax.system.output import MoELosses as MoELosses
from moe_jax.system.output import MoEOutput as MoEOutput
from moe_jax.system.query import search_reports as search_reports
