"""What every expert and the bank keep to; each kind in `EXPERTS` inherits these tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from random_variables import random_variables

from moe_jax.experts import EXPERTS, ExpertBank, Rows, SpecializedExpert
from moe_jax.experts.by_row import linear
from moe_jax.ops.grouped import is_row, make_groups

E, B, C, D, H, O = 3, 2, 8, 6, 8, 4  # noqa: E741
ATTENTIVE = ["transformer", "specialized"]


def make(kind, **fields):
    if kind in ATTENTIVE:
        fields = {"num_heads": 2, **fields}
    return EXPERTS[kind](hidden_dim=H, output_dim=O, **fields)


@functools.cache
def compiled(kind, **fields):
    return jax.jit(make(kind, **fields).apply, static_argnames="is_training")


@functools.cache
def variables_of(kind):
    return random_variables(make(kind).init, *inputs()[0])


@functools.cache
def inputs():
    """Tokens, validity with holes, shuffled positions; and the same for a bank."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(E, B, C, D)).astype(np.float32)
    is_valid = np.arange(C) < np.array([8, 5])[:, None]
    is_valid = np.broadcast_to(is_valid, (E, B, C))
    position = np.stack([rng.permutation(20)[:C] for _ in range(E * B)]).reshape(E, B, C)
    bank = tuple(map(jnp.asarray, (x, is_valid, position.astype(np.int32))))
    return tuple(a[0] for a in bank), bank


each_kind = pytest.mark.parametrize("kind", EXPERTS)


@each_kind
def test_shapes_dtypes_and_range(kind):
    (x, is_valid, position), _ = inputs()
    variables = variables_of(kind)
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out = compiled(kind)(variables, x, is_valid, position)
    assert (out.output.shape, out.confidence.shape) == ((B, C, O), (B, C))
    assert out.output.dtype == out.confidence.dtype == jnp.float32
    assert np.all((out.confidence > 0) & (out.confidence < 1))
    low = jax.eval_shape(
        make(kind, dtype=jnp.bfloat16).apply, variables, x.astype("bfloat16"), is_valid, position
    )
    assert (low.output.dtype, low.confidence.dtype) == (jnp.bfloat16, jnp.float32)
    alone = jax.eval_shape(make(kind).apply, variables, x[0], is_valid[0], position[0])
    assert (alone.output.shape, alone.confidence.shape) == ((C, O), (C,))


@each_kind
def test_valid_tokens_do_not_see_invalid_slots(kind):
    (x, is_valid, position), _ = inputs()
    variables = variables_of(kind)
    run = compiled(kind)
    garbage = jnp.where(is_valid[..., None], x, 1000.0 * jnp.flip(x, axis=1))
    elsewhere = jnp.where(is_valid, position, 0)
    before, after = run(variables, x, is_valid, position), run(
        variables, garbage, is_valid, elsewhere
    )  # fmt: skip
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[is_valid], np.asarray(b)[is_valid])
    nothing = run(variables, garbage, jnp.zeros_like(is_valid), elsewhere)
    assert all(np.all(np.isfinite(leaf)) for leaf in nothing)


@each_kind
def test_rows_do_not_leak(kind):
    (x, is_valid, position), _ = inputs()
    variables, run = variables_of(kind), compiled(kind)
    before = run(variables, x, is_valid, position)
    after = run(variables, x.at[1].multiply(-2.0), is_valid.at[1].set(True), position)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    assert not np.array_equal(before.output[1], after.output[1])


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_experts_without_attention_treat_each_token_alone(kind):
    (x, is_valid, position), _ = inputs()
    variables, run = variables_of(kind), compiled(kind)
    before = run(variables, x, is_valid, position)
    after = run(variables, x.at[:, 3:].multiply(-2.0), is_valid, position)
    np.testing.assert_array_equal(before.output[:, :3], after.output[:, :3])


@pytest.mark.parametrize("kind", ATTENTIVE)
@pytest.mark.parametrize("causal", [True, False])
def test_causal_tokens_see_no_later_position(kind, causal):
    (x, is_valid, position), _ = inputs()
    variables = variables_of(kind)
    run = compiled(kind, causal=causal)
    before = run(variables, x, is_valid, position)
    changes_earlier = False
    for t in np.sort(position[0])[:-1]:
        later = position > t
        after = run(variables, jnp.where(later[..., None], -x, x), is_valid, position)
        for a, b in zip(before, after, strict=True):
            kept = np.asarray(is_valid & ~later)
            if causal:
                np.testing.assert_array_equal(np.asarray(a)[kept], np.asarray(b)[kept])
            changes_earlier |= not np.array_equal(np.asarray(a)[kept], np.asarray(b)[kept])
    assert changes_earlier != causal


