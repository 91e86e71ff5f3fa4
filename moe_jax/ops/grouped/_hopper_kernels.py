"""The programs of `_hopper`: what loads, what multiplies, and how they meet."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moe_jax._types import Array, Int
from moe_jax.ops.activations import gelu_tanh, sigmoid
from moe_jax.ops.grouped.groups import BLOCK

__all__ = ["ROWS", "SWIZZLED", "rows_kernel", "sums_kernel"]

ROWS = 2 * BLOCK
"""Rows of a tile, half of them for each multiplying warpgroup."""

SWIZZLED = 64
"""16-bit numbers in a line of 128 bytes, the unit in which shared memory is laid out."""

_LOADER = 2  # the third warpgroup; 0 and 1 multiply


def _span(index: Int[Array, ""] | int, size: int) -> Any:
    """The slice of the index-th `size` entries."""
    return pl.ds(pl.multiple_of(index * size, size), size)


def _there_and_back(tile: Int[Array, ""], num_tiles: int, num_programs: int) -> Int[Array, ""]:
    """Reverses every other round, so that no program has the first and longest tile of each."""
    turn, program = (f(tile, jnp.int32(num_programs)) for f in (lax.div, lax.rem))
    is_back = (lax.rem(turn, jnp.int32(2)) == 1) & ((turn + 1) * num_programs <= num_tiles)
    return jnp.where(is_back, tile + num_programs - 1 - 2 * program, tile)


def _line(column: Int[Array, ""], columns: int, i: int) -> Any:
    """The i-th 64 columns of a tile."""
    return _span(column * (columns // SWIZZLED) + i, SWIZZLED)


def rows_kernel(
    group_ref, start_ref, rows_ref, ends_ref, x_ref, w_ref, bias_ref, residual_ref, out_ref,
    x_shared, w_shared, staged, loaded, consumed, fetched,
    *, tiling, inner, outer, transpose, is_biased, has_residual, activation,
):  # fmt: skip
    """The tiles of `_hopper.row_tiles` times their groups' matrices; see `rows_by_matrices`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # A tile of a gated result multiplies by its gates' columns and by those of what they gate.
    is_gated = activation == "swiglu"
    parts, depth = 1 + is_gated, tiling.depth
    columns = tiling.columns // parts
    num_lines = columns // SWIZZLED
    num_row_tiles = ends_ref[ends_ref.shape[0] - 1]
    shape = (num_row_tiles, outer // columns)

    def locate(tile):
        row_tile, column = plgpu.planar_snake(tile, shape, 0, tiling.sweep)
        group, start = group_ref[row_tile], pl.multiple_of(start_ref[row_tile], BLOCK)
        return inner // depth, (group, start, rows_ref[row_tile], column)

    def load(place, step, ring):
        group, start, _, column = place
        along = _span(step, depth)
        plgpu.copy_gmem_to_smem(
            x_ref.at[pl.ds(start, ROWS), along], x_shared.at[ring], loaded.at[ring]
        )
        for i in range(parts):
            across = _span(i * (outer // columns) + column, columns)
            at = (group, across, along) if transpose else (group, along, across)
            plgpu.copy_gmem_to_smem(w_ref.at[at], w_shared.at[ring, i], loaded.at[ring])

    def multiply(accs, ring, half):
        for i, acc in enumerate(accs):
            right = w_shared.at[ring, i]
            right = right.transpose((1, 0)) if transpose else right
            plgpu.wgmma(acc, x_shared.at[ring, _span(half, BLOCK)], right)

    def prepare(place):
        # Long before it is added, or the wait for it would end each tile.
        if not is_biased:
            return ()
        group, _, _, column = place
        # Every thread loads the few columns that it holds.
        lines = (bias_ref.at[group, _line(column, columns, i)] for i in range(num_lines))
        return tuple(plgpu.load(line, optimized=False) for line in lines)

    def at(place, half, i):
        _, start, _, column = place
        rows = pl.ds(pl.multiple_of(start + half * BLOCK, BLOCK), BLOCK)
        return rows, _line(column, columns, i)

    def fetch(place, half):
        # To where the sum is staged, once what was staged there for the last tile has left.
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i in range(num_lines):
            plgpu.copy_gmem_to_smem(
                residual_ref.at[at(place, half, i)], staged.at[half, i], fetched.at[half]
            )

    def store(place, bias, accs, half):
        def part(i):
            part = _columns(accs[0], i)
            if is_gated:
                return part * sigmoid(part) * _columns(accs[1], i)
            if is_biased:
                part = part + lax.broadcast_in_dim(bias[i].astype(jnp.float32), part.shape, (1,))
            part = gelu_tanh(part) if activation else part
            return part + staged[half, i].astype(jnp.float32) if has_residual else part

        if has_residual:
            plgpu.barrier_wait(fetched.at[half])
        _store(num_lines, part, staged, lambda i: out_ref.at[at(place, half, i)], half)

    job = _Job(
        num_tiles=shape[0] * shape[1], widths=(columns,) * parts, locate=locate, load=load,
        multiply=multiply, store=store, prepare=prepare,
        is_idle=lambda place, half: place[2] <= half * BLOCK, fetch=fetch if has_residual else None,
    )  # fmt: skip
    _work(job, tiling.stages, loaded, consumed)


def sums_kernel(
    group_ref, start_ref, blocks_ref, x_ref, y_ref, out_ref,
    x_shared, y_shared, staged, loaded, consumed, fetched,
    *, tiling, inner, outer, num_groups, num_programs,
):  # fmt: skip
    """Each group's left rows, transposed, times its right ones; see `rows_by_rows`."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    del fetched
    columns, depth = tiling.columns, tiling.depth
    shape = (inner // ROWS, outer // columns)
    num_tiles = shape[0] * shape[1]

    def locate(tile):
        tile = _there_and_back(tile, num_groups * num_tiles, num_programs)
        within = lax.rem(tile, jnp.int32(num_tiles))
        row, column = plgpu.planar_snake(within, shape, 0, tiling.sweep)
        i = lax.div(tile, jnp.int32(num_tiles))
        return blocks_ref[i], (group_ref[i], start_ref[i], row, column)

    def load(place, step, ring):
        _, start, row, column = place
        rows = pl.ds(pl.multiple_of(start + step * depth, BLOCK), depth)
        plgpu.copy_gmem_to_smem(
            x_ref.at[rows, _span(row, ROWS)], x_shared.at[ring], loaded.at[ring]
        )
        plgpu.copy_gmem_to_smem(
            y_ref.at[rows, _span(column, columns)], y_shared.at[ring], loaded.at[ring]
        )

    def multiply(accs, ring, half):
        left = x_shared.at[ring, :, _span(half, BLOCK)].transpose((1, 0))
        plgpu.wgmma(accs[0], left, y_shared.at[ring])

    def store(place, _, accs, half):
        group, _, row, column = place

        def to(i):
            return out_ref.at[group, _span(row * 2 + half, BLOCK), _line(column, columns, i)]

        _store(columns // SWIZZLED, lambda i: _columns(accs[0], i), staged, to, half)

    job = _Job(
        num_tiles=num_groups * num_tiles, widths=(columns,), locate=locate, load=load,
        multiply=multiply, store=store,
    )  # fmt: skip
    _work(job, tiling.stages, loaded, consumed)


class _Job(NamedTuple):
    """What a kernel does with its tiles.

    Attributes:
        num_tiles: of all programs together; program p takes tiles p, p + programs, and so on.
        widths: columns of each accumulator.
        locate: tile -> steps of its contraction, which may be none, and its place, read once.
        load: (place, step, slot of the ring), starts the copies.
        multiply: (accumulators, slot of the ring, half), starts a product for each.
        store: (place, what was prepared, results, half).
        prepare: place -> what storing will need, asked for before the products.
        fetch: (place, half), asks for more of it while the products run, of which there must be
            some; None for no more.
        is_idle: (place, half) -> whether that half has nothing to multiply and store; None for
            never.
    """

    num_tiles: Any
    widths: tuple[int, ...]
    locate: Callable
    load: Callable
    multiply: Callable
    store: Callable
    prepare: Callable = lambda place: ()
    fetch: Callable | None = None
    is_idle: Callable | None = None


def _work(job, stages, loaded, consumed):
    """Runs all tiles: loader and multipliers meet at the ring's barriers, step after step.

    Args:
        job: what to do.
        stages: length of the ring.
        loaded: barriers, one per slot, on which the copies arrive.
        consumed: barriers, one per slot, on which both multipliers arrive.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _LOADER)
    def _():
        plgpu.set_max_registers(40, action="decrease")

        @plgpu.nd_loop((job.num_tiles,), collective_axes="program", init_carry=jnp.int32(0))
        def _(tile, carry):
            num_steps, place = job.locate(tile.index[0])

            def one(step, done):
                ring = lax.rem(done, jnp.int32(stages))

                @pl.when(done >= stages)
                def _():
                    plgpu.barrier_wait(consumed.at[ring])

                job.load(place, step, ring)
                return done + 1

            return lax.fori_loop(0, num_steps, one, carry)

    @pl.when(warpgroup != _LOADER)
    def _():
        plgpu.set_max_registers(232, action="increase")

        @plgpu.nd_loop((job.num_tiles,), collective_axes="program", init_carry=jnp.int32(0))
        def _(tile, carry):
            num_steps, place = job.locate(tile.index[0])
            last = carry + num_steps

            def release(done):
                plgpu.barrier_arrive(consumed.at[lax.rem(done, jnp.int32(stages))])

            def contract(*accs):
                @pl.loop(carry, last)
                def _(done):
                    ring = lax.rem(done, jnp.int32(stages))
                    plgpu.barrier_wait(loaded.at[ring])
                    job.multiply(accs, ring, warpgroup)
                    # The products of the step before have ended, and this one's run on.
                    plgpu.wgmma_wait(len(accs))
                    pl.when(done > carry)(lambda: release(done - 1))
                    if job.fetch:
                        is_middle = done == carry + num_steps // 2
                        pl.when(is_middle)(lambda: job.fetch(place, warpgroup))

                plgpu.wgmma_wait(0)
                pl.when(num_steps > 0)(lambda: release(last - 1))
                return tuple(acc[...] for acc in accs)

            def compute():
                prepared = job.prepare(place)
                results = pl.run_scoped(contract, *(plgpu.ACC((BLOCK, n)) for n in job.widths))
                job.store(place, prepared, results, warpgroup)

            def skip():
                @pl.loop(carry, last)
                def _(done):
                    plgpu.barrier_wait(loaded.at[lax.rem(done, jnp.int32(stages))])
                    release(done)

            if job.is_idle is None:
                compute()
            else:
                lax.cond(job.is_idle(place, warpgroup), skip, compute)
            return last

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _columns(acc, i):
    """The i-th 64 columns."""
    return acc[:, i * SWIZZLED : (i + 1) * SWIZZLED]


def _store(count, part, staged, to, half):
    """Stores `count` parts of [64, 64] through shared memory, as many under way as have room."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    slots = staged.shape[1]
    at_once = slots // 2  # while the other half is on its way
    for first in range(0, count, at_once):
        chunk = range(first, min(first + at_once, count))
        plgpu.wait_smem_to_gmem(slots - at_once, wait_read_only=True)
        for i in chunk:
            staged[half, i % slots] = part(i).astype(staged.dtype)
        plgpu.commit_smem()
        for i in chunk:
            plgpu.copy_smem_to_gmem(staged.at[half, i % slots], to(i))
