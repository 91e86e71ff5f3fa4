"""Grouped matmuls: every implementation against a float64 loop, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.grouped import (
    BLOCK,
    _hopper,
    _hopper_kernels,
    grouped_matmul,
    is_row,
    make_groups,
    padded_rows,
)

INNER, OUTER = 128, 256
SIZES = {
    "even": [64, 64, 64],
    "ragged": [100, 3, 89],
    "an empty group": [0, 130, 5],
    "one takes all": [0, 0, 192],
    "all empty": [0, 0, 0],
}
ROWS = 200


def operands(dtype=jnp.float32, seed=0, rows=ROWS):
    rng = np.random.default_rng(seed)
    x, grad = (rng.normal(size=(rows, n)) for n in (INNER, OUTER))
    w = rng.normal(size=(3, INNER, OUTER))
    return tuple(jnp.asarray(a, dtype) for a in (x, w, grad))


def slow(x, w, grad, sizes):
    """The product, and the gradients of sum(product * grad), one group after the other."""
    x, w, grad = (np.asarray(a, np.float64) for a in (x, w, grad))
    out, grad_x, grad_w = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(w.shape)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = x[rows] @ w[group]
        grad_x[rows] = grad[rows] @ w[group].T
        grad_w[group] = x[rows].T @ grad[rows]
        start += size
    return out, grad_x, grad_w


def with_gradients(x, w, grad, sizes, **how):
    out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, **how), x, w)
    return out, *back(grad)


compiled = jax.jit(with_gradients, static_argnames="implementation")


def assert_close(found, expected, dtype):
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for a, b in zip(found, expected, strict=True):
        assert np.all(np.isfinite(np.asarray(a, np.float32)))
        error = np.linalg.norm(np.asarray(a, np.float64) - b)
        assert error <= tolerance * max(np.linalg.norm(b), 1e-30)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_a_float64_loop(sizes, dtype):
    x, w, grad = operands(dtype)
    found = compiled(x, w, grad, jnp.array(sizes), implementation="xla")
    assert_close(found, slow(x, w, grad, sizes), dtype)
    again = compiled(x, w, grad, jnp.array(sizes), implementation="xla")
    jax.tree.map(np.testing.assert_array_equal, found, again)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_after_the_last_group_may_hold_anything(sizes):
    x, w, grad = operands()
    tail = (jnp.arange(ROWS) >= sum(sizes))[:, None]
    poisoned = jnp.where(tail, jnp.nan, x), w, jnp.where(tail, jnp.nan, grad)
    found = compiled(*poisoned, jnp.array(sizes), implementation="xla")
    assert_close(found, slow(x, w, grad, sizes), jnp.float32)
    assert not np.any(found[0][sum(sizes) :])
    assert not np.any(found[1][sum(sizes) :])


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "swiglu"])
def test_bias_activation_and_residual(activation, has_residual):
    """The same values and gradients as by hand, one group after the other."""
    x, w, grad = operands()
    w, bias, sizes = w / 8, jax.random.normal(jax.random.key(1), (3, OUTER)), [100, 0, 70]

    width = OUTER // 2 if activation == "swiglu" else OUTER
    more = (jax.random.normal(jax.random.key(2), (ROWS, width)),) if has_residual else ()

    def by_hand(x, w, bias, residual=None):
        owner = np.repeat(np.arange(3), sizes)
        out = jnp.einsum("ri,rij->rj", x[:170], w[owner], precision="highest") + bias[owner]
        if activation == "swiglu":
            out = jax.nn.silu(out[:, :width]) * out[:, width:]
        elif activation:
            out = jax.nn.gelu(out, approximate=activation == "gelu_tanh")
        out = out if residual is None else out + residual[:170]
        return jnp.pad(out, ((0, ROWS - 170), (0, 0)))

    def fast(x, w, bias, residual=None):
        how = {"bias": bias, "activation": activation, "residual": residual}
        return grouped_matmul(x, w, jnp.array(sizes), **how)

    def with_gradients(run, grad):
        out, back = jax.vjp(run, x, w, bias, *more)
        return out, *back(grad[:, :width])

    found, expected = (jax.jit(functools.partial(with_gradients, f))(grad) for f in (fast, by_hand))
    assert_close(found, [np.asarray(a, np.float64) for a in expected], jnp.float32)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_layout_gives_every_group_its_own_blocks(sizes):
    groups = make_groups(jnp.array(sizes), ROWS)
    assert groups.num_rows == padded_rows(ROWS, 3)
    owner = np.full(groups.num_rows, -1)
    for group, (start, size) in enumerate(zip(groups.start, sizes, strict=True)):
        assert start % BLOCK == 0
        assert np.all(owner[start : start + size] == -1)
        owner[start : start + size] = group
    np.testing.assert_array_equal(is_row(groups), owner >= 0)
    for block, group in zip(owner.reshape(-1, BLOCK), groups.block_group, strict=True):
        assert set(block) <= {-1, int(group)}
        assert (int(group) == 3) == bool(np.all(block == -1))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_tile_of_rows_belongs_to_one_group(sizes):
    """What the kernels walk over: each used block in one tile, once, and no others."""
    groups = make_groups(jnp.array(sizes), ROWS)
    group, start, rows, num = (np.asarray(a) for a in _hopper.row_tiles(groups))
    seen = np.full(groups.num_rows // BLOCK, groups.num_groups)
    for i in range(num[-1]):
        assert rows[i] in (BLOCK, 2 * BLOCK)
        blocks = slice(start[i] // BLOCK, (start[i] + rows[i]) // BLOCK)
        assert np.all(seen[blocks] == groups.num_groups)
        seen[blocks] = group[i]
    np.testing.assert_array_equal(seen, groups.block_group)
    assert not np.any(rows[num[-1] :])


@pytest.mark.parametrize("num_tiles", [1, 5, 10, 13, 15])
def test_rounds_there_and_back_visit_each_tile_once(num_tiles):
    run = jax.jit(_hopper_kernels._there_and_back, static_argnums=(1, 2))
    found = [int(run(jnp.int32(tile), num_tiles, 5)) for tile in range(num_tiles)]
    assert sorted(found) == list(range(num_tiles))
    assert found[5:10] == ([9, 8, 7, 6, 5] if num_tiles >= 10 else found[5:])


def interpreter():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


LEGS = ["forward", "left", "weight"]


@pytest.mark.parametrize("leg", LEGS)
def test_hopper_kernels_interpreted(leg, monkeypatch):
    """The kernels' own code, every warpgroup, barrier and copy of it, run by an interpreter."""
    if leg != "forward" and jax.__version_info__ < (0, 11):
        pytest.skip("the interpreter of this jax cannot read a transposed operand")
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 2)
    sizes, (x, w, grad) = [70, 0, 5], operands(jnp.bfloat16)
    groups, n = make_groups(jnp.array(sizes), 80), sum(sizes)
    row = np.flatnonzero(is_row(groups))
    nothing = jnp.where(groups.block_group < 3, 0, jnp.nan).repeat(BLOCK)[:, None]
    laid_out, laid_out_grad = (
        jnp.broadcast_to(nothing, (groups.num_rows, a.shape[1])).astype(a.dtype).at[row].set(a[:n])
        for a in (x, grad)
    )
    expected = dict(zip(LEGS, slow(x[:n], w, grad[:n], sizes), strict=True))[leg]
    if leg == "weight":
        found = _hopper.rows_by_rows(laid_out, laid_out_grad, groups, interpret=interpreter())
    else:
        rows = laid_out if leg == "forward" else laid_out_grad
        how = {"transpose": leg == "left", "interpret": interpreter()}
        found = _hopper.rows_by_matrices(rows, w, groups, **how)[row]
    assert_close([found], [expected], jnp.bfloat16)


