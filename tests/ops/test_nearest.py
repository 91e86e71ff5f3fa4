"""Nearest neighbours by every implementation and precision, against a sort of exact cosines."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import encode, exact_cosine, nearest, normalize
from moe_jax.ops.search import _codes_gpu, _codes_xla, _matmul
from moe_jax.ops.search._kernel_picks import chunk_of

N, Q, D = 300, 6, 64
KERNELS = "code" if jax.default_backend() == "gpu" else "interpret"
IMPLEMENTATIONS = sorted({"matmul", "code", KERNELS})


@pytest.fixture(autouse=True, scope="module")
def few_picked():
    """Far fewer rows than these tests have are picked in XLA, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_codes_xla, "num_to_pick", lambda k, n, is_certain: min(k + 6, n))
        nearest.clear_cache()
        yield
    nearest.clear_cache()


@pytest.fixture(scope="module")
def vectors():
    """Keys with copies, near-copies and zeros; queries near them, one of them zero."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(N, D)).astype(np.float32)
    keys[200:230] = keys[:30]
    keys[230:260] = keys[0] + 1e-4 * rng.normal(size=(30, D))
    keys[290:] = 0
    queries = keys[[0, 1, 50, 51, 52, 290]] + 0.1 * rng.normal(size=(Q, D)).astype(np.float32)
    queries[5] = 0
    return normalize(queries), normalize(keys)


def expected(queries, keys, mask, k):
    score = np.where(mask, exact_cosine(queries, keys), -np.inf)
    order = np.argsort(-score, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(score, order, axis=1)
    is_valid = (best > -np.inf) & np.any(np.asarray(queries) != 0, axis=1, keepdims=True)
    return np.where(is_valid, order, keys.shape[0]), np.where(is_valid, best, 0.0), is_valid


MASKS = {
    "all": np.ones(N, bool),
    "some": np.arange(N) % 3 > 0,
    "few": np.arange(N) < 4,
    "none": np.zeros(N, bool),
    "by query": np.random.default_rng(1).random((Q, N)) < 0.4,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_exact(vectors, implementation, mask):
    if implementation != "matmul" and MASKS[mask].ndim == 2:
        pytest.skip("codes are for one mask")
    queries, keys = vectors
    for k in (1, 10):
        hits = nearest(
            queries, keys, jnp.asarray(MASKS[mask]), k, code=encode(keys),
            implementation=implementation,
        )  # fmt: skip
        for ours, want in zip(hits, expected(queries, keys, MASKS[mask], k), strict=True):
            np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("precision", ["scored", "quick"])
def test_what_is_not_certain_is_close(vectors, implementation, precision):
    queries, keys = vectors
    mask = jnp.arange(N) < 230  # without the crowd of near-copies
    hits = nearest(
        queries, keys, mask, 5, code=encode(keys), precision=precision,
        implementation=implementation,
    )  # fmt: skip
    assert not hits.is_valid[5].any()
    assert hits.is_valid[:5].all()
    ids, scores = np.asarray(hits.ids)[:5], hits.scores[:5]
    score = np.where(mask, exact_cosine(queries[:5], keys), -np.inf)
    np.testing.assert_allclose(scores, np.take_along_axis(score, ids, axis=1), atol=1e-6)
    np.testing.assert_allclose(scores, -np.sort(-score, axis=1)[:, :5], atol=2e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_of_any_length_or_of_none(implementation):
    rng = np.random.default_rng(3)
    keys = normalize(rng.normal(size=(N, D)).astype(np.float32))
    queries = rng.normal(size=(20, D)).astype(np.float32)
    length = np.ones((20, 1), np.float32)
    length[:6, 0] = 1e-3, 1e30, 1e-30, 1e36, 1e-36, 0
    odd = queries * length
    odd[6, 3], odd[7, 0], odd[8, 63] = np.nan, np.inf, -np.inf
    mask = jnp.arange(N) % 5 > 0

    def find(queries, precision):
        return nearest(queries, keys, mask, 4, code=encode(keys), is_unit=False,
                       precision=precision, implementation=implementation)  # fmt: skip

    whole = find(queries, "exact")
    for rows in (20, 9):  # a block of 32 queries, and one of 16
        hits, want = find(odd[:rows], "quick"), jax.tree.map(lambda x, n=rows: x[:n], whole)
        is_sound = np.isin(np.arange(rows), [5, 6, 7, 8], invert=True)
        np.testing.assert_array_equal(hits.is_valid, np.broadcast_to(is_sound[:, None], (rows, 4)))
        np.testing.assert_array_equal(hits.ids[~is_sound], N)
        np.testing.assert_array_equal(hits.scores[~is_sound], 0)
        np.testing.assert_array_equal(hits.ids[is_sound], want.ids[is_sound])
        np.testing.assert_allclose(hits.scores[is_sound], want.scores[is_sound], atol=1e-6)


def test_queries_that_do_not_matter_cost_no_second_look(vectors):
    queries, keys = vectors
    mask, is_query = jnp.ones(N, bool), jnp.arange(Q) > 0
    ids, *_ = nearest(queries, keys, mask, 3, code=encode(keys), is_query=is_query,
                     implementation=KERNELS)  # fmt: skip
    want, *_ = expected(queries, keys, np.ones(N, bool), 3)
    np.testing.assert_array_equal(ids[1:], want[1:])


def test_many_rows_and_a_last_tile_that_overlaps():
    rng = np.random.default_rng(2)
    keys = normalize(rng.normal(size=(1000, D)))
    queries = normalize(keys[jnp.array([0, 895, 896, 897, 999])] + 0.05 * rng.normal(size=(5, D)))
    ids, *_ = nearest(queries, keys, jnp.ones(1000, bool), 1, code=encode(keys),
                     implementation=KERNELS, precision="quick")  # fmt: skip
    np.testing.assert_array_equal(ids[:, 0], [0, 895, 896, 897, 999])


@pytest.fixture(scope="module")
def many():
    """So many keys that most chunks are not picked: copies that tie, a crowd, and zeros."""
    rng = np.random.default_rng(4)
    keys = rng.normal(size=(1500, D)).astype(np.float32)
    keys[700:760] = keys[0]
    keys[760:800] = keys[1] + 1e-3 * rng.normal(size=(40, D))
    keys[1490:] = 0
    queries = keys[[0, 1, 2, 1499]] + 0.1 * rng.normal(size=(4, D)).astype(np.float32)
    queries[3] = 0
    return normalize(queries), normalize(keys)


@pytest.mark.parametrize("k", [25, 32, 48])
def test_larger_k_by_code(many, k):
    """With ties at the k-th place, with filters, and with fewer candidates than k."""
    queries, keys = many
    code, place = encode(keys), np.arange(1500)
    masks = (place >= 0, place % 3 > 0, place < 20, place < 0)
    for mask in masks:
        hits = nearest(queries, keys, jnp.asarray(mask), k, code=code, implementation=KERNELS)
        for ours, want in zip(hits, expected(queries, keys, mask, k), strict=True):
            np.testing.assert_array_equal(ours, want)
    for mask in masks if k == 32 else ():
        hits = nearest(
            queries, keys, jnp.asarray(mask), k, code=code, implementation=KERNELS,
            precision="quick",
        )  # fmt: skip
        ids, (_, best, is_valid) = np.asarray(hits.ids), expected(queries, keys, mask, k)
        np.testing.assert_array_equal(hits.is_valid, is_valid)
        np.testing.assert_allclose(hits.scores, best, atol=2e-3)
        score = np.take_along_axis(np.asarray(exact_cosine(queries, keys)), ids % 1500, axis=1)
        np.testing.assert_allclose(hits.scores, np.where(is_valid, score, 0.0), atol=1e-6)
        assert all(len(set(row[row < 1500])) == (row < 1500).sum() for row in ids)


@pytest.fixture(scope="module")
def copies_everywhere():
    """Near-copies of one key in every tile: more than are picked at once."""
    rng = np.random.default_rng(6)
    keys = rng.normal(size=(6000, D)).astype(np.float32)
    keys[30::60] = keys[0] + 1e-3 * rng.normal(size=(100, D))
    queries = keys[[0, 1, 5999, 4000]] + 0.1 * rng.normal(size=(4, D)).astype(np.float32)
    queries[3] = 0
    return normalize(queries), normalize(keys)


@pytest.mark.parametrize("num_sections", [2, 20, 47])
@pytest.mark.parametrize("k", [1, 10])
def test_sections_of_many_chunks(copies_everywhere, monkeypatch, num_sections, k):
    """As in large graphs: sections of 32 tiles, of four, and of one."""
    monkeypatch.setattr(_codes_gpu, "_SECTIONS", num_sections)
    nearest.clear_cache()
    queries, keys = copies_everywhere
    mask = np.arange(6000) % 7 > 0
    find = functools.partial(
        nearest, queries, keys, jnp.asarray(mask), k, code=encode(keys), implementation=KERNELS
    )
    hits, quick = find(), find(precision="quick")
    nearest.clear_cache()
    wanted = expected(queries, keys, mask, k)
    for ours, want in zip(hits, wanted, strict=True):
        np.testing.assert_array_equal(ours, want)
    np.testing.assert_allclose(quick.scores, wanted[1], atol=2e-3)


@pytest.mark.parametrize("num_picked", [32, 64, 128])
@pytest.mark.parametrize("rows_per_chunk", [16, 128, 512, 1024])
def test_the_chunk_of_a_position(num_picked, rows_per_chunk):
    chunks = np.random.default_rng(0).permutation(1000)[:num_picked]
    size = min(512, num_picked * rows_per_chunk)
    for first in range(0, num_picked * rows_per_chunk, size * 3):
        position = first + np.arange(size)
        found = chunk_of(jnp.asarray(position), first, jnp.asarray(chunks), rows_per_chunk)
        np.testing.assert_array_equal(found, chunks[position // rows_per_chunk])


@pytest.mark.parametrize(
    ("num_close", "crowd"), [(0, 300), (1, 300), (5, 300), (6, 300), (33, 300), (5, 1200)]
)
def test_queries_that_codes_leave_open_are_looked_at_again(monkeypatch, num_close, crowd):
    """A crowd that codes cannot tell apart, for none, a few (of 40) or all queries.

    Of the larger one not even a pick in parts takes all.
    """
    monkeypatch.setattr(_codes_gpu, "_FEW_ROWS", 1000)
    nearest.clear_cache()
    rng = np.random.default_rng(5)
    keys = rng.normal(size=(1500, D)).astype(np.float32)
    place = rng.permutation(1000)
    place = np.concatenate([place, np.arange(1040, 1500), np.arange(1000, 1040)])[:crowd]
    keys[place] = keys[0] + 1e-3 * rng.normal(size=(crowd, D))
    queries = rng.normal(size=(40, D)).astype(np.float32)
    # One near key each, and others far from it: no doubt.
    queries = keys[1000:1040] + 0.05 * queries
    queries[7 : 7 + num_close] = (keys[0] + 0.3 * queries)[7 : 7 + num_close]
    queries, keys = normalize(queries), normalize(keys)
    k = 2
    hits = nearest(
        queries, keys, jnp.ones(1500, bool), k, code=encode(keys), implementation=KERNELS
    )
    for ours, want in zip(hits, expected(queries, keys, np.ones(1500, bool), k), strict=True):
        np.testing.assert_array_equal(ours, want)


@pytest.mark.parametrize("precision", ["exact", "quick"])
@pytest.mark.parametrize(
    ("implementation", "mask"),
    [("matmul", "some"), ("matmul", "by query"), ("code", "some"), (KERNELS, "some")],
)
def test_queries_in_blocks(vectors, monkeypatch, implementation, mask, precision):
    queries, keys = vectors
    find = functools.partial(
        nearest, k=4, code=encode(keys), precision=precision, implementation=implementation
    )
    whole = find(queries, keys, jnp.asarray(MASKS[mask]))
    module = importlib.import_module("moe_jax.ops.search.nearest")
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 2 * N)
    nearest.clear_cache()
    run = jax.jit(find).lower(queries, keys, jnp.asarray(MASKS[mask])).compile()
    nearest.clear_cache()
    assert f"f32[{Q},{N}]" not in run.as_text()
    for ours, want in zip(run(queries, keys, jnp.asarray(MASKS[mask])), whole, strict=True):
        np.testing.assert_allclose(ours, want, rtol=0, atol=0 if precision == "exact" else 1e-6)


@pytest.mark.parametrize("mask", ["some", "few", "by query"])
@pytest.mark.parametrize("k", [1, 7])
def test_keys_in_chunks(vectors, monkeypatch, mask, k):
    """Copies of a key lie in several chunks, and the last one is shorter."""
    queries, keys = vectors
    mask = jnp.asarray(MASKS[mask])
    for name, size in (("_CHUNK", 40), ("keys_at_once", lambda num_keys: 40)):
        monkeypatch.setattr(_matmul, name, size)
    nearest.clear_cache()
    hits = {
        precision: nearest(queries, keys, mask, k, precision=precision, implementation="matmul")
        for precision in ("exact", "quick")
    }
    every = _matmul.best_of_all(queries, keys, jnp.atleast_2d(mask), k)
    rough = _matmul.roughly_best(queries, keys, jnp.atleast_2d(mask), k)
    nearest.clear_cache()
    ids, scores, is_valid = expected(queries, keys, mask, k)
    for ours, want in zip(hits["exact"], (ids, scores, is_valid), strict=True):
        np.testing.assert_array_equal(ours, want)
    np.testing.assert_allclose(hits["quick"].scores, scores, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.where(is_valid, every[0], 0), scores)
    np.testing.assert_array_equal(np.where(is_valid, every[1], N), ids)
    np.testing.assert_allclose(np.where(is_valid, rough[0], 0), scores, rtol=0, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="groups are for CPUs")
@pytest.mark.parametrize("mask", ["all", "some", "few", "by query"])
@pytest.mark.parametrize("k", [1, 7])
def test_groups_of_keys(vectors, monkeypatch, mask, k):
    """The last chunk reaches back, copies tie across groups, and some groups have no candidate."""
    queries, keys = vectors
    for name, size in {"_SHORT_CHUNK": 32, "_GROUP": 2, "_MANY": 1, "_SPARE": 1}.items():
        monkeypatch.setattr(_matmul, name, size)
    mask = jnp.asarray(MASKS[mask])
    scores, ids = _matmul.roughly_best(queries, keys, jnp.atleast_2d(mask), k)
    nearest.clear_cache()
    hits = nearest(queries, keys, mask, k, implementation="matmul")
    find = functools.partial(nearest, k=k, implementation="matmul")
    text = jax.jit(find).lower(queries, keys, mask).compile().as_text()
    nearest.clear_cache()
    assert f"f32[32,{Q}]" in text
    wanted = expected(queries, keys, mask, k)
    for ours, want in zip(hits, wanted, strict=True):
        np.testing.assert_array_equal(ours, want)
    is_valid = wanted[2]
    np.testing.assert_allclose(np.where(is_valid, scores, 0), wanted[1], rtol=0, atol=1e-6)
    score = np.take_along_axis(np.asarray(exact_cosine(queries, keys)), np.asarray(ids), axis=1)
    np.testing.assert_allclose(np.where(is_valid, score, 0), wanted[1], rtol=0, atol=1e-6)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels are chosen by size elsewhere")
@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize(
    ("precision", "num_queries", "can"),
    [("exact", 1, True), ("exact", 4, True), ("exact", 5, False), ("quick", 40, True)],
)
def test_codes_of_many_keys_are_read_on_a_cpu(monkeypatch, precision, num_queries, can, is_fast):
    monkeypatch.setattr(_codes_xla, "is_fast", lambda: is_fast)
    nearest.clear_cache()
    num_keys = _codes_xla.MIN_ROWS
    keys, code, mask, queries = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        (jnp.zeros((num_keys, D)), encode(jnp.zeros((num_keys, D))), jnp.ones(num_keys, bool),
         jnp.zeros((5, num_queries, D))),
    )  # fmt: skip

    def find(queries, keys, code, mask):
        search = functools.partial(nearest, k=3, code=code, precision=precision)
        return jax.lax.map(lambda each: search(each, keys, mask), queries)

    text = jax.jit(find).lower(queries, keys, code, mask).compile().as_text()
    nearest.clear_cache()
    assert (f"s8[{num_keys},{D}]" in text) == (can and is_fast)
    # Nothing as large as the keys is made of their codes, once or in the loop.
    assert f"s32[{num_keys},{D}]" not in text
    assert f"s16[{num_keys},{D}]" not in text


@pytest.mark.parametrize("mask", ["all", "some", "few"])
@pytest.mark.parametrize("k", [1, 7])
def test_groups_of_codes(vectors, monkeypatch, mask, k):
    """Chunks of which the last reaches back; fewer groups than there are hold the best."""
    queries, keys = vectors
    sizes = {"_CHUNK": 32, "_GROUP": 2, "_NUM_GROUPS": 40, "_FEW_QUERIES": 0}
    for name, size in sizes.items():
        monkeypatch.setattr(_codes_xla, name, size)
    mask = jnp.asarray(MASKS[mask])
    scores, ids = _codes_xla.best_of_groups(queries, keys, encode(keys), mask, k)
    _, wanted, is_valid = expected(queries, keys, mask, k)
    np.testing.assert_allclose(np.where(is_valid, scores, 0), wanted, rtol=0, atol=1e-6)
    score = np.take_along_axis(np.asarray(exact_cosine(queries, keys)), np.asarray(ids), axis=1)
    np.testing.assert_allclose(np.where(is_valid, score, 0), wanted, rtol=0, atol=1e-6)
    for own in np.asarray(ids):
        assert len(set(own)) == k


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="in plain XLA on a CPU")
@pytest.mark.parametrize("num_keys", [1, 3, 297])
def test_keys_that_no_group_divides(vectors, num_keys):
    queries, keys = vectors
    keys, k = keys[:num_keys], min(num_keys, 5)
    hits = nearest(queries, keys, jnp.ones(num_keys, bool), k, code=encode(keys),
                   precision="quick", implementation="code")  # fmt: skip
    _, scores, is_valid = expected(queries, keys, np.ones(num_keys, bool), k)
    np.testing.assert_array_equal(hits.is_valid, is_valid)
    np.testing.assert_allclose(hits.scores, scores, rtol=0, atol=1e-6)


def test_a_bound_holds_for_every_row_that_was_not_picked():
    """Queries and rows of a few large numbers among many small ones, whose codes are coarse."""
    rng = np.random.default_rng(8)
    rows, queries = (rng.normal(size=(size, D)) for size in (2000, 2))
    rows[:, :2] += 30 * rng.normal(size=(2000, 2))
    queries[:, :2] += 30 * rng.normal(size=(2, 2))
    rows, queries = normalize(jnp.asarray(rows)), normalize(jnp.asarray(queries))
    table, mask = encode(rows), jnp.arange(2000) % 3 > 0
    picks = [_codes_xla.pick(queries, table, mask, 32, is_certain=True)]
    if KERNELS == "interpret":
        picks.append(_codes_gpu.pick(queries, table, mask, 32, interpret=True))
        picks.append(_codes_gpu.pick_in_parts(queries, table, mask, 2, interpret=True))
        assert picks[-1][0].shape == (2, 4 * 128)
        assert np.all(picks[-1][1] < picks[-2][1])
    cosine = np.asarray(rows, float) @ np.asarray(queries, float).T
    for picked, bound in picks:
        for query in range(2):
            own = np.asarray(picked[query])
            assert len(set(own[own < 2000])) == (own < 2000).sum()
            assert np.all(np.asarray(mask)[own[own < 2000]])
            left = np.asarray(mask) & ~np.isin(np.arange(2000), picked[query])
            assert cosine[left, query].max() <= bound[query]
            assert bound[query] < cosine[left, query].max() + 0.1


def test_larger_k_takes_fewer_rows():
    is_supported = _codes_gpu.is_supported
    assert is_supported(2**25, 512, 48)
    assert not is_supported(2**25 + 1, 512, 25)
    assert is_supported(2**26, 512, 24)
    assert not is_supported(2**26 + 1, 512, 24)
    assert not is_supported(1000, 512, 49)
    # Offsets into codes of 2 to 4 GiB would wrap.
    assert is_supported(2**22, 512, 10)
    assert not is_supported(2**22 + 1, 512, 10)
    assert not is_supported(10**7, 256, 10)
    assert is_supported(2**23 + 1, 512, 10)
    assert not is_supported(100, 512, 1)
    for k in range(1, 49):
        for num_queries in (1, 5000):
            assert _codes_gpu.num_to_pick(k, num_queries, 10**6) >= k + 4
            assert _codes_gpu.num_to_pick(k, num_queries, 10**6, is_certain=True) >= k + 4


def test_no_row_is_sorted_whole():
    keys, queries = jnp.zeros((5000, 8)), jnp.zeros((3, 8))
    for k in (1, 16, 17, 128):
        for precision in ("exact", "quick"):
            run = jax.jit(lambda q, x, k=k, p=precision: nearest(
                q, x, jnp.ones(5000, bool), k, precision=p))  # fmt: skip
            text = run.lower(queries, keys).compile().as_text()
            sorts = [line for line in text.splitlines() if " sort(" in line]
            assert not any("[3,5000]" in line for line in sorts), sorts


def test_wrong_calls(vectors):
    queries, keys = vectors
    mask = jnp.ones(N, bool)
    with pytest.raises(ValueError, match="got 'high'"):
        nearest(queries, keys, mask, 1, precision="high")
    with pytest.raises(ValueError, match="got 'cuda'"):
        nearest(queries, keys, mask, 1, implementation="cuda")
    with pytest.raises(ValueError, match="and k=49"):
        nearest(queries, keys, mask, 49, code=encode(keys), implementation=KERNELS)


@pytest.mark.parametrize("precision", ["scored", "quick"])
@pytest.mark.parametrize("implementation", ["code", KERNELS])
def test_coarsely_coded_rows_do_not_push_out_nearer_ones(implementation, precision):
    """Half of the rows have one large coordinate, for which the others are coded coarsely."""
    rng = np.random.default_rng(9)
    rows = rng.normal(size=(1500, 1024)) + 2 * rng.normal(size=1024)
    rows[::2, 0] = 60
    keys = normalize(jnp.asarray(rows, jnp.float32))
    queries = normalize(jnp.asarray(rows[1:9:2] + rng.normal(size=(4, 1024)), jnp.float32))
    assert encode(keys).error[0] > 3 * encode(keys).error[1]
    mask = jnp.ones(1500, bool)
    hits = nearest(queries, keys, mask, 10, code=encode(keys), precision=precision,
                   implementation=implementation)  # fmt: skip
    best = -np.sort(-np.asarray(exact_cosine(queries, keys)), axis=1)[:, :10]
    np.testing.assert_allclose(hits.scores, best, atol=3e-3)
