"""Matmuls of groups of rows, each with a matrix of its own."""

from moe_jax.ops.grouped.groups import BLOCK as BLOCK
from moe_jax.ops.grouped.groups import Groups as Groups
from moe_jax.ops.grouped.groups import group_of_rows as group_of_rows
from moe_jax.ops.grouped.groups import is_row as is_row
from moe_jax.ops.grouped.groups import make_groups as make_groups
from moe_jax.ops.grouped.groups import padded_rows as padded_rows
from moe_jax.ops.grouped.matmul import SUMS as SUMS
from moe_jax.ops.grouped.matmul import grouped_matmul as grouped_matmul
from moe_jax.ops.grouped.values import block_sums as block_sums
from moe_jax.ops.grouped.values import row_sums as row_sums
from moe_jax.ops.grouped.values import to_rows as to_rows
