"""The constellation: only chosen experts count, in either context, and reports tell of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.constellation import Constellation
from moe_jax.experts import ExpertBank, MLPExpert, TransformerExpert
from moe_jax.ops.grouped import BLOCK, _portable
from moe_jax.supervisor import Supervisor

B, S, D, O, E, K = 2, 16, 8, 4, 4, 2  # noqa: E741


@functools.cache
def compiled(expert="mlp", dropout=0.0, **fields):
    if expert == "mlp":
        one = MLPExpert(16, O, dropout=dropout)
    else:
        causal = expert == "causal"
        one = TransformerExpert(8, O, num_heads=2, dropout=dropout, causal=causal)
    constellation = Constellation(
        Supervisor(num_experts=E, top_k=K, num_heads=2), ExpertBank(one, E), **fields
    )
    return jax.jit(constellation.init), jax.jit(constellation.apply, static_argnames="is_training")


@functools.cache
def inputs():
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    is_valid = np.arange(S) < np.array([[S], [11]])
    return x, is_valid


@functools.cache
def variables_of(expert="mlp"):
    return compiled(expert)[0](jax.random.key(0), inputs()[0])


AMPLE = {"eval_capacity_factor": 100.0}


def test_routed_equals_sequence_context_without_attention():
    x, is_valid = inputs()
    routed = compiled(**AMPLE)[1](variables_of(), x, is_valid=is_valid)
    whole = compiled(context="sequence")[1](variables_of(), x, is_valid=is_valid)
    np.testing.assert_allclose(routed.output, whole.output, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(routed.confidence, whole.confidence, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, routed.plan.expert, whole.plan.expert)
    np.testing.assert_array_equal(routed.plan.is_kept, whole.plan.is_kept)


@pytest.mark.parametrize(
    ("expert", "scope"),
    [("mlp", "sequence"), ("mlp", "batch"), ("transformer", "sequence"), ("causal", "none")],
)
def test_dropless_equals_slots_for_all(expert, scope):
    """Outputs, reports and gradients; only the meaning of a slot differs."""
    x, is_valid = inputs()
    fields = {"report_scope": scope, **AMPLE}
    runs = compiled(expert, **fields)[1], compiled(expert, dispatch="dropless", **fields)[1]

    def with_gradient(run):
        def loss(variables, x):
            out = run(variables, x, is_valid=is_valid)
            return jnp.sum(jnp.sin(out.output)) + jnp.sum(out.confidence), out

        gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, out), grads = jax.jit(gradient)(variables_of(expert), x)
        return out._replace(plan=out.plan._replace(slot=0)), grads

    found, expected = map(with_gradient, runs)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found, expected
    )


@pytest.mark.parametrize("expert", ["mlp", "transformer", "causal"])
def test_what_lies_after_the_last_expert_may_be_anything(expert, monkeypatch):
    """The kernels for GPUs do not write there, and nobody may read it, for no gradient either."""
    x, is_valid = inputs()
    x = x[:1, :1] + 1e-3 * x  # to the same experts, which leaves blocks to no one
    product = _portable.rows_by_matrices

    def poisoned(x, w, groups):
        is_used = jnp.repeat(groups.block_group < groups.num_groups, BLOCK)
        return jnp.where(is_used[:, None], product(x, w, groups), jnp.nan)

    def run():
        apply = compiled.__wrapped__(expert, dispatch="dropless", report_scope="sequence")[1]

        def loss(variables, x):
            out = apply(variables, x, is_valid=is_valid)
            return jnp.sum(jnp.sin(out.output)) + jnp.sum(out.confidence), out

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables_of(expert), x)

    expected = run()
    assert len(np.unique(np.asarray(expected[1].plan.expert)[is_valid])) < E
    monkeypatch.setattr(_portable, "rows_by_matrices", poisoned)
    jax.tree.map(np.testing.assert_array_equal, run(), expected)


def test_dropless_computes_every_choice_however_they_fall():
    """All tokens to the same experts, which slots for a fair share would not hold."""
    x, is_valid = inputs()
    variables = jax.tree.map(jnp.copy, variables_of())
    same = jnp.broadcast_to(jnp.asarray(x[:1, :1]), x.shape)
    few = compiled(eval_capacity_factor=0.5)[1](variables, same, is_valid=is_valid)
    all_ = compiled(dispatch="dropless")[1](variables, same, is_valid=is_valid)
    kept = np.asarray(all_.plan.is_kept)
    np.testing.assert_array_equal(kept, np.broadcast_to(is_valid[..., None], kept.shape))
    assert np.sum(few.plan.is_kept) < kept.sum()
    assert len(np.unique(np.asarray(all_.plan.expert)[kept])) == K
    outputs = np.asarray(all_.output)[is_valid]
    np.testing.assert_allclose(outputs, np.broadcast_to(outputs[:1], outputs.shape), rtol=1e-5)
    assert np.any(outputs)


def test_the_output_is_a_weighted_sum_of_the_chosen_experts():
    x, _ = inputs()
    variables = variables_of()
    out = compiled(eval_capacity_factor=0.5)[1](variables, x)
    kept = np.asarray(out.plan.is_kept)
    assert not np.all(kept)
    experts = variables["params"]["bank"]["expert"]
    expected, sure = np.zeros((B, S, O)), np.zeros((B, S))
    one = jax.jit(MLPExpert(16, O).apply)
    for e in range(E):
        own = {"params": jax.tree.map(lambda a, e=e: a[e], experts)}
        alone = one(own, x, jnp.ones((B, S), bool), jnp.zeros((B, S), int))
        share = np.sum(out.plan.weight * ((out.plan.expert == e) & kept), axis=-1)
        expected += share[..., None] * alone.output
        sure += share * alone.confidence
    np.testing.assert_allclose(out.output, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out.confidence, sure, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("context", ["routed", "sequence"])
@pytest.mark.parametrize("expert", ["mlp", "transformer"])
def test_padding_outputs_zero_and_changes_nothing(expert, context):
    x, is_valid = inputs()
    run, variables = compiled(expert, context=context, **AMPLE)[1], variables_of(expert)
    out = run(variables, x, is_valid=is_valid)
    np.testing.assert_array_equal(np.asarray(out.output)[~is_valid], 0.0)
    np.testing.assert_array_equal(np.asarray(out.confidence)[~is_valid], 0.0)
    garbage = np.where(is_valid[..., None], x, 100.0 * x[::-1])
    other = run(variables, garbage, is_valid=is_valid)
    np.testing.assert_array_equal(out.output, other.output)
    jax.tree.map(np.testing.assert_array_equal, out.reports, other.reports)


def test_padding_equals_a_shorter_sequence():
    x, is_valid = inputs()
    run, variables = compiled("transformer", **AMPLE)[1], variables_of("transformer")
    padded = run(variables, x, is_valid=is_valid)
    # The capacity is a multiple of eight, so cut both to eleven with room for all.
    short = run(variables, x[:, :11])
    np.testing.assert_allclose(padded.output[1, :11], short.output[1], rtol=1e-5, atol=1e-6)
    for name in ("summary", "confidence", "is_valid"):
        a, b = (getattr(o.reports, name).reshape(B, E, -1)[1] for o in (padded, short))
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("context", ["routed", "sequence"])
def test_rows_do_not_leak(context):
    x, is_valid = inputs()
    run, variables = compiled("transformer", context=context, **AMPLE)[1], variables_of(
        "transformer"
    )  # fmt: skip
    before = run(variables, x, is_valid=is_valid)
    after = run(variables, np.stack([x[0], -x[1]]), is_valid=is_valid)
    np.testing.assert_array_equal(before.output[0], after.output[0])
    assert not np.array_equal(before.output[1], after.output[1])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[:E], b[:E]), before.reports, after.reports
    )


def test_training_and_evaluation_capacities():
    x, _ = inputs()
    run = compiled(capacity_factor=0.5, **AMPLE)[1]
    assert np.all(run(variables_of(), x).plan.is_kept)
    kept = run(variables_of(), x, is_training=True).plan.is_kept
    assert 0 < kept.sum() < kept.size


def test_reports_name_kept_tokens_of_their_expert():
    x, is_valid = inputs()
    source = np.array([[3, 40], [5, 60]], np.int32)
    out = compiled(eval_capacity_factor=0.5)[1](variables_of(), x, is_valid=is_valid, source=source)
    reports, plan = out.reports, jax.tree.map(np.asarray, out.plan)
    for r in range(B * E):
        b, e = divmod(r, E)
        assert (int(reports.sequence[r]), int(reports.expert_id[r])) == (b, e)
        tokens = np.nonzero(np.any((plan.expert[b] == e) & plan.is_kept[b], axis=-1))[0]
        named = np.asarray(reports.positions[r])
        assert set(named[named < S]) <= set(tokens)
        assert np.sum(named < S) == min(len(tokens), 4)
        assert bool(reports.is_valid[r]) == bool(len(tokens))
        if len(tokens):
            np.testing.assert_array_equal(reports.source[r], source[b] + np.array([0, named[0]]))


def test_unused_experts_do_not_report():
    x = np.zeros((B, S, D), np.float32)  # alike tokens all choose the same two experts
    out = compiled(**AMPLE)[1](variables_of(), x)
    chosen = set(np.asarray(out.plan.expert[0, 0]).tolist())
    valid = np.asarray(out.reports.is_valid).reshape(B, E)
    assert [e in chosen for e in range(E)] == valid[0].tolist() == valid[1].tolist()
    np.testing.assert_array_equal(np.asarray(out.reports.summary)[~valid.ravel()], 0.0)


@pytest.mark.parametrize("context", ["routed", "sequence"])
def test_one_report_per_expert_in_batch_scope(context):
    x, is_valid = inputs()
    run = compiled(context=context, report_scope="batch", **AMPLE)[1]
    reports = run(variables_of(), x, is_valid=is_valid).reports
    assert reports.summary.shape == (E, O)
    np.testing.assert_array_equal(reports.expert_id, np.arange(E))
    assert compiled(report_scope="none")[1](variables_of(), x).reports is None


def test_slots_can_be_shared_by_the_batch():
    x, is_valid = inputs()
    run = compiled(group="batch", report_scope="batch", **AMPLE)[1]
    shared = run(variables_of(), x, is_valid=is_valid)
    own = compiled(**AMPLE)[1](variables_of(), x, is_valid=is_valid)
    np.testing.assert_allclose(shared.output, own.output, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(shared.plan.is_kept, own.plan.is_kept)
    # Slots of one expert are now distinct over the whole batch.
    plan = jax.tree.map(np.asarray, shared.plan)
    for e in range(E):
        used = plan.slot[(plan.expert == e) & plan.is_kept]
        np.testing.assert_array_equal(np.sort(used), np.arange(len(used)))
    by_sequence = compiled(report_scope="batch", **AMPLE)[1]
    source = jnp.stack([jnp.arange(B) * 7, jnp.arange(B) * 100], axis=1)
    reports = run(variables_of(), x, is_valid=is_valid, source=source).reports
    row, first = np.asarray(reports.sequence), np.asarray(reports.positions)[:, 0]
    chosen = np.asarray(shared.plan.expert)
    exists = np.asarray(reports.is_valid)
    assert set(row[exists]) > {0}
    for e in np.flatnonzero(exists):
        assert e in chosen[row[e], first[e]]  # the position is in that sequence
        np.testing.assert_array_equal(reports.source[e], [7 * row[e], 100 * row[e] + first[e]])
    own = by_sequence(variables_of(), x, is_valid=is_valid, source=source).reports
    np.testing.assert_allclose(reports.confidence, own.confidence, rtol=1e-5)


def test_no_gradient_flows_through_reports():
    x, _ = inputs()
    run = compiled(**AMPLE)[1]

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def of_reports(variables, x):
        reports = run(variables, x).reports
        return jnp.sum(reports.summary**2) + jnp.sum(reports.confidence), reports.summary

    gradient, summary = of_reports(variables_of(), x)
    assert np.any(summary != 0)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_gradients_reach_experts_and_supervisor():
    x, _ = inputs()
    run = compiled(**AMPLE)[1]
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(run(v, x).output ** 2)))(variables_of())
    gradient = gradient["params"]
    for name in ("up", "down"):
        assert np.any(gradient["bank"]["expert"][name]["kernel"] != 0)
    assert np.any(gradient["supervisor"]["gate_out"]["kernel"] != 0)
    assert np.any(gradient["expert_embeddings"] != 0)
