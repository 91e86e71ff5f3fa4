"""Grouped matmuls for NVIDIA Hopper: persistent, warp-specialised Pallas kernels (Mosaic GPU).

One warpgroup loads blocks of both operands into a ring of shared memory, two multiply, each half of
the tile's rows, and the loader runs ahead into the next tile while they store the last. Groups
start at multiples of 64 rows, the rows of one warpgroup, so that none ever stores in part.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moe_jax._types import Array, Float, Int
from moe_jax.ops.grouped.groups import BLOCK, Groups

__all__ = ["Tiling", "rows_by_matrices", "rows_by_rows", "takes", "tiling_for"]

_LOADER = 2  # the third warpgroup; 0 and 1 multiply
_ROWS = 2 * BLOCK
_SWIZZLED = 64  # 16-bit numbers in a line of 128 bytes
_SLOTS = 2  # buffers in which a warpgroup stages what it stores


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work.

    Attributes:
        columns: of the result that one tile holds, beside its 128 rows.
        depth: of the contraction in one step.
        stages: steps that are loaded ahead.
        sweep: tiles along the first axis that are visited before the next column of tiles, so
            that what they share stays in the L2 cache.
    """

    columns: int = 256
    depth: int = 64
    stages: int = 4
    sweep: int = 12


def tiling_for(columns: int, depth: int | None) -> Tiling | None:
    """A tiling that divides the sizes; None where there is none.

    Args:
        columns: of the result.
        depth: of the contraction; None where it is the rows of a group, which always divide.
    """
    if depth is not None and depth % 64:
        return None
    for width in (256, 128, 64):
        if columns % width == 0:
            # Narrow tiles are short of work per byte, and have room for more steps.
            return Tiling(columns=width, stages=4 if width == 256 else 6)
    return None


def takes(x: jax.Array, w_shape: tuple[int, ...], *, any_device: bool = False) -> bool:
    """Whether all three legs of x [R, I] by w [E, I, J] can run here.

    Args:
        x: the rows.
        w_shape: (E, I, J).
        any_device: leave out the question what device this is.
    """
    _, inner, outer = w_shape
    fits = x.dtype in (jnp.bfloat16, jnp.float16) and inner % 128 == 0 and outer % 128 == 0
    return fits and (any_device or _is_hopper())


@functools.cache
def _is_hopper() -> bool:
    # Earlier Pallas has another signature for loads, and its kernels were never tried.
    if jax.default_backend() != "gpu" or jax.__version_info__ < (0, 11):
        return False
    return str(getattr(jax.devices()[0], "compute_capability", "")).startswith("9.")


@functools.cache
def _num_programs() -> int:
    """One per multiprocessor."""
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 132


