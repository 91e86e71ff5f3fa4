"""Grouped matmuls for NVIDIA Hopper: persistent, warp-specialised Pallas kernels (Mosaic GPU).

One warpgroup loads blocks of both operands into a ring of shared memory, two multiply, each half of
the tile's rows, and the loader runs ahead into the next tile while they store the last. Groups
start at multiples of 64 rows, the rows of one warpgroup, so that none ever stores in part.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float
from moe_jax.ops._hardware import is_hopper, num_multiprocessors
from moe_jax.ops.grouped._hopper_kernels import ROWS, SWIZZLED, rows_kernel, sums_kernel
from moe_jax.ops.grouped.groups import BLOCK, Groups, first_above

__all__ = ["Tiling", "fuses", "rows_by_matrices", "rows_by_rows", "takes", "tiling_for"]


_LARGE = 2**23  # numbers in a matrix


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work.

    Attributes:
        columns: of the result that one tile holds, beside its 128 rows.
        depth: of the contraction in one step.
        stages: steps that are loaded ahead.
        sweep: tiles along the first axis that are visited before the next column of tiles, so
            that what they share stays in the L2 cache.
        slots: buffers of 64 x 64 in which each half of the rows stages what it stores; even.
    """

    columns: int = 256
    depth: int = 64
    stages: int = 4
    sweep: int = 12
    slots: int = 2


