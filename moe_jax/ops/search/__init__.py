"""Nearest neighbours by cosine: among all rows of a table, or in a few of its cells."""

from moe_jax.ops.search._matmul import best_of_all as best_of_all
from moe_jax.ops.search.code import Code as Code
from moe_jax.ops.search.code import encode as encode
from moe_jax.ops.search.in_cells import MAX_FUSED_K as MAX_FUSED_K
from moe_jax.ops.search.in_cells import Lists as Lists
from moe_jax.ops.search.in_cells import can_fuse as can_fuse
from moe_jax.ops.search.in_cells import nearest_in_cells as nearest_in_cells
from moe_jax.ops.search.nearest import SCORES_AT_ONCE as SCORES_AT_ONCE
from moe_jax.ops.search.nearest import Hits as Hits
from moe_jax.ops.search.nearest import nearest as nearest
