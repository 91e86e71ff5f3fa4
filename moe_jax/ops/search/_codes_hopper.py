"""Bounds over chunks for many queries on NVIDIA Hopper: a persistent Pallas kernel (Mosaic GPU).

A program keeps 128 queries in shared memory and goes through tiles of 128 rows. One warpgroup loads
them into a ring, two multiply, 64 queries each, and reduce the products in their registers: of a
tile each stores eight numbers a query. It computes what `chunk_bounds_kernel` does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops._hardware import is_hopper, num_multiprocessors
from moe_jax.ops.search._codes_kernels import CHUNK, TILE, longest_code
from moe_jax.ops.search.code import Code

__all__ = ["QUERIES", "chunk_bounds", "takes"]

QUERIES = 128
"""That one program multiplies; their number is a multiple of it."""

_HALF = QUERIES // 2  # of the queries, for each multiplying warpgroup
_WIDE = 128  # coordinates of a step: a line of shared memory
_MAX_STEPS = 6  # so that the ring holds a whole tile beside the queries
_SHARED = 216 * 1024  # bytes for queries and ring, of 227 KiB
_ALIGNED = 8  # rows between those that a copy may start from
_DESCRIBED = 4  # tiles whose rows' scales are loaded ahead
_CHUNKS = TILE // CHUNK
_LOADER = 2  # the third warpgroup; 0 and 1 multiply


def takes(num_queries: int, num_rows: int, dim: int) -> bool:
    """Whether the kernel runs here, for such sizes."""
    fits = num_queries % QUERIES == 0 and dim % _WIDE == 0 and dim <= _MAX_STEPS * _WIDE
    fits = fits and num_rows % _ALIGNED == 0
    # Earlier Pallas has another signature for loads, and its kernels were never tried.
    return fits and jax.__version_info__ >= (0, 11) and is_hopper()


def chunk_bounds(
    code: Int[Array, "P D"],
    scale: Float[Array, "P"],
    table: Code,
    is_candidate: Bool[Array, "N"],
    *,
    with_tiles: bool,
    is_certain: bool,
    interpret: Any = None,
) -> tuple[Float[Array, "P C"], ...]:
    """Upper bounds on the cosine, but for the query's own error, over each chunk, and each tile.

    Args:
        code: of queries; 128 divides P.
        scale: of queries.
        table: codes of N rows.
        is_candidate: the rows that count; 8 divides N.
        with_tiles: whether to give the largest of each tile, too.
        is_certain: bounds; if not, the largest estimates.
        interpret: parameters of Pallas's interpreter, to run without a GPU.

    Returns:
        Minus infinity where no row counts.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (num_queries, dim), num_rows = code.shape, is_candidate.shape[0]
    num_tiles, steps, blocks = -(-num_rows // TILE), dim // _WIDE, num_queries // QUERIES
    stages = min(8, _SHARED // (TILE * _WIDE) - steps)
    num_programs = _programs(blocks, num_tiles)
    swizzled = (plgpu.TilingTransform((8, _WIDE)), plgpu.SwizzleTransform(128))

    def codes(*shape: int) -> Any:
        return plgpu.SMEM((*shape, _WIDE), jnp.int8, transforms=swizzled)

    outputs = [jax.ShapeDtypeStruct((num_queries, num_tiles * _CHUNKS), jnp.float32)]
    if with_tiles:
        outputs.append(jax.ShapeDtypeStruct((num_tiles, num_queries), jnp.float32))
    kernel = functools.partial(
        _kernel, num_rows=num_rows, num_programs=num_programs, with_tiles=with_tiles,
        is_certain=is_certain,
    )  # fmt: skip
    found = plgpu.kernel(
        kernel,
        out_type=tuple(outputs),
        grid=(num_programs, blocks),
        grid_names=("program", "block"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            codes(steps, QUERIES),
            codes(stages, TILE),
            plgpu.SMEM((_DESCRIBED, 2, TILE), jnp.float32),
            plgpu.SMEM((2, _HALF, _CHUNKS), jnp.float32),
            plgpu.SMEM((2, _HALF), jnp.float32),
            plgpu.Barrier(num_arrivals=steps),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=_DESCRIBED),
            plgpu.Barrier(num_arrivals=2, num_barriers=_DESCRIBED),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=interpret,
    )(code, scale, table.code, _of_rows(table, is_candidate, is_certain))
    return (found[0], found[1].T) if with_tiles else (found[0],)


def _programs(blocks: int, num_tiles: int) -> int:
    """How many programs share each block of queries, so that all multiprocessors end together."""
    most = num_multiprocessors()

    def tiles_in_a_row(count: int) -> int:
        return -(-blocks * count // most) * (-(-num_tiles // count) + 1)  # one to get going

    return min(range(1, min(num_tiles, most) + 1), key=tiles_in_a_row)


def _of_rows(table: Code, is_candidate: Bool[Array, "N"], is_certain: bool) -> Float[Array, "2 R"]:
    """By places of tiles, each row's scale and what to add, its error or minus infinity."""
    num_rows = is_candidate.shape[0]
    before = (-(-num_rows // TILE) - 1) * TILE
    added = jnp.where(is_candidate, table.error if is_certain else 0.0, -jnp.inf)
    rows = jnp.stack([table.scale, added])
    # The last tile starts early, so that it is whole. What the one before has does not count again.
    is_again = jnp.arange(num_rows - TILE, num_rows) < before
    is_out = jnp.stack([jnp.zeros(TILE, bool), is_again])
    last = jnp.where(is_out, -jnp.inf, rows[:, -TILE:])
    return jnp.concatenate([rows[:, :before], last], axis=1)


def _kernel(
    code_ref, scale_ref, table_ref, about_ref, *refs,
    num_rows, num_programs, with_tiles, is_certain,
):  # fmt: skip
    from jax.experimental.pallas import mosaic_gpu as plgpu

    out_ref, *tiles_ref = refs[: 1 + with_tiles]
    queries, ring, about, staged, staged_top, asked, loaded, consumed, told, heard = refs[
        1 + with_tiles :
    ]
    steps, stages = queries.shape[0], ring.shape[0]
    warpgroup = lax.axis_index("warpgroup")
    program, block = lax.axis_index("program"), lax.axis_index("block")
    num_tiles = -(-num_rows // TILE)
    turns = lax.div(num_tiles - program + num_programs - 1, num_programs)

    @pl.when(warpgroup == _LOADER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        for i in range(steps):
            at = _span(block, QUERIES), pl.ds(i * _WIDE, _WIDE)
            plgpu.copy_gmem_to_smem(code_ref.at[at], queries.at[i], asked)

        def load(turn, done):
            tile, place = program + turn * num_programs, lax.rem(turn, jnp.int32(_DESCRIBED))
            pl.when(turn >= _DESCRIBED)(lambda: plgpu.barrier_wait(heard.at[place]))
            plgpu.copy_gmem_to_smem(
                about_ref.at[:, _span(tile, TILE)], about.at[place], told.at[place]
            )
            first = jnp.minimum(tile * TILE, num_rows - TILE)
            rows = pl.ds(pl.multiple_of(first, _ALIGNED), TILE)
            for i in range(steps):
                slot = lax.rem(done + i, jnp.int32(stages))
                pl.when(done + i >= stages)(lambda slot=slot: plgpu.barrier_wait(consumed.at[slot]))
                plgpu.copy_gmem_to_smem(
                    table_ref.at[rows, pl.ds(i * _WIDE, _WIDE)], ring.at[slot], loaded.at[slot]
                )
            return done + steps

        lax.fori_loop(0, turns, load, jnp.int32(0))

    @pl.when(warpgroup != _LOADER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        half, own = _span(warpgroup, _HALF), _span(block * 2 + warpgroup, _HALF)
        # 0, of no direction, would make a nothing of minus infinity.
        scale = jnp.maximum(plgpu.load(scale_ref.at[own], optimized=False), 1e-30)
        # The scale comes last, so a row's error counts by what it then is of the longest code.
        ratio = longest_code(scale, steps * _WIDE) / scale if is_certain else None
        plgpu.barrier_wait(asked)

        def multiply(turn, done):
            slots = [lax.rem(done + i, jnp.int32(stages)) for i in range(steps)]

            def contract(acc):
                for i, slot in enumerate(slots):
                    plgpu.barrier_wait(loaded.at[slot])
                    plgpu.wgmma(acc, queries.at[i, half], ring.at[slot].transpose((1, 0)))
                for i, slot in enumerate(slots):
                    plgpu.wgmma_wait(steps - 1 - i)
                    plgpu.barrier_arrive(consumed.at[slot])
                return acc[...]

            product = pl.run_scoped(contract, plgpu.ACC((_HALF, TILE), jnp.int32))
            place = lax.rem(turn, jnp.int32(_DESCRIBED))
            plgpu.barrier_wait(told.at[place])
            bound = _bounds(product, about[place, 0], about[place, 1], ratio)
            plgpu.barrier_arrive(heard.at[place])
            best = _largest(bound, scale)
            tile = program + turn * num_programs
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged for the tile before
            staged[warpgroup] = best
            if with_tiles:
                staged_top[warpgroup] = jnp.max(best, axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged.at[warpgroup], out_ref.at[own, _span(tile, _CHUNKS)])
            for ref in tiles_ref:
                plgpu.copy_smem_to_gmem(staged_top.at[warpgroup], ref.at[tile, own])
            return done + steps

        lax.fori_loop(0, turns, multiply, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _span(index: Array, size: int) -> Any:
    """The slice of the index-th `size` entries."""
    return pl.ds(pl.multiple_of(index * size, size), size)


def _bounds(product: Array, scale: Array, added: Array, ratio: Array | None) -> Array:
    """[_HALF, TILE] of every row; without `ratio` estimates."""
    shape = product.shape
    added = lax.broadcast_in_dim(added, shape, (1,))
    if ratio is not None:
        added = added * lax.broadcast_in_dim(ratio, shape, (0,))
    return product.astype(jnp.float32) * lax.broadcast_in_dim(scale, shape, (1,)) + added


def _largest(bound: Array, scale: Array) -> Array:
    """[_HALF, _CHUNKS] of every chunk, times the query's scale."""
    shape = _HALF, _CHUNKS
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    best = jnp.full(shape, -jnp.inf, jnp.float32)
    for i in range(_CHUNKS):
        top = jnp.max(bound[:, i * CHUNK : (i + 1) * CHUNK], axis=1)
        best = jnp.where(column == i, lax.broadcast_in_dim(top, shape, (0,)), best)
    return best * lax.broadcast_in_dim(scale, shape, (0,))