NEWER = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="the kernels load what they add as jax 0.11 has it"
)


@NEWER
@pytest.mark.parametrize("slots", [2, 4])
def test_hopper_kernels_add_a_bias_and_take_gelu_before_rounding(slots, monkeypatch):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 2)
    sizes, (x, w, bias) = [70, 0, 5], operands(jnp.bfloat16)
    groups, w, bias = make_groups(jnp.array(sizes), 80), w / 8, bias[:3]
    row, n = np.flatnonzero(is_row(groups)), sum(sizes)
    laid_out = jnp.zeros((groups.num_rows, INNER), x.dtype).at[row].set(x[:n])
    how = {"bias": bias, "activation": "gelu_tanh", "interpret": interpreter()}
    how["tiling"] = _hopper.Tiling(columns=OUTER, stages=3, slots=slots)
    found = _hopper.rows_by_matrices(laid_out, w, groups, **how)[row]
    product, _, _ = slow(x[:n], w, jnp.zeros((n, OUTER)), sizes)
    own = np.repeat(np.asarray(bias, np.float64), sizes, axis=0)
    expected = jax.nn.gelu(jnp.asarray(product + own, jnp.float32), approximate=True)
    assert_close([found], [np.asarray(expected)], jnp.bfloat16)


def test_hopper_kernels_gate_before_rounding(monkeypatch):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 2)
    sizes, (x, w, _) = [70, 0, 5], operands(jnp.bfloat16)
    groups, w, n = make_groups(jnp.array(sizes), 80), w / 8, sum(sizes)
    row = np.flatnonzero(is_row(groups))
    laid_out = jnp.zeros((groups.num_rows, INNER), x.dtype).at[row].set(x[:n])
    how = {"activation": "swiglu", "interpret": interpreter()}
    found = _hopper.rows_by_matrices(laid_out, w, groups, **how)[row]
    gate, up = np.split(slow(x[:n], w, jnp.zeros((n, OUTER)), sizes)[0], 2, axis=1)
    assert_close([found], [gate / (1 + np.exp(-gate)) * up], jnp.bfloat16)