@pytest.mark.parametrize("kind", ATTENTIVE)
def test_the_order_of_slots_does_not_matter(kind):
    (x, is_valid, position), _ = inputs()
    variables = variables_of(kind)
    run = compiled(kind, causal=True)
    order = np.random.default_rng(1).permutation(C)
    before = run(variables, x, is_valid, position)
    after = run(variables, x[:, order], is_valid[:, order], position[:, order])
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(
            np.asarray(a[:, order])[is_valid[:, order]],
            np.asarray(b)[is_valid[:, order]],
            rtol=1e-5,
            atol=1e-6,
        )


@functools.cache
def compiled_bank(kind, remat="none"):
    return jax.jit(ExpertBank(make(kind), num_experts=E, remat=remat).apply)


@functools.cache
def bank_variables(kind):
    return random_variables(ExpertBank(make(kind), num_experts=E).init, *inputs()[1])


@each_kind
def test_a_bank_equals_a_loop_over_single_experts(kind):
    _, bank = inputs()
    variables = bank_variables(kind)
    out = compiled_bank(kind)(variables, *bank)
    assert out.output.shape == (E, B, C, O)
    run = compiled(kind)
    for e in range(E):
        own = jax.tree.map(lambda a, e=e: a[e], variables["params"]["expert"])
        alone = run({"params": own}, *(a[e] for a in bank))
        np.testing.assert_allclose(out.output[e], alone.output, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out.confidence[e], alone.confidence, rtol=1e-5)


def some_rows():
    """Two tokens for each expert but the last, which has none, as rows and as buffers."""
    groups = make_groups(jnp.array([2, 2, 0]), 4)
    rows = Rows(groups, sequence=jnp.zeros(groups.num_rows, jnp.int32))
    x = jax.random.normal(jax.random.key(0), (groups.num_rows, D))
    return rows, jnp.where(is_row(groups)[:, None], x, 0)


