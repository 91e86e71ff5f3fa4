"""The bounds of codes for many queries, which Hopper has a kernel of its own for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import encode, nearest, normalize
from moe_jax.ops.search import _codes_gpu, _codes_hopper

needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the interpreter of this jax cannot read it"
)


def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def operands(num_queries, num_rows, dim):
    """Queries, one without a direction; keys, some with one large coordinate; a mask with a gap."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(num_queries, dim)).astype(np.float32)
    queries[3] = 0
    keys = rng.normal(size=(num_rows, dim)).astype(np.float32)
    keys[::7, 5] += 8
    mask = rng.random(num_rows) < 0.7
    mask[150:290] = False
    return jnp.asarray(queries), encode(normalize(keys)), jnp.asarray(mask)


def assert_same(ours, theirs, is_certain):
    """Estimates to the bit; bounds of rows are at most the sum of a chunk's largest parts."""
    for got, want in zip(ours, theirs, strict=True):
        got, want = np.asarray(got), np.asarray(want)
        if not is_certain:
            np.testing.assert_array_equal(got, want)
            continue
        is_bound = np.isfinite(want)
        np.testing.assert_array_equal(np.isfinite(got), is_bound)
        assert np.all(got[is_bound] <= want[is_bound] + 1e-6)
        assert np.max(want[is_bound] - got[is_bound]) < 0.05


@needs_interpreter
@pytest.mark.parametrize("is_certain", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_rows", "dim", "programs"),
    [(128, 704, 256, 3), (256, 408, 128, 3), (128, 128, 384, 3), (128, 1496, 128, 1)],
)
def test_as_the_other_kernel_interpreted(
    monkeypatch, num_queries, num_rows, dim, programs, is_certain
):
    """The kernel's own code, every warpgroup, barrier and copy of it, run by an interpreter.

    In the last case the loader goes round its ring.
    """
    if programs == 1 and jax.__version_info__ < (0, 12):
        pytest.skip("the interpreter of this jax wants the last arrivals to be waited for, too")
    monkeypatch.setattr(_codes_hopper, "num_multiprocessors", lambda: programs)
    queries, table, mask = operands(num_queries, num_rows, dim)
    coded = _codes_gpu._encode(queries, interpret=True)
    how = {"with_tiles": True, "is_certain": is_certain}
    theirs = _codes_gpu._chunk_bounds(*coded, table, mask, **how, interpret=True)
    ours = _codes_hopper.chunk_bounds(*coded, table, mask, **how, interpret=interpreter())
    assert_same(ours, theirs, is_certain)


@needs_interpreter
def test_bounds_hold(monkeypatch):
    monkeypatch.setattr(_codes_hopper, "num_multiprocessors", lambda: 2)
    queries, _, mask = operands(128, 304, 128)
    keys = normalize(jax.random.normal(jax.random.key(1), (304, 128)).at[::7, 5].add(8.0))
    coded = _codes_gpu._encode(queries, interpret=True)
    (chunks,) = _codes_hopper.chunk_bounds(
        *coded, encode(keys), mask, with_tiles=False, is_certain=True, interpret=interpreter()
    )
    of_code = (coded[0] * coded[1][:, None]) @ jnp.where(mask[:, None], keys, 0.0).T
    of_code = np.where(mask, of_code, -np.inf)
    for tile, first in enumerate([0, 128, 176]):
        own = of_code[:, max(first, 128 * tile) : first + 128]
        own = np.pad(own, ((0, 0), (128 - own.shape[1], 0)), constant_values=-np.inf)
        largest = own.reshape(128, 8, 16).max(axis=2)
        assert np.all(chunks[:, 8 * tile : 8 * tile + 8] >= largest)


@pytest.mark.parametrize("blocks", [1, 2, 3, 32, 100, 200])
@pytest.mark.parametrize("num_tiles", [1, 5, 782, 7813])
def test_programs_share_the_tiles(blocks, num_tiles):
    count = _codes_hopper._programs(blocks, num_tiles)
    assert 1 <= count <= num_tiles
    waves = -(-blocks * count // 132)
    ideal = blocks * num_tiles / 132
    assert waves * -(-num_tiles // count) <= max(1.3 * ideal + 3, num_tiles if blocks > 132 else 0)


def test_what_it_takes(monkeypatch):
    monkeypatch.setattr(_codes_hopper, "is_hopper", lambda: True)
    is_new = jax.__version_info__ >= (0, 11)
    assert _codes_hopper.takes(128, 1000, 512) is is_new
    assert _codes_hopper.takes(4096, 128, 768) is is_new
    assert not _codes_hopper.takes(64, 1000, 512)
    assert not _codes_hopper.takes(128, 1001, 512)
    assert not _codes_hopper.takes(128, 1000, 896)
    assert not _codes_hopper.takes(128, 1000, 64)
    monkeypatch.setattr(_codes_hopper, "is_hopper", lambda: False)
    assert not _codes_hopper.takes(128, 1000, 512)


@pytest.mark.gpu
@pytest.mark.parametrize("is_certain", [False, True])
@pytest.mark.parametrize(
    ("num_queries", "num_rows", "dim"),
    [(128, 100_000, 512), (4096, 1000, 128), (256, 200_008, 768), (128, 128, 640)],
)
def test_as_the_other_kernel(monkeypatch, num_queries, num_rows, dim, is_certain):
    assert _codes_hopper.takes(num_queries, num_rows, dim) or jax.__version_info__ < (0, 11)
    queries, table, mask = operands(num_queries, num_rows, dim)
    how = {"with_tiles": True, "is_certain": is_certain, "interpret": False}

    def bounds():
        run = functools.partial(_codes_gpu._chunk_bounds, **how)
        return jax.jit(lambda *args: run(*_codes_gpu._encode(queries, interpret=False), *args))(
            table, mask
        )

    ours = bounds()
    monkeypatch.setattr(_codes_hopper, "takes", lambda *_: False)
    assert_same(ours, bounds(), is_certain)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [20_000, 300_000])
def test_search_of_many_queries(num_rows):
    """Certain search finds what all exact cosines say, though codes picked where to look."""
    queries, _, mask = operands(200, num_rows, 256)
    keys = normalize(jax.random.normal(jax.random.key(1), (num_rows, 256)))
    queries = queries.at[10].set(keys[7])
    find = functools.partial(nearest, queries, keys, mask, 10, code=encode(keys), is_unit=False)
    for ours, theirs in zip(find(), find(implementation="matmul"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
