"""The language model: no output depends on a later token, drops and memory included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables

from moe_jax import KnowledgeGraph, LanguageModelConfig
from moe_jax.config import smallest_run, tiny
from moe_jax.graph import insert
from moe_jax.lm import CausalAttention, MoELanguageModel, ngram_ids, rotate

S, V, D = 20, 11, 16


def config_of(**changes):
    moe = tiny().replace(
        input_dim=D,
        hidden_dim=16,
        output_dim=D,
        expert="transformer",
        causal=True,
        dropout=0.0,
        eval_capacity_factor=0.5,
        **changes,
    )
    return LanguageModelConfig(
        moe=moe, num_heads=2, max_length=S, vocab_size=V, ngram_sizes=(2, 3), ngram_rows=32,
        ngram_dim=4,
    )  # fmt: skip


@functools.cache
def compiled():
    """A reading model as a function of tokens, validity and graph; rows are filled up to S."""
    model = MoELanguageModel(config_of(memory_read=True))
    variables = random_variables(model.init, tokens()[None], graph())
    apply = jax.jit(model.apply)

    def run(many, is_valid=None, memory=None):
        if is_valid is None:
            is_valid = jnp.ones(many.shape, bool)
        fill = ((0, S - many.shape[0]), (0, 0))
        many, is_valid = jnp.pad(many, fill), jnp.pad(is_valid, fill, constant_values=True)
        return apply(variables, many, memory or graph(), is_valid=is_valid)

    return run


@functools.cache
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(V, size=S), jnp.int32)


@functools.cache
def graph():
    keys = np.random.default_rng(1).normal(size=(20, D)).astype(np.float32)
    return insert(KnowledgeGraph.create(32, D), keys)[0]


def test_no_output_depends_on_a_later_token():
    run = compiled()
    # Row t keeps the first t + 1 tokens and changes every later one.
    t, s = np.arange(S)[:, None], np.arange(S)[None]
    many = jnp.where(s <= t, tokens()[None], (tokens()[None] + 1 + t % (V - 1)) % V)
    out = run(many)
    logits = np.asarray(out.logits)
    # Compared in the same row of the batch: a matmul may round its last rows otherwise.
    expected = np.asarray(run(jnp.broadcast_to(tokens()[None], (S, S))).logits)
    for row in range(S):
        np.testing.assert_array_equal(logits[row, : row + 1], expected[row, : row + 1])
        if row < S - 1:
            assert not np.array_equal(logits[row, row + 1 :], expected[row, row + 1 :])
    kept = np.asarray(out.moe.plan.is_kept)
    assert np.all(out.stats.dropped_fraction > 0.1)
    assert kept[:, : S // 2].mean() > kept[:, S // 2 :].mean()


def test_one_later_token_is_enough_to_be_ignored():
    run = compiled()
    # Row t changes token t alone.
    many = jnp.where(jnp.eye(S, dtype=bool), (tokens()[None] + 1) % V, tokens()[None])
    out = np.asarray(run(many).logits)
    same = np.asarray(run(jnp.broadcast_to(tokens()[None], (S, S))).logits)
    for row in range(S):
        np.testing.assert_array_equal(out[row, :row], same[row, :row])
        assert not np.array_equal(out[row, row], same[row, row])


def test_padding_at_the_end_changes_nothing_earlier():
    run = compiled()
    both = jnp.stack([tokens(), (tokens() + 3) % V])
    is_valid = jnp.arange(S)[None] < jnp.array([[13], [7]])
    padded, other = run(both, is_valid), run(jnp.where(is_valid, both, 0), is_valid)
    for same in (other, run(both)):
        np.testing.assert_array_equal(padded.logits[0, :13], same.logits[0, :13])
        np.testing.assert_array_equal(padded.logits[1, :7], same.logits[1, :7])
    jax.tree.map(np.testing.assert_array_equal, padded.moe.reports, other.moe.reports)
    np.testing.assert_array_equal(padded.auxiliary_loss, other.auxiliary_loss)
    assert not np.any(np.asarray(padded.moe.plan.is_kept)[:2][~np.asarray(is_valid)])


def test_memory_is_read_by_the_last_block_alone():
    model = MoELanguageModel(config_of(memory_read=True))
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens()[None], graph())
    blocks = variables["params"]
    assert "memory" in blocks["blocks_1"]["system"]
    assert "memory" not in blocks["blocks_0"]["system"]
    run, empty = compiled(), KnowledgeGraph.create(32, D)
    one = tokens()[None]
    assert not np.allclose(run(one).logits[0], run(one, memory=empty).logits[0], atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes(dtype):
    model = MoELanguageModel(config_of(compute_dtype=dtype))
    out, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), tokens()[None])
    assert (out.logits.shape, out.logits.dtype) == ((1, S, V), jnp.float32)
    assert (out.moe.output.shape, out.moe.output.dtype) == ((1, S, D), jnp.dtype(dtype))
    assert out.moe.reports.summary.shape == (4, D)
    assert out.stats.load.shape == (2, 4)
    assert out.auxiliary_loss.shape == ()


def test_sequences_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match=r"S at most max_length=20, got \(1, 21\)"):
        jax.eval_shape(
            MoELanguageModel(config_of()).init, jax.random.key(0), jnp.zeros((1, S + 1), int)
        )


def test_ngram_ids_are_causal_and_in_range():
    sizes, rows = (2, 3, 5), 64
    many = np.random.default_rng(2).integers(256, size=(3, S)).astype(np.int32)
    ids_of = jax.jit(lambda tokens: ngram_ids(tokens, sizes, rows))
    ids = np.asarray(ids_of(many))
    assert ids.shape == (3, S, 3)
    for i, size in enumerate(sizes):
        assert np.all((ids[..., i] >= i * rows) & (ids[..., i] < (i + 1) * rows))
        for t in range(S):
            later = many + (np.arange(S) == t)[None].astype(np.int32)
            changed = np.asarray(ids_of(later))[..., i] != ids[..., i]
            inside = (np.arange(S) >= t) & (np.arange(S) < t + size)
            assert not np.any(changed[:, ~inside])
            assert np.any(changed[:, inside])
    # Equal n-grams share a row wherever they stand; beyond the start counts as a token of its own.
    repeated = ngram_ids(jnp.tile(many[:1, :6], (1, 3)), sizes, rows)[0]
    np.testing.assert_array_equal(repeated[6:12], repeated[12:])
    assert not np.array_equal(repeated[:6], repeated[6:12])


def test_ngram_ids_spread_over_their_rows():
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(64), jnp.arange(64)), axis=-1).reshape(-1, 2)
    ids = ngram_ids(pairs, (2,), 1024)[:, 1, 0]
    # Four pairs per row on average, as if drawn by chance.
    count = np.bincount(ids, minlength=1024)
    assert count.max() < 16
    assert np.mean(count == 0) < 0.05


def test_rotation_keeps_norms_and_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, S, 3, 8)), jnp.float32)
    turned = rotate(x)
    norms = functools.partial(np.linalg.norm, axis=-1)
    np.testing.assert_allclose(norms(turned), norms(x), rtol=1e-5)
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    same = rotate(jnp.broadcast_to(x[:, :1], x.shape))
    other = rotate(jnp.broadcast_to(x[:, 1:2], x.shape))
    product = np.einsum("bqgw,bkgw->bgqk", same, other)
    for distance in range(1, S):
        diagonal = np.diagonal(product, -distance, axis1=2, axis2=3)
        np.testing.assert_allclose(diagonal, diagonal[..., :1] * np.ones_like(diagonal), atol=1e-5)
    assert np.ptp(product) > 1
    assert rotate(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_attention_sees_valid_earlier_tokens_only():
    attention = CausalAttention(num_heads=2)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)), jnp.float32)
    is_valid = jnp.array([[True] * 6, [True, False, True, True, False, True]])
    run = jax.jit(attention.apply)
    variables = jax.jit(attention.init)(jax.random.key(0), x)
    before = run(variables, x, is_valid)
    for t in range(6):
        after = run(variables, x.at[:, t].multiply(-1.0), is_valid)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
    assert not np.array_equal(run(variables, x, jnp.ones_like(is_valid)), before)


@pytest.mark.parametrize("dispatch", ["capacity", "dropless"])
def test_padding_anywhere_and_of_any_id_changes_nothing(dispatch):
    config = model_config(dispatch)
    model, tokens = MoELanguageModel(config), jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
    variables = jax.jit(model.init)(jax.random.key(1), tokens)
    run = jax.jit(model.apply)
    for valid in (jnp.arange(16) >= 6, jnp.arange(16) < 10):
        valid = jnp.broadcast_to(valid[None], tokens.shape)
        want = run(variables, jnp.where(valid, tokens, 7), is_valid=valid).logits[valid]
        for pad in (0, 255, config.vocab_size, -1, -100, 10_000):
            got = run(variables, jnp.where(valid, tokens, pad), is_valid=valid).logits[valid]
            np.testing.assert_array_equal(got, want)
        # An id that is no symbol is padding without being told.
        got = run(variables, jnp.where(valid, tokens, -1)).logits[valid]
        np.testing.assert_array_equal(got, want)


def model_config(dispatch):
    config = smallest_run().model
    return config.replace(
        moe=config.moe.replace(dispatch=dispatch, librarian_contrastive_weight=0.1, dropout=0.0),
        ngram_sizes=(2, 3), num_layers=2,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
def test_tokens_of_any_integer_dtype(dtype):
    tokens = np.array([[254, 3, 4, 255, 3]])
    ids = ngram_ids(jnp.asarray(tokens), (2, 3), 64)
    np.testing.assert_array_equal(ngram_ids(jnp.asarray(tokens, dtype), (2, 3), 64), ids)
    model = MoELanguageModel(model_config("capacity"))
    variables = jax.jit(model.init)(jax.random.key(1), jnp.asarray(tokens))
    run = jax.jit(model.apply)
    want = run(variables, jnp.asarray(tokens)).logits
    np.testing.assert_array_equal(run(variables, jnp.asarray(tokens, dtype)).logits, want)
