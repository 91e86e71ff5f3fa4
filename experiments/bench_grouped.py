"""Cases of `bench.py`: the grouped matmul by itself, y[rows of e] = x[rows of e] @ w[e].

Its three legs are the forward product, the gradient of x (left) and that of w (weight).
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from bench_layers import DTYPE, must_be_near, normal
from measuring import Row, Times, UnavailableError, failure, figures, time_calls
from workloads import BALANCED, ZIPF, draw_group_sizes

from moe_jax.ops.grouped import Groups, _hopper, grouped_matmul, is_row, make_groups

FORWARD, LEFT, WEIGHT = LEGS = ("forward", "left", "weight")
# (block_m, block_n, block_k, max_concurrent_steps, grid_block_n) of the kernels in jax.
BLOCKS = ((128, 192, 64, 4, 4), (128, 128, 64, 5, 4), (128, 128, 64, 4, 1))
CHECKED = 8


@dataclasses.dataclass(frozen=True)
class GroupedShape:
    """Sizes of a grouped matmul: E groups of M rows on average, [M, K] @ [K, N] each."""

    experts: int
    rows: int
    inner: int
    outer: int

    @property
    def name(self) -> str:
        """As it stands in a case's name."""
        return f"e{self.experts}-m{self.rows}-k{self.inner}-n{self.outer}"

    @property
    def total(self) -> int:
        """Rows of all groups."""
        return self.experts * self.rows

    @property
    def flops(self) -> float:
        """Operations of any leg."""
        return 2.0 * self.total * self.inner * self.outer

    @property
    def least_bytes(self) -> float:
        """What any leg must move: each leg reads two of the three arrays and writes the third."""
        matrices = self.experts * self.inner * self.outer
        return 2.0 * (self.total * (self.inner + self.outer) + matrices)


SHAPES = (
    GroupedShape(32, 1536, 2048, 8192),
    GroupedShape(8, 4096, 4096, 14336),
    GroupedShape(128, 1024, 2048, 768),
    GroupedShape(128, 2048, 4096, 512),
)
SMOKE = GroupedShape(4, 32, 64, 48)


class Operands(NamedTuple):
    """x [R, K], w [E, K, N], dy [R, N] in bfloat16, and group_sizes [E] int32, summing to R.

    The same rows as moe_jax's own dispatch lays them out, each group from a multiple of 64 on:
    x_laid, dy_laid and their `Groups`; row [R] says where each went.
    """

    x: jax.Array
    w: jax.Array
    dy: jax.Array
    group_sizes: jax.Array
    x_laid: jax.Array
    dy_laid: jax.Array
    groups: Groups
    row: jax.Array


Function = Callable[[Operands], jax.Array]
Program = jax.stages.Compiled
# (leg, shape) -> candidates by what sets them apart; the fastest one counts.
Implementation = Callable[[str, GroupedShape], dict[str, Function]]


def by_vjp(function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]) -> Implementation:
    """All legs of a differentiable (x, w, group_sizes) -> y; what a leg does not use is not run."""

    def leg_of(leg: str, operands: Operands) -> jax.Array:
        x, w, dy, group_sizes = operands[:4]
        if leg == FORWARD:
            return function(x, w, group_sizes)
        if leg == LEFT:
            return jax.vjp(lambda x: function(x, w, group_sizes), x)[1](dy)[0]
        return jax.vjp(lambda w: function(x, w, group_sizes), w)[1](dy)[0]

    return lambda leg, shape: {"": functools.partial(leg_of, leg)}


def einsum(leg: str, shape: GroupedShape) -> dict[str, Function]:
    """One batched matmul, which is all there is to do when the groups are equal."""

    def run(operands: Operands) -> jax.Array:
        x, dy = (a.reshape(shape.experts, shape.rows, -1) for a in (operands.x, operands.dy))
        if leg == FORWARD:
            return jnp.einsum("emk,ekn->emn", x, operands.w).reshape(operands.dy.shape)
        if leg == LEFT:
            return jnp.einsum("emn,ekn->emk", dy, operands.w).reshape(operands.x.shape)
        return jnp.einsum("emk,emn->ekn", x, dy)

    return {"": run}


