"""Bounds over chunks for many queries on NVIDIA Hopper: a persistent Pallas kernel (Mosaic GPU).

A program keeps 128 queries in shared memory and goes through tiles of 128 rows. One warpgroup loads
them into a ring, two multiply, 64 queries each, and reduce the products in their registers: of a
tile each stores eight numbers a query. It computes what `chunk_bounds_kernel` does.
"""

import functools
from typing import Any, NamedTuple

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
    num_tiles, blocks = -(-num_rows // TILE), num_queries // QUERIES
    num_programs = _programs(blocks, num_tiles)
    outputs = [jax.ShapeDtypeStruct((num_queries, num_tiles * _CHUNKS), jnp.float32)]
    if with_tiles:
        outputs.append(jax.ShapeDtypeStruct((num_tiles, num_queries), jnp.float32))
    found = plgpu.kernel(
        functools.partial(
            _kernel, with_tiles=with_tiles, job=_Job(num_rows, num_programs, is_certain)
        ),
        out_type=tuple(outputs),
        grid=(num_programs, blocks),
        grid_names=("program", "block"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=_scratch(dim // _WIDE),
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


class _Job(NamedTuple):
    """What a program is to do.

    Attributes:
        num_rows: N.
        num_programs: of each block of queries; program p takes tiles p, p + programs, and so on.
        is_certain: as in `chunk_bounds`.
    """

    num_rows: int
    num_programs: int
    is_certain: bool

    def turns(self) -> Array:
        """How many tiles this program takes."""
        num_tiles = -(-self.num_rows // TILE)
        rest = num_tiles - lax.axis_index("program") + self.num_programs - 1
        return lax.div(rest, self.num_programs)

    def tile(self, turn: Array) -> Array:
        """Which one comes in its turn."""
        return lax.axis_index("program") + turn * self.num_programs


class _Shared(NamedTuple):
    """Shared memory and the barriers of what comes and goes there.

    Attributes:
        queries: codes of the queries, by steps of 128 coordinates.
        ring: codes of rows, a step of a tile in each slot.
        about: what `_of_rows` says of a few tiles.
        staged: what each warpgroup stores of a tile's chunks.
        staged_top: and of the tile.
        asked: on which the queries arrive.
        loaded: on which each slot of the ring arrives.
        consumed: on which both warpgroups are through with a slot.
        told: as `loaded`, of `about`.
        heard: as `consumed`, of `about`.
    """

    queries: Any
    ring: Any
    about: Any
    staged: Any
    staged_top: Any
    asked: Any
    loaded: Any
    consumed: Any
    told: Any
    heard: Any


def _scratch(steps: int) -> _Shared:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def codes(*shape: int) -> Any:
        swizzled = (plgpu.TilingTransform((8, _WIDE)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM((*shape, _WIDE), jnp.int8, transforms=swizzled)

    def floats(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.float32)

    def barriers(num_arrivals: int, count: int = 1) -> Any:
        return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=count)

    stages = min(8, _SHARED // (TILE * _WIDE) - steps)
    return _Shared(
        queries=codes(steps, QUERIES), ring=codes(stages, TILE),
        about=floats(_DESCRIBED, 2, TILE), staged=floats(2, _HALF, _CHUNKS),
        staged_top=floats(2, _HALF), asked=barriers(steps), loaded=barriers(1, stages),
        consumed=barriers(2, stages), told=barriers(1, _DESCRIBED), heard=barriers(2, _DESCRIBED),
    )  # fmt: skip


def _kernel(code_ref, scale_ref, table_ref, about_ref, *refs, with_tiles, job):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    out_refs, shared = refs[: 1 + with_tiles], _Shared(*refs[1 + with_tiles :])
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == _LOADER)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        _load(job, shared, code_ref, table_ref, about_ref)

    @pl.when(warpgroup != _LOADER)
    def _():
        plgpu.set_max_registers(232, action="increase")
        _multiply(job, shared, warpgroup, scale_ref, *out_refs)


def _load(job, shared, code_ref, table_ref, about_ref):
    """The queries once, and tile after tile as far ahead as there is room."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    steps, stages = shared.queries.shape[0], shared.ring.shape[0]
    for i in range(steps):
        at = _span(lax.axis_index("block"), QUERIES), pl.ds(i * _WIDE, _WIDE)
        plgpu.copy_gmem_to_smem(code_ref.at[at], shared.queries.at[i], shared.asked)

    def one(turn, done):
        tile, place = job.tile(turn), lax.rem(turn, jnp.int32(_DESCRIBED))
        pl.when(turn >= _DESCRIBED)(lambda: plgpu.barrier_wait(shared.heard.at[place]))
        plgpu.copy_gmem_to_smem(
            about_ref.at[:, _span(tile, TILE)], shared.about.at[place], shared.told.at[place]
        )
        first = jnp.minimum(tile * TILE, job.num_rows - TILE)
        rows = pl.ds(pl.multiple_of(first, _ALIGNED), TILE)
        for i in range(steps):
            at = lax.rem(done + i, jnp.int32(stages))
            pl.when(done + i >= stages)(lambda at=at: plgpu.barrier_wait(shared.consumed.at[at]))
            part = table_ref.at[rows, pl.ds(i * _WIDE, _WIDE)]
            plgpu.copy_gmem_to_smem(part, shared.ring.at[at], shared.loaded.at[at])
        return done + steps

    lax.fori_loop(0, job.turns(), one, jnp.int32(0))


def _multiply(job, shared, warpgroup, scale_ref, out_ref, tiles_ref=None):
    """The products of half of the queries with each tile, and what is stored of them."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    steps, stages = shared.queries.shape[0], shared.ring.shape[0]
    half, own = _span(warpgroup, _HALF), _span(lax.axis_index("block") * 2 + warpgroup, _HALF)
    # 0, of no direction, would make a nothing of minus infinity.
    scale = jnp.maximum(plgpu.load(scale_ref.at[own], optimized=False), 1e-30)
    # The scale comes last, so a row's error counts by what it then is of the longest code.
    ratio = longest_code(scale, steps * _WIDE) / scale if job.is_certain else None
    plgpu.barrier_wait(shared.asked)

    def one(turn, done):
        slots = [lax.rem(done + i, jnp.int32(stages)) for i in range(steps)]

        def contract(acc):
            for i, at in enumerate(slots):
                plgpu.barrier_wait(shared.loaded.at[at])
                rows = shared.ring.at[at].transpose((1, 0))
                plgpu.wgmma(acc, shared.queries.at[i, half], rows)
            for i, at in enumerate(slots):
                plgpu.wgmma_wait(steps - 1 - i)
                plgpu.barrier_arrive(shared.consumed.at[at])
            return acc[...]

        product = pl.run_scoped(contract, plgpu.ACC((_HALF, TILE), jnp.int32))
        place = lax.rem(turn, jnp.int32(_DESCRIBED))
        plgpu.barrier_wait(shared.told.at[place])
        bound = _bounds(product, shared.about[place, 0], shared.about[place, 1], ratio)
        plgpu.barrier_arrive(shared.heard.at[place])
        best = _largest(bound, scale)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # what was staged for the tile before
        shared.staged[warpgroup] = best
        if tiles_ref is not None:
            shared.staged_top[warpgroup] = jnp.max(best, axis=1)
        plgpu.commit_smem()
        at = out_ref.at[own, _span(job.tile(turn), _CHUNKS)]
        plgpu.copy_smem_to_gmem(shared.staged.at[warpgroup], at)
        if tiles_ref is not None:
            at = tiles_ref.at[job.tile(turn), own]
            plgpu.copy_smem_to_gmem(shared.staged_top.at[warpgroup], at)
        return done + steps

    lax.fori_loop(0, job.turns(), one, jnp.int32(0))
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