@pytest.mark.parametrize("kind", ["transformer", "mlp", "swiglu"])
def test_rows_equal_buffers(kind):
    rows, x = some_rows()
    variables, is_own = bank_variables(kind), is_row(rows.groups)
    position = jnp.zeros(x.shape[0], jnp.int32)
    bank = ExpertBank(make(kind), num_experts=E)
    on_rows = jax.jit(bank.apply)(variables, x, is_own, position, rows=rows)
    buffers = jnp.stack([x[s : s + C] for s in rows.groups.start]), jnp.arange(C) < 2
    valid = jnp.broadcast_to(buffers[1], (E, C)) & (rows.groups.size > 0)[:, None]
    in_buffers = compiled_bank(kind)(variables, buffers[0], valid, jnp.zeros((E, C), jnp.int32))
    for e in range(2):
        at = slice(int(rows.groups.start[e]), int(rows.groups.start[e]) + 2)
        np.testing.assert_allclose(
            on_rows.output[at], in_buffers.output[e, :2], rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(on_rows.confidence[at], in_buffers.confidence[e, :2], rtol=1e-5)


def test_one_expert_alone_may_have_all_rows():
    rows, x = some_rows()
    own = jax.tree.map(lambda a: a[1], bank_variables("mlp")["params"]["expert"])
    is_own, position = is_row(rows.groups), jnp.zeros(x.shape[0], jnp.int32)
    run = jax.jit(make("mlp").apply)
    found = run({"params": own}, x, is_own, position, rows=rows)
    alone = run({"params": own}, x, is_own, position)
    np.testing.assert_allclose(found.output[is_own], alone.output[is_own], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_rows_is_refused():
    rows, x = some_rows()
    args = x, is_row(rows.groups), jnp.zeros(x.shape[0], jnp.int32)
    with pytest.raises(ValueError, match="expert must take rows, which SpecializedExpert does not"):
        ExpertBank(make("specialized"), E).init(jax.random.key(0), *args, rows=rows)
    with pytest.raises(ValueError, match="num_experts=5 groups, got 3"):
        ExpertBank(make("mlp"), 5).init(jax.random.key(0), *args, rows=rows)
    with pytest.raises(ValueError, match="must be shared by all experts"):
        jax.vmap(lambda x: linear(x, jnp.ones((D, 2)), None, rows.groups))(x[None])


def test_experts_of_a_bank_start_apart():
    bank = ExpertBank(make("mlp"), num_experts=E)
    variables = jax.jit(bank.init)(jax.random.key(1), *inputs()[1])
    kernel = variables["params"]["expert"]["up"]["kernel"]
    assert kernel.shape == (E, D, H)
    assert not np.allclose(kernel[0], kernel[1], atol=0.1)
    # As one expert starts: a fan-in of D, not of E times D.
    np.testing.assert_allclose(jnp.std(kernel), D**-0.5, rtol=0.2)


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_remat_gives_the_same_gradients(kind):
    _, bank = inputs()

    def gradients(remat):
        def loss(variables):
            out = compiled_bank(kind, remat)(variables, *bank)
            return jnp.sum(out.output**2) + jnp.sum(out.confidence)

        return jax.jit(jax.grad(loss))(bank_variables(kind))

    def recomputes(remat):
        bank_module = ExpertBank(make(kind), num_experts=E, remat=remat)
        return "remat" in str(jax.make_jaxpr(bank_module.apply)(bank_variables(kind), *bank))

    plain = gradients("none")
    assert not recomputes("none")
    for remat in ("dots", "full"):
        assert recomputes(remat)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            gradients(remat),
            plain,
        )


def count(jaxpr, name):
    """Equations of a primitive, however deep."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name == name
        for inner in jaxprs_in_params(equation.params):
            total += count(inner, name)
    return total


@pytest.mark.parametrize("kind", ["transformer", "mlp", "swiglu"])
def test_keeping_matmuls_repeats_none_of_them_on_rows(kind):
    rows, x = some_rows()
    args = x, is_row(rows.groups), jnp.zeros(x.shape[0], jnp.int32)

    def matmuls(remat):
        bank = ExpertBank(make(kind), num_experts=E, remat=remat)

        def loss(variables):
            return jnp.sum(bank.apply(variables, *args, rows=rows).output)

        # On a CPU each grouped matmul is one choice of capacity.
        return count(jax.make_jaxpr(jax.grad(loss))(bank_variables(kind)).jaxpr, "cond")

    assert matmuls("dots") == matmuls("none") < matmuls("full")


@each_kind
def test_dropout_acts_in_training_only(kind):
    (x, is_valid, position), _ = inputs()
    variables, run = variables_of(kind), compiled(kind, dropout=0.5)
    still = run(variables, x, is_valid, position)
    plain = compiled(kind)(variables, x, is_valid, position)
    np.testing.assert_array_equal(still.output, plain.output)
    trained = [
        run(variables, x, is_valid, position, is_training=True, rngs={"dropout": jax.random.key(i)})
        for i in (0, 0, 1)
    ]
    np.testing.assert_array_equal(trained[0].output, trained[1].output)
    assert not np.array_equal(trained[0].output, trained[2].output)
    assert not np.array_equal(trained[0].output, still.output)


def test_each_expert_of_a_bank_drops_its_own_units():
    x, is_valid, position = inputs()[1]
    same = jnp.broadcast_to(x[:1], x.shape)
    bank = ExpertBank(make("mlp", dropout=0.5), num_experts=E)
    shared = jax.tree.map(lambda a: jnp.broadcast_to(a[:1], a.shape), bank_variables("mlp"))
    run = jax.jit(bank.apply, static_argnums=4)
    out = run(shared, same, is_valid, position, True, rngs={"dropout": jax.random.key(0)}).output
    assert not np.array_equal(out[0], out[1])


def test_a_bank_refuses_another_number_of_buffers():
    x, is_valid, position = inputs()[1]
    bank = ExpertBank(make("mlp"), num_experts=E + 1)
    with pytest.raises(ValueError, match=r"x must have a leading axis of num_experts=4, got \(3,"):
        bank.init(jax.random.key(0), x, is_valid, position)


def test_a_single_specialist_is_perfectly_sharp():
    (x, is_valid, position), _ = inputs()
    one = SpecializedExpert(H, O, num_heads=2, num_specialists=1)
    variables = random_variables(one.init, x, is_valid, position)

    @jax.jit
    def both(variables):
        hidden = one.apply(variables, x, is_valid, position, method="process")
        own = variables["params"]["specialists"]
        mixed = jax.nn.gelu(hidden @ own["kernel"][:, 0] + own["bias"][None], approximate=False)
        return one.apply(variables, mixed, method="decode"), one.apply(
            variables, x, is_valid, position
        )

    expected, out = both(variables)
    np.testing.assert_allclose(out.confidence, expected.confidence, rtol=1e-5)
    np.testing.assert_allclose(out.output, expected.output, rtol=1e-5, atol=1e-6)