def mosaic(leg: str, shape: GroupedShape) -> dict[str, Function]:
    """The Mosaic GPU kernels that come with jax, in each of `BLOCKS` that divides the shape."""
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        raise UnavailableError(f"jax's Mosaic kernels are for Hopper, and this is {device}")
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    def run(blocks: dict[str, int], operands: Operands) -> jax.Array:
        x, w, dy, group_sizes = operands[:4]
        if leg == FORWARD:
            return ragged_dot(x, w, group_sizes=group_sizes, **blocks)
        if leg == LEFT:
            return ragged_dot(dy, w, group_sizes=group_sizes, transpose_rhs=True, **blocks)
        return transposed_ragged_dot(x, dy, group_sizes=group_sizes, **blocks)

    names = ("block_m", "block_n", "block_k", "max_concurrent_steps", "grid_block_n")
    columns = shape.inner if leg == LEFT else shape.outer
    found = {
        str(blocks): functools.partial(run, dict(zip(names, blocks, strict=True)))
        for blocks in BLOCKS
        if columns % blocks[1] == 0
    }
    if not found:
        raise UnavailableError(f"no blocks of {BLOCKS} divide {columns} columns")
    return found


def kernels(leg: str, shape: GroupedShape) -> dict[str, Function]:
    """The library's own kernels for Hopper, tiled as it does, on rows laid out beforehand."""
    if not _hopper.takes(jnp.zeros((), DTYPE), (shape.experts, shape.inner, shape.outer)):
        raise UnavailableError(f"{jax.devices()[0]} or the widths of {shape} do not suit them")

    def run(operands: Operands) -> jax.Array:
        _, w, _, _, x, dy, groups, _ = operands
        if leg == FORWARD:
            return _hopper.rows_by_matrices(x, w, groups)
        if leg == LEFT:
            return _hopper.rows_by_matrices(dy, w, groups, transpose=True)
        return _hopper.rows_by_rows(x, dy, groups)

    return {"": run}


IMPLEMENTATIONS: dict[str, Implementation] = {
    "einsum": einsum,
    "ragged_dot": by_vjp(jax.lax.ragged_dot),
    "mosaic": mosaic,
    "moe_jax": kernels,
    "moe_jax-xla": by_vjp(functools.partial(grouped_matmul, implementation="xla")),
}
NEED_EQUAL_GROUPS = ("einsum",)


def operands_of(shape: GroupedShape, skew: str) -> list[Operands]:
    """Two sets of operands, which share w and are both too large to stay in a cache."""
    w = normal(0, (shape.experts, shape.inner, shape.outer), shape.inner)
    return [
        with_layout(
            normal(2 * seed + 1, (shape.total, shape.inner)),
            w,
            normal(2 * seed + 2, (shape.total, shape.outer)),
            jnp.asarray(draw_group_sizes(shape.experts, shape.total, skew, seed)),
        )
        for seed in range(2)
    ]


def with_layout(x: jax.Array, w: jax.Array, dy: jax.Array, group_sizes: jax.Array) -> Operands:
    """The operands in both layouts."""
    groups = make_groups(group_sizes, x.shape[0])
    row = jnp.flatnonzero(is_row(groups), size=x.shape[0])
    laid = (jnp.zeros((groups.num_rows, a.shape[1]), a.dtype).at[row].set(a) for a in (x, dy))
    return Operands(x, w, dy, group_sizes, *laid, groups, row)