@NEWER
def test_hopper_kernels_add_a_residual_before_rounding(monkeypatch):
    monkeypatch.setattr(_hopper, "num_multiprocessors", lambda: 2)
    # The second group's second tile is half a tile, and one block is of no group.
    sizes, (x, w, residual) = [20, 140, 1], operands(jnp.bfloat16, rows=200)
    groups, n = make_groups(jnp.array(sizes), 225), sum(sizes)
    row = np.flatnonzero(is_row(groups))
    laid_out, added = (
        jnp.zeros((groups.num_rows, a.shape[1]), a.dtype).at[row].set(a[:n]) for a in (x, residual)
    )
    how = {"residual": added, "interpret": interpreter()}
    found = _hopper.rows_by_matrices(laid_out, w, groups, **how)[row]
    product, _, _ = slow(x[:n], w, jnp.zeros((n, OUTER)), sizes)
    assert_close([found], [product + np.asarray(residual[:n], np.float64)], jnp.bfloat16)


@NEWER
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_hopper_kernels_with_a_bias_lower(activation):
    num_rows, shape = padded_rows(4096, 8), jax.ShapeDtypeStruct
    arrays = [shape(s, jnp.bfloat16) for s in ((num_rows, 512), (8, 512, 768), (8, 768))]

    def run(x, w, bias, size):
        groups = make_groups(size, 4096)
        return _hopper.rows_by_matrices(x, w, groups, bias=bias, activation=activation)

    traced = jax.jit(run).trace(*arrays, shape((8,), jnp.int32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_hopper_kernels_with_gates_lower():
    num_rows, shape = padded_rows(4096, 8), jax.ShapeDtypeStruct
    x, w = (shape(s, jnp.bfloat16) for s in ((num_rows, 512), (8, 512, 1536)))

    def run(x, w, size):
        return _hopper.rows_by_matrices(x, w, make_groups(size, 4096), activation="swiglu")

    lowered = jax.jit(run).trace(x, w, shape((8,), jnp.int32)).lower(lowering_platforms=("cuda",))
    assert lowered.out_info.shape == (num_rows, 768)


@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize(("inner", "outer"), [(512, 768), (2048, 8192), (128, 64)])
def test_hopper_kernels_lower(leg, inner, outer):
    """Without a GPU: up to the code that is handed to the compiler of the GPU."""
    num_rows, shape = padded_rows(4096, 8), jax.ShapeDtypeStruct
    x, grad = (shape((num_rows, n), jnp.bfloat16) for n in (inner, outer))
    w, size = shape((8, inner, outer), jnp.bfloat16), shape((8,), jnp.int32)

    def run(x, grad, w, size):
        groups = make_groups(size, 4096)
        if leg == "weight":
            return _hopper.rows_by_rows(x, grad, groups)
        transpose = leg == "left"
        return _hopper.rows_by_matrices(grad if transpose else x, w, groups, transpose=transpose)

    text = jax.jit(run).trace(x, grad, w, size).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_bad_input():
    x, w, _ = operands()
    sizes = jnp.array([1, 2, 3])
    for bad, message in (
        ((x, w[:2], sizes), "w must have a matrix for each of 3 groups"),
        ((x[:, :5], w, sizes), "must agree in the width"),
        ((x.astype(jnp.bfloat16), w, sizes), "same dtype"),
        ((x, w, make_groups(sizes, 999)), "rows, got 200"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_matmul(*bad)
    with pytest.raises(ValueError, match="activation must be one of"):
        grouped_matmul(x, w, sizes, activation="relu")
    wide = jnp.zeros((ROWS, OUTER))
    for residual, activation in (
        (wide[:1], None), (wide, "swiglu"), (wide.astype(jnp.bfloat16), None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="residual must be float32"):
            grouped_matmul(x, w, sizes, residual=residual, activation=activation)
    with pytest.raises(ValueError, match="implementation must be"):
        grouped_matmul(x, w, sizes, implementation="cuda")
    with pytest.raises(ValueError, match="wants an NVIDIA Hopper GPU"):
        grouped_matmul(x, w, sizes, implementation="mosaic")


@pytest.mark.parametrize("filled", [{0: 2, 3: 1}, {4: 9, 23: 1}])
def test_few_rows_read_the_matrices_of_their_groups_alone(filled):
    rng = np.random.default_rng(0)
    size = np.array([filled.get(e, 0) for e in range(24)])
    num_rows, used = size.sum(), size > 0
    x = rng.normal(size=(num_rows, 16)).astype(np.float32)
    w = rng.normal(size=(24, 16, 24)).astype(np.float32)
    poisoned = np.where(used[:, None, None], w, np.nan)
    group = np.repeat(np.arange(24), size)

    def run(x, w):
        return grouped_matmul(x, w, jnp.array(size))

    out, pull = jax.jit(functools.partial(jax.vjp, run))(x, poisoned)
    np.testing.assert_allclose(out, np.einsum("ri,rij->rj", x, w[group]), rtol=1e-5, atol=1e-5)
    grad_x, grad_w = pull(out)
    np.testing.assert_allclose(grad_x, np.einsum("rj,rij->ri", out, w[group]), rtol=1e-4, atol=1e-4)
    wanted = np.zeros_like(w)
    np.add.at(wanted, group, np.einsum("ri,rj->rij", x, out))
    np.testing.assert_allclose(grad_w, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("row_tiles", "parts", "wanted"), [(1000, 1, 256), (8, 1, 64), (8, 2, 128)]
)
def test_few_tiles_are_narrow(row_tiles, parts, wanted):
    assert _hopper.tiling_for(512, 128, row_tiles, parts).columns == wanted
    assert _hopper.tiling_for(512, 96, row_tiles) is None
    assert _hopper.tiling_for(96, 128, row_tiles) is None