def row_tiles(groups: Groups) -> tuple[Array, Array, Array, Array]:
    """Cuts the groups into tiles of up to 128 rows.

    The rows after the last group make a group of their own, E, whose result is zero.

    Returns:
        For each of the most tiles that there can be [I] int32: its group, its first row, and its
        rows (64 or 128); and [1] int32, how many there are.
    """
    num_blocks = -(-groups.size // BLOCK)
    used = jnp.sum(num_blocks)
    num_blocks = jnp.append(num_blocks, groups.block_group.shape[0] - used).astype(jnp.int32)
    start = jnp.append(groups.start, used * BLOCK).astype(jnp.int32)
    count = -(-num_blocks // 2)
    last = jnp.cumsum(count).astype(jnp.int32)
    most = groups.block_group.shape[0] // 2 + groups.num_groups + 1
    tile = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(last, tile, side="right").astype(jnp.int32)
    group = jnp.minimum(group, groups.num_groups)
    first = start[group] + (tile - (last - count)[group]) * _ROWS
    rows = jnp.clip(start[group] + num_blocks[group] * BLOCK - first, 0, _ROWS)
    is_tile = tile < last[-1]
    return group, jnp.where(is_tile, first, 0), jnp.where(is_tile, rows, 0), last[-1:]


def rows_by_matrices(
    x: Float[Array, "R I"],
    w: Float[Array, "E I J"] | Float[Array, "E J I"],
    groups: Groups,
    *,
    transpose: bool = False,
    bias: Float[Array, "E J"] | None = None,
    activation: str | None = None,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> Float[Array, "R J"]:
    """Row r of group e times w[e], or times its transpose; zero after the last group.

    Args:
        x: [R, I], 16-bit.
        w: [E, I, J], or [E, J, I] with `transpose`, of the same dtype.
        groups: of R rows.
        transpose: multiply by the transposes.
        bias: [E, J], added in float32 before anything is rounded.
        activation: "gelu_tanh", taken in float32 before anything is rounded; None for none.
        tiling: how to cut the work; None for the usual.
        interpret: parameters of Pallas's interpreter, to run without a GPU.

    Returns:
        [R, J].
    """
    outer = w.shape[1] if transpose else w.shape[2]
    tiling = tiling or tiling_for(outer, x.shape[1])
    if tiling is None:
        raise ValueError(f"w must have sizes that 64 divides, got {w.shape}")
    kernel = functools.partial(
        _rows_kernel, tiling=tiling, inner=x.shape[1], outer=outer, num_groups=groups.num_groups
    )
    kernel = functools.partial(kernel, transpose=transpose, activation=activation)
    step = (tiling.columns, tiling.depth) if transpose else (tiling.depth, tiling.columns)
    rows = x.shape[0]
    if interpret:
        # A tile of one block reads 64 rows more, which the device fills with zeros.
        x = jnp.pad(x, ((0, BLOCK), (0, 0)))
    out = jax.ShapeDtypeStruct((rows, outer), x.dtype)
    blocks = ((_ROWS, tiling.depth), step)
    # An input that the kernel has no use for costs nothing, and spares a second signature.
    is_biased = bias is not None
    bias = bias if is_biased else jnp.zeros((1, _SWIZZLED), x.dtype)
    kernel = functools.partial(kernel, is_biased=is_biased)
    return _launch(kernel, out, blocks, tiling, interpret)(*row_tiles(groups), x, w, bias)


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
    tiling = tiling or tiling_for(outer, None)
    if tiling is None or inner % _ROWS:
        raise ValueError(f"x and y must be 128 and 64 times some width, got {inner} and {outer}")
    kernel = functools.partial(
        _sums_kernel, tiling=tiling, inner=inner, outer=outer, num_groups=groups.num_groups
    )
    out = jax.ShapeDtypeStruct((groups.num_groups, inner, outer), x.dtype)
    blocks = ((tiling.depth, _ROWS), (tiling.depth, tiling.columns))
    num_blocks = -(-groups.size // BLOCK)
    return _launch(kernel, out, blocks, tiling, interpret)(groups.start, num_blocks, x, y)


def _launch(kernel: Any, out: Any, blocks: tuple, tiling: Tiling, interpret: Any) -> Any:
    """The kernel as a function of its inputs: one program per multiprocessor."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    swizzled = (plgpu.TilingTransform((8, _SWIZZLED)), plgpu.SwizzleTransform(128))

    def shared(*shape: int) -> Any:
        return plgpu.SMEM(shape, out.dtype, transforms=swizzled)

    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(_num_programs(),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            *(shared(tiling.stages, *block) for block in blocks),
            shared(2, _SLOTS, BLOCK, _SWIZZLED),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=tiling.stages),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )  # fmt: skip


def _span(index: Int[Array, ""] | int, size: int) -> Any:
    """The slice of the index-th `size` entries."""
    return pl.ds(pl.multiple_of(index * size, size), size)


def _rows_kernel(
    group_ref, start_ref, rows_ref, num_ref, x_ref, w_ref, bias_ref, out_ref,
    x_shared, w_shared, staged, loaded, consumed,
    *, tiling, inner, outer, num_groups, transpose, is_biased, activation,
):  # fmt: skip
    from jax.experimental.pallas import mosaic_gpu as plgpu

    columns, depth = tiling.columns, tiling.depth
    num_row_tiles = num_ref[0]
    shape = (num_row_tiles, outer // columns)

    def tile(linear):
        return plgpu.planar_snake(linear, shape, 0, tiling.sweep)

    def num_steps(row_tile):
        return jnp.where(group_ref[row_tile] < num_groups, inner // depth, 0)

    def load(linear, step, ring):
        row_tile, column = tile(linear)
        group, start = group_ref[row_tile], pl.multiple_of(start_ref[row_tile], BLOCK)
        along = _span(step, depth)
        across = _span(column, columns)
        plgpu.copy_gmem_to_smem(
            x_ref.at[pl.ds(start, _ROWS), along], x_shared.at[ring], loaded.at[ring]
        )
        at = (group, across, along) if transpose else (group, along, across)
        plgpu.copy_gmem_to_smem(w_ref.at[at], w_shared.at[ring], loaded.at[ring])

    def multiply(acc, ring, half):
        right = w_shared.at[ring]
        right = right.transpose((1, 0)) if transpose else right
        plgpu.wgmma(acc, x_shared.at[ring, _span(half, BLOCK)], right)

    def store(linear, acc, half):
        row_tile, column = tile(linear)
        first = start_ref[row_tile] + half * BLOCK

        def to(i):
            at = column * columns + i * _SWIZZLED
            return out_ref.at[
                pl.ds(pl.multiple_of(first, BLOCK), BLOCK),
                pl.ds(pl.multiple_of(at, _SWIZZLED), _SWIZZLED),
            ]

        def finish(i, part):
            if is_biased:
                group = jnp.minimum(group_ref[row_tile], num_groups - 1)
                at = pl.multiple_of(column * columns + i * _SWIZZLED, _SWIZZLED)
                # Every thread loads the few columns that it holds.
                own = plgpu.load(bias_ref.at[group, pl.ds(at, _SWIZZLED)], optimized=False)
                own = own.astype(jnp.float32)
                part = part + lax.broadcast_in_dim(own, part.shape, (1,))
            return _gelu_tanh(part) if activation else part

        @pl.when(rows_ref[row_tile] > half * BLOCK)
        def _():
            _store(acc, staged, to, half, finish)

    _work(
        shape[0] * shape[1],
        lambda linear: num_steps(tile(linear)[0]),
        load, multiply, store, tiling, loaded, consumed,
    )  # fmt: skip


def _sums_kernel(
    start_ref, blocks_ref, x_ref, y_ref, out_ref,
    x_shared, y_shared, staged, loaded, consumed,
    *, tiling, inner, outer, num_groups,
):  # fmt: skip
    from jax.experimental.pallas import mosaic_gpu as plgpu

    columns, depth = tiling.columns, tiling.depth
    shape = (inner // _ROWS, outer // columns)
    num_tiles = shape[0] * shape[1]

    def tile(linear):
        within = lax.rem(linear, jnp.int32(num_tiles))
        row, column = plgpu.planar_snake(within, shape, 0, tiling.sweep)
        return lax.div(linear, jnp.int32(num_tiles)), row, column

    def load(linear, step, ring):
        group, row, column = tile(linear)
        start = pl.multiple_of(start_ref[group], BLOCK)
        rows = pl.ds(pl.multiple_of(start + step * depth, BLOCK), depth)
        plgpu.copy_gmem_to_smem(
            x_ref.at[rows, _span(row, _ROWS)], x_shared.at[ring], loaded.at[ring]
        )
        plgpu.copy_gmem_to_smem(
            y_ref.at[rows, _span(column, columns)], y_shared.at[ring], loaded.at[ring]
        )

    def multiply(acc, ring, half):
        left = x_shared.at[ring, :, _span(half, BLOCK)].transpose((1, 0))
        plgpu.wgmma(acc, left, y_shared.at[ring])

    def store(linear, acc, half):
        group, row, column = tile(linear)

        def to(i):
            at = column * columns + i * _SWIZZLED
            return out_ref.at[
                group,
                _span(row * 2 + half, BLOCK),
                pl.ds(pl.multiple_of(at, _SWIZZLED), _SWIZZLED),
            ]

        _store(acc, staged, to, half)

    _work(
        num_groups * num_tiles,
        lambda linear: blocks_ref[tile(linear)[0]],
        load, multiply, store, tiling, loaded, consumed,
    )  # fmt: skip


def _work(num_tiles, num_steps, load, multiply, store, tiling, loaded, consumed):
    """Runs all tiles: loader and multipliers meet at the ring's barriers, step after step.

    Args:
        num_tiles: of all programs together; program p takes tiles p, p + programs, and so on.
        num_steps: tile -> steps of its contraction, which may be none.
        load: (tile, step, place in the ring), starts both copies.
        multiply: (accumulator, place in the ring, half), starts one product.
        store: (tile, result, half).
        tiling: for the columns of the accumulator and the length of the ring.
        loaded: barriers, one per place, on which both copies arrive.
        consumed: barriers, one per place, on which both multipliers arrive.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    warpgroup = lax.axis_index("warpgroup")
    stages = tiling.stages

    @pl.when(warpgroup == _LOADER)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @plgpu.nd_loop((num_tiles,), collective_axes="program", init_carry=jnp.int32(0))
        def _(tile, carry):
            def one(step, done):
                ring = lax.rem(done, jnp.int32(stages))

                @pl.when(done >= stages)
                def _():
                    plgpu.barrier_wait(consumed.at[ring])

                load(tile.index[0], step, ring)
                return done + 1

            return lax.fori_loop(0, num_steps(tile.index[0]), one, carry)

    @pl.when(warpgroup != _LOADER)
    def _():
        plgpu.set_max_registers(232, action="increase")

        @plgpu.nd_loop((num_tiles,), collective_axes="program", init_carry=jnp.int32(0))
        def _(tile, carry):
            steps = num_steps(tile.index[0])

            def contract(acc):
                def one(step, done):
                    ring = lax.rem(done, jnp.int32(stages))
                    plgpu.barrier_wait(loaded.at[ring])
                    multiply(acc, ring, warpgroup)
                    # The product before this one has ended, and this one runs on.
                    plgpu.wgmma_wait(1)

                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(consumed.at[lax.rem(done - 1, jnp.int32(stages))])

                    return done + 1

                done = lax.fori_loop(0, steps, one, carry)
                plgpu.wgmma_wait(0)

                @pl.when(steps > 0)
                def _():
                    plgpu.barrier_arrive(consumed.at[lax.rem(done - 1, jnp.int32(stages))])

                return acc[...], done

            acc, done = pl.run_scoped(contract, plgpu.ACC((BLOCK, tiling.columns)))
            store(tile.index[0], acc, warpgroup)
            return done

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _gelu_tanh(x):
    """The tanh form of GELU."""
    return 0.5 * x * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _store(acc, staged, to, half, finish=lambda i, part: part):
    """Stores [64, columns] through shared memory, 64 columns at a time, two of them under way."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for i in range(acc.shape[1] // _SWIZZLED):
        slot = i % _SLOTS
        plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
        part = acc[:, i * _SWIZZLED : (i + 1) * _SWIZZLED]
        staged[half, slot] = finish(i, part).astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged.at[half, slot], to(i))