def check(leg: str, operands: Operands, result: jax.Array) -> None:
    """Compares some rows, or some rows of one group's gradient, with float32 products.

    Raises:
        ArithmeticError: they differ by more than rounding.
    """
    x, w, dy, group_sizes = operands[:4]
    if leg != WEIGHT and result.shape[0] != x.shape[0]:
        result = result[operands.row]
    ends = np.cumsum(np.asarray(group_sizes))
    product = functools.partial(jnp.matmul, precision="highest", preferred_element_type=jnp.float32)
    if leg == WEIGHT:
        group = int(np.argmax(group_sizes))
        at = slice(ends[group] - int(group_sizes[group]), ends[group])
        wanted = product(x[at, :CHECKED].T, dy[at])
        return must_be_near(result[group, :CHECKED], wanted, f"gradient of group {group}")
    for row in range(0, x.shape[0], x.shape[0] // CHECKED):
        own = w[int(np.searchsorted(ends, row, side="right"))]
        wanted = product(x[row], own) if leg == FORWARD else product(own, dy[row])
        must_be_near(result[row], wanted, f"row {row}")
    return None


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """One implementation at one shape: three legs, balanced and skewed, a row for each.

    The peak of a row is what its compiled program takes, operands and result included.
    """

    shape: GroupedShape
    implementation: str
    flags: str = ""

    @property
    def name(self) -> str:
        """What `--only` selects by."""
        return f"layer/grouped-{self.shape.name}/{self.implementation}"

    def measure(self, options: argparse.Namespace) -> list[Row]:
        """Runs all legs; one that fails leaves the others."""
        rows = []
        for skew in (BALANCED, ZIPF):
            inputs = operands_of(self.shape, skew)
            for leg in LEGS:
                name = f"{self.name}/{leg}/{skew}"
                try:
                    if skew != BALANCED and self.implementation in NEED_EQUAL_GROUPS:
                        raise UnavailableError("needs groups of one size")
                    rows.append(self._leg(name, leg, inputs, options.repeats))
                except Exception as error:
                    rows.append(failure(name, error))
            del inputs
        return rows

    def _leg(self, name: str, leg: str, inputs: list[Operands], repeats: int) -> Row:
        times, label, program = fastest(compiled(self, leg), inputs, repeats)
        check(leg, inputs[0], program(inputs[0]))
        sizes = np.asarray(inputs[0].group_sizes)
        row = figures(
            name,
            times,
            flops=self.shape.flops,
            least_bytes=self.shape.least_bytes,
            peak_bytes=program_bytes(program),
            load=float(sizes.max() / sizes.mean()),
            dropped=0.0,
        )
        return row | {"candidate": label or None}


@functools.cache
def compiled(case: GroupedCase, leg: str) -> dict[str, Program]:
    """The candidates of a leg; one that does not compile is left out while there are others."""
    operands = jax.eval_shape(lambda: operands_of(case.shape, BALANCED)[0])
    programs, errors = {}, []
    for label, function in IMPLEMENTATIONS[case.implementation](leg, case.shape).items():
        try:
            programs[label] = jax.jit(function).lower(operands).compile()
        except Exception as error:
            errors.append(error)
    if not programs:
        raise errors[0]
    return programs


def fastest(
    programs: dict[str, Program], inputs: list[Operands], repeats: int
) -> tuple[Times, str, Program]:
    """Times the program that is fastest in a few calls."""

    def timed(label: str, repeats: int) -> Times:
        run = programs[label]
        return time_calls(lambda i: run(inputs[i % 2]), jax.block_until_ready, repeats)[0]

    labels = list(programs)
    best = labels[0] if len(labels) == 1 else min(labels, key=lambda label: timed(label, 2).row)
    return timed(best, repeats), best, programs[best]


def program_bytes(program: Program) -> int:
    """What a compiled program takes of the device's memory."""
    use = program.memory_analysis()
    return (
        use.argument_size_in_bytes
        + use.output_size_in_bytes
        + use.temp_size_in_bytes
        - use.alias_size_in_bytes
    )


def cases(smoke: bool) -> list[GroupedCase]:
    """Every shape with every implementation."""
    return [
        GroupedCase(shape, implementation)
        for shape in ((SMOKE,) if smoke else SHAPES)
        for implementation in IMPLEMENTATIONS
    ]