def tiling_for(
    columns: int, other: int, num_row_tiles: int, num_parts: int = 1, sweep: int = Tiling.sweep
) -> Tiling | None:
    """A tiling that divides the sizes; None where there is none.

    Args:
        columns: of the result.
        other: the matrices' other size.
        num_row_tiles: how many tiles there may be along the rows of the result.
        num_parts: accumulators that share a tile's columns.
        sweep: of the tiling.
    """
    least = SWIZZLED * num_parts
    widths = [width for width in (256, 128, 64) if columns % width == 0 and width >= least]
    if not widths or other % 64:
        return None
    # Few rows are a matter of reading the matrices, which takes all multiprocessors.
    busy = [width for width in widths if num_row_tiles * columns // width >= num_multiprocessors()]
    width = busy[0] if busy else widths[-1]
    if width < 256:
        # Narrow tiles are short of work per byte, and have room for more steps.
        return Tiling(columns=width, stages=6, sweep=sweep)
    # Measured: with large matrices three stages are up to 6 % faster than four, with small ones
    # up to 8 % slower.
    return Tiling(stages=3 if columns * other >= _LARGE else 4, sweep=sweep)


def takes(x: jax.Array, w_shape: tuple[int, ...]) -> bool:
    """Whether all three legs of x [R, I] by w [E, I, J] can run here.

    Args:
        x: the rows.
        w_shape: (E, I, J).
    """
    _, inner, outer = w_shape
    fits = x.dtype in (jnp.bfloat16, jnp.float16) and inner % 128 == 0 and outer % 128 == 0
    # Earlier Pallas has another signature for loads, and its kernels were never tried.
    return fits and jax.__version_info__ >= (0, 11) and is_hopper()


def fuses(activation: str | None, bias: Array | None, residual: Array | None, outer: int) -> bool:
    """Whether `rows_by_matrices` can do all of it before it stores its sums, J wide."""
    is_plain = bias is None and residual is None and outer % 256 == 0
    return activation in (None, "gelu_tanh") or (activation == "swiglu" and is_plain)


def row_tiles(groups: Groups) -> tuple[Array, Array, Array, Array]:
    """Cuts the groups into tiles of up to 128 rows.

    Returns:
        For each of the most tiles that there can be [I] int32: its group, its first row, and its
        rows (64 or 128); and [E] int32, how many there are up to the end of each group.
    """
    count = -(-groups.num_blocks // 2)
    last = jnp.cumsum(count).astype(jnp.int32)
    most = groups.block_group.shape[0] // 2 + groups.num_groups
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.minimum(first_above(last, tile), groups.num_groups - 1)
    first = groups.start[group] + (tile - (last - count)[group]) * ROWS
    rows = jnp.clip(groups.start[group] + groups.num_blocks[group] * BLOCK - first, 0, ROWS)
    is_tile = tile < last[-1]
    return group, jnp.where(is_tile, first, 0), jnp.where(is_tile, rows, 0), last


def rows_by_matrices(
    x: Float[Array, "R I"],
    w: Float[Array, "E I J"] | Float[Array, "E J I"],
    groups: Groups,
    *,
    transpose: bool = False,
    bias: Float[Array, "E J"] | None = None,
    activation: str | None = None,
    residual: Float[Array, "R J"] | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> Float[Array, "R _"]:
    """Row r of group e times w[e], or times its transpose.

    Blocks after the last group are neither read nor written: they may hold anything.

    Args:
        x: [R, I], 16-bit.
        w: [E, I, J], or [E, J, I] with `transpose`, of the same dtype.
        groups: of R rows.
        transpose: multiply by the transposes.
        bias: [E, J], added in float32 before anything is rounded.
        activation: "gelu_tanh" or "swiglu", taken in float32 before anything is rounded; None for
            none. With "swiglu" w is [E, I, 2 * J], first the gates.
        residual: [R, J] of the same dtype, added last of all, before anything is rounded. See
            `fuses` for what goes together.
        tiling: how to cut the work; None for the usual.
        interpret: parameters of Pallas's interpreter, to run without a GPU.

    Returns:
        [R, J].
    """
    width = w.shape[1] if transpose else w.shape[2]
    is_gated, is_biased = activation == "swiglu", bias is not None
    has_residual = residual is not None
    outer = width // 2 if is_gated else width
    parts = 1 + is_gated
    num_blocks = groups.block_group.shape[0]
    # Groups of a tile or two share nothing, and each matrix is best read from end to end.
    sweep = 1 if num_blocks <= 4 * groups.num_groups else Tiling.sweep
    tiling = tiling or tiling_for(width, x.shape[1], num_blocks, parts, sweep)
    if not fuses(activation, bias, residual, w.shape[2]):
        raise ValueError(
            'activation must be None, "gelu_tanh" or, without bias and residual, "swiglu", '
            f"got {activation!r}"
        )
    if tiling is None or (is_gated and (transpose or outer % 128)):
        raise ValueError(f"w must have sizes that 64 divides (128 if gated), got {w.shape}")
    if has_residual:
        # A tile of the residual waits where that of the result is staged.
        stages = min(tiling.stages, 3) if tiling.columns == 256 else tiling.stages
        tiling = dataclasses.replace(
            tiling, stages=stages, slots=max(2, tiling.columns // SWIZZLED)
        )
    kernel = functools.partial(
        rows_kernel, tiling=tiling, inner=x.shape[1], outer=outer, transpose=transpose,
        activation=activation, is_biased=is_biased, has_residual=has_residual,
    )  # fmt: skip
    columns = tiling.columns // parts
    step = (parts, columns, tiling.depth) if transpose else (parts, tiling.depth, columns)
    rows = x.shape[0]
    if interpret:
        # A tile of one block reads 64 rows more, which the device fills with zeros.
        x = jnp.pad(x, ((0, BLOCK), (0, 0)))
    out = jax.ShapeDtypeStruct((rows, outer), x.dtype)
    blocks = ((ROWS, tiling.depth), step)
    # An input that the kernel has no use for costs nothing, and spares a second signature.
    bias, residual = bias if is_biased else x, residual if has_residual else x
    launch = _launch(kernel, out, blocks, tiling, interpret, num_copies=1 + parts)
    return launch(*row_tiles(groups), x, w, bias, residual)


def rows_by_rows(
    x: Float[Array, "R I"],
    y: Float[Array, "R J"],
    groups: Groups,
    *,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> Float[Array, "E I J"]:
    """The sum over the blocks of group e of x[r]^T y[r], padding included, which must be zero.

    Args:
        x: [R, I], 16-bit; 128 divides I.
        y: [R, J], of the same dtype.
        groups: of R rows.
        tiling: how to cut the work; None for the usual.
        interpret: parameters of Pallas's interpreter, to run without a GPU.

    Returns:
        [E, I, J].
    """
    inner, outer = x.shape[1], y.shape[1]
    tiling = tiling or tiling_for(outer, inner, groups.num_groups * inner // ROWS)
    if tiling is None or inner % ROWS:
        raise ValueError(f"x and y must be 128 and 64 times some width, got {inner} and {outer}")
    kernel = functools.partial(
        sums_kernel, tiling=tiling, inner=inner, outer=outer, num_groups=groups.num_groups,
        num_programs=num_multiprocessors(),
    )  # fmt: skip
    out = jax.ShapeDtypeStruct((groups.num_groups, inner, outer), x.dtype)
    blocks = ((tiling.depth, ROWS), (tiling.depth, tiling.columns))
    # The longest first, or one that comes last would keep a program when all others have ended.
    order = jnp.argsort(-groups.size)
    whose = order.astype(jnp.int32), groups.start[order], groups.num_blocks[order]
    return _launch(kernel, out, blocks, tiling, interpret)(*whose, x, y)


def _launch(
    kernel: Any, out: Any, blocks: tuple, tiling: Tiling, interpret: Any, num_copies: int = 2
) -> Any:
    """The kernel as a function of its inputs: one program per multiprocessor."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzled = (plgpu.TilingTransform((8, SWIZZLED)), plgpu.SwizzleTransform(128))

    def shared(*shape: int) -> Any:
        return plgpu.SMEM(shape, out.dtype, transforms=swizzled)

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(num_multiprocessors(),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            *(shared(tiling.stages, *block) for block in blocks),
            shared(2, tiling.slots, BLOCK, SWIZZLED),
            plgpu.Barrier(num_arrivals=num_copies, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=tiling.columns // SWIZZLED, num_barriers=2),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,  # exp2 and rsqrt to about float32's last two bits
        ),
        interpret=interpret,
    )  # fmt: skip
