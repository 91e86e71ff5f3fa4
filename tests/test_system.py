"""The whole system: every kind and context, one compiled step that writes, and queries."""

import functools

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from random_variables import random_variables

from moe_jax import KnowledgeGraph, MoESystem
from moe_jax.config import tiny
from moe_jax.experts import EXPERTS
from moe_jax.graph import TEMPORAL, neighbours
from moe_jax.interop.faiss import FaissIndex
from moe_jax.librarian import Proposals
from moe_jax.ops import normalize
from moe_jax.system import search_reports

B, S, D, E = 8, 16, 16, 4


def small(**changes):
    sizes = {"input_dim": D, "hidden_dim": 16, "output_dim": 8, "num_experts": E, "expert": "mlp"}
    return tiny().replace(**{**sizes, "eval_capacity_factor": 4.0, **changes})


@functools.cache
def system_of(**changes):
    return MoESystem(small(**changes))


@functools.cache
def compiled(**changes):
    return jax.jit(system_of(**changes).apply, static_argnames="is_training")


@functools.cache
def variables_of(**changes):
    system = system_of(**changes)
    return random_variables(system.init, inputs(), system.create_graph())


@functools.cache
def inputs(seed=0):
    x = np.random.default_rng(seed).normal(size=(B, S, D))
    return jnp.asarray(x, jnp.float32)


@functools.cache
def compiled_query(k):
    return jax.jit(functools.partial(system_of().query, k=k))


def source():
    return jnp.stack([jnp.arange(B), 100 * jnp.arange(B)], axis=1)


@pytest.mark.parametrize("context", ["routed", "sequence"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_shapes_of_every_kind_in_every_context(expert, context):
    system = system_of(
        expert=expert, expert_context=context, memory_read=True, compute_dtype="bfloat16"
    )
    out, variables = jax.eval_shape(
        system.init_with_output, jax.random.key(0), inputs(), system.create_graph()
    )
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert (out.output.shape, out.output.dtype) == ((B, S, 8), jnp.bfloat16)
    assert (out.confidence.shape, out.confidence.dtype) == ((B, S), jnp.float32)
    assert out.plan.expert.shape == (B, S, 2)
    assert out.reports.summary.shape == out.proposals.key.shape == (B * E, 8)
    assert out.reports.positions.shape == (B * E, 4)
    assert out.stats.load.shape == (E,)
    assert {(a.shape, a.dtype) for a in out.losses} == {((), jnp.dtype("float32"))}


@pytest.mark.parametrize("gating_type", ["topk", "noisy_topk", "dense"])
def test_gatings(gating_type):
    init = functools.partial(system_of(gating_type=gating_type).init_with_output)
    keys = {name: jax.random.key(0) for name in ("params", "router", "dropout")}
    out, _ = jax.eval_shape(functools.partial(init, is_training=True), keys, inputs())
    assert out.plan.expert.shape == (B, S, E if gating_type == "dense" else 2)


def test_losses_add_up_as_configured():
    changes = {"librarian_contrastive_weight": 0.5, "router_z_weight": 0.25}
    changes |= {"load_balance_weight": 2.0}
    out = compiled(**changes)(variables_of(**changes), inputs())
    losses = jax.tree.map(float, out.losses)
    assert min(losses.load_balance, losses.router_z, losses.contrastive) > 0
    weighted = 2 * losses.load_balance + 0.25 * losses.router_z + 0.5 * losses.contrastive
    np.testing.assert_allclose(losses.total, weighted, rtol=1e-6)


def test_the_contrastive_loss_trains_the_librarian():
    changes = {"librarian_contrastive_weight": 0.5}
    run, variables = compiled(**changes), variables_of(**changes)
    gradient = jax.jit(jax.grad(lambda v: run(v, inputs()).losses.total))(variables)["params"]
    assert np.any(gradient["librarian"]["encoder_out"]["kernel"] != 0)
    # Reports are cut off: the experts do not learn to please the librarian.
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient["constellation"]["bank"]))


def test_padding_never_matters():
    x = inputs()
    is_valid = jnp.arange(S)[None] < jnp.arange(S - B, S)[:, None]
    variables = variables_of(expert="transformer")
    run = compiled(expert="transformer")
    out = run(variables, x, is_valid=is_valid)
    garbage = jnp.where(is_valid[..., None], x, 50.0 * inputs(1))
    other = run(variables, garbage, is_valid=is_valid)
    np.testing.assert_array_equal(out.output, other.output)
    for name in ("reports", "proposals", "losses", "stats"):
        jax.tree.map(np.testing.assert_array_equal, getattr(out, name), getattr(other, name))


@pytest.mark.parametrize(
    "changes", [{"expert": "transformer"}, {"dispatch": "dropless"}, {"memory_read": True}], ids=str
)
def test_nan_in_padding_reaches_no_output_and_no_gradient(changes):
    x, graph = inputs(), system_of(**changes).create_graph()
    is_valid = jnp.arange(S)[None] < jnp.arange(S - B, S)[:, None]
    run = compiled(**changes)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def step(params, x):
        variables = {**variables_of(**changes), "params": params}
        out = run(variables, x, graph, is_valid=is_valid)
        return jnp.sum(out.output**2) + out.losses.total, out.output

    params = variables_of(**changes)["params"]
    wanted = step(params, jnp.where(is_valid[..., None], x, 0.0))
    got = step(params, jnp.where(is_valid[..., None], x, jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_rows_do_not_leak():
    variables, run = variables_of(expert="transformer"), compiled(expert="transformer")
    everywhere = jnp.ones((B, S), bool)
    before = run(variables, inputs(), is_valid=everywhere)
    after = run(variables, inputs().at[1:].multiply(-1.0), is_valid=everywhere)
    np.testing.assert_array_equal(before.output[0], after.output[0])
    assert not np.array_equal(before.output[1:], after.output[1:])
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[:E], b[:E]), before.reports, after.reports
    )


@functools.cache
def written():
    """A graph after one step, the step's results and the compiled step."""
    step = system_of().inference_step()
    graph, out, info = step(variables_of(), system_of().create_graph(), inputs(), None, source())
    return graph, out, info, step


def test_a_step_writes_what_the_librarian_kept():
    graph, out, info, _ = written()
    assert out.reads is None
    np.testing.assert_array_equal(info.created | info.merged, out.proposals.is_kept)
    assert not np.any(info.rejected)
    assert graph.num_live == info.created.sum() > 0
    assert graph.clock == 1
    assert graph.hits.sum() == out.reports.is_valid.sum()
    assert np.any(graph.edge_target < graph.num_nodes)
    for r in np.flatnonzero(info.created & ~info.merged):
        node = int(info.node_id[r])
        np.testing.assert_array_equal(graph.key[node], normalize(out.proposals.key[r]))
    live = np.asarray(graph.is_live)
    documents = np.asarray(graph.source)[live]
    assert np.all(documents[:, 1] // 100 == documents[:, 0])
    assert np.all(documents[:, 1] % 100 < S)


def test_a_write_links_the_reports_of_a_document():
    system = system_of(kg_link_stream=True, kg_link_threshold=1.0, kg_link_symmetric=True)
    rows = 5
    proposals = Proposals(
        key=jnp.eye(8)[:rows],
        value=jnp.eye(8)[:rows],
        confidence=jnp.ones(rows),
        expert_id=jnp.zeros(rows, jnp.int32),
        source=jnp.array([[3, 9], [-1, 0], [3, 2], [4, 1], [3, 4]]),
        weight=jnp.ones(rows, jnp.int32),
        leader=jnp.arange(rows),
        is_kept=jnp.ones(rows, bool),
    )
    graph, info = jax.jit(system.write)(system.create_graph(), proposals)
    edges = neighbours(graph, info.node_id, kind=TEMPORAL)
    nowhere = graph.num_nodes
    np.testing.assert_array_equal(edges.ids[:, 0], [nowhere, nowhere, 4, nowhere, 0])
    assert not np.any(edges.is_valid[:, 1:])


def test_five_steps_stay_on_the_device_and_are_traced_once():
    system = system_of(memory_read=True)
    step = system.inference_step()
    variables = jax.device_put(variables_of(memory_read=True))
    batches = [jax.device_put((inputs(i), jnp.ones((B, S), bool), source())) for i in range(5)]
    graph = jax.device_put(system.create_graph())
    live = []
    with jax.transfer_guard("disallow"):
        for x, is_valid, where in batches:
            graph, _, _ = step(variables, graph, x, is_valid, where)
            live.append(graph.num_live)
    assert step._cache_size() == 1
    assert graph.clock == 5
    assert 0 < live[0] < live[-1] == graph.num_live


def test_a_full_graph_goes_on_learning_and_what_is_not_seen_again_expires():
    system = system_of(max_kg_nodes=8, kg_ttl=2, kg_policy="least_used")
    write, graph = jax.jit(system.write), system.create_graph()
    ints = jnp.ones(5, jnp.int32)
    like = Proposals(
        key=jnp.zeros((5, 8)),
        value=jnp.zeros((5, 8)),
        confidence=jnp.linspace(0.1, 0.9, 5),
        expert_id=ints,
        source=jnp.stack([ints, ints], axis=1),
        weight=ints,
        leader=jnp.arange(5),
        is_kept=ints > 0,
    )
    for seed in range(4):
        key = jax.random.normal(jax.random.key(seed), like.key.shape)
        graph, info = write(graph, like._replace(key=normalize(key), value=key))
        assert not np.any(info.rejected)
        sources = np.flatnonzero(np.any(np.asarray(graph.edge_target) < 8, axis=1))
        assert np.all(np.asarray(graph.is_live)[sources])
    assert (int(graph.num_live), int(graph.num_evicted)) == (8, 12)
    nothing = like._replace(is_kept=jnp.zeros(5, bool))
    graph, _ = write(graph._replace(clock=graph.clock + 2), nothing)
    assert int(graph.num_live) == 5
    graph, _ = write(graph._replace(clock=graph.clock + 1), nothing)
    assert int(graph.num_live) == 0


def test_query_finds_what_was_written():
    graph, out, info, _ = written()
    hits = compiled_query(3)(variables_of(), graph, inputs())
    assert hits.ids.shape == (B, 3)
    nodes = np.asarray(info.node_id).reshape(B, E)
    kept = np.asarray(out.proposals.is_kept).reshape(B, E)
    for b in range(B):
        if kept[b].any():
            np.testing.assert_allclose(hits.scores[b, : kept[b].sum()], 1.0, atol=1e-6)
        own = set(nodes[b][kept[b]].tolist())
        exact = set(np.asarray(hits.ids[b])[np.asarray(hits.scores[b]) > 1 - 1e-6].tolist())
        assert exact & own == exact or len(own) > 3
        found = np.asarray(hits.ids[b])[np.asarray(hits.is_valid[b])].tolist()
        assert len(set(found)) == len(found)
    assert np.all(np.diff(hits.scores, axis=1) <= 0)


def test_query_keeps_each_nodes_best_hit():
    graph, out, _, _ = written()
    k = 6
    hits = search_reports(graph, out, k)
    key, valid = np.asarray(out.proposals.key), np.asarray(out.reports.is_valid)
    cosine = np.where(valid[:, None], key @ np.asarray(graph.key).T, -np.inf)
    best = cosine.reshape(B, E, -1).max(axis=1)
    best[:, ~np.asarray(graph.is_live)] = -np.inf
    np.testing.assert_allclose(hits.scores, -np.sort(-best, axis=1)[:, :k], atol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(best, np.asarray(hits.ids), axis=1), hits.scores, atol=1e-5
    )


def test_query_has_no_hits_without_nodes():
    empty = compiled_query(3)(variables_of(), system_of().create_graph(), inputs())
    assert not np.any(empty.is_valid)
    np.testing.assert_array_equal(empty.ids, 64)


def test_faiss_gives_the_same_answers():
    pytest.importorskip("faiss")
    index = FaissIndex(system_of().create_graph())
    graph, out = written()[0], compiled()(variables_of(), inputs(1))
    threshold = float(jnp.median(search_reports(graph, out, 4).scores))
    ours = search_reports(graph, out, 4, threshold=threshold)
    assert np.all(np.asarray(ours.scores)[np.asarray(ours.is_valid)] >= threshold)
    theirs = search_reports(graph, out, 4, threshold=threshold, index=index)
    assert 0 < ours.is_valid.sum() < ours.is_valid.size
    np.testing.assert_array_equal(ours.is_valid, theirs.is_valid)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    empty = search_reports(system_of().create_graph(), out, 4, index=index)
    assert not np.any(empty.is_valid)


def test_the_config_chooses_faiss(monkeypatch):
    pytest.importorskip("faiss")
    asked = []
    search = FaissIndex.search

    def spy(index, *arguments):
        asked.append(index)
        return search(index, *arguments)

    monkeypatch.setattr(FaissIndex, "search", spy)
    graph, out = written()[0], compiled()(variables_of(), inputs(1))
    monkeypatch.setattr("moe_jax.system.model.infer", lambda *_: out)
    system, ours = system_of(use_faiss=True), system_of()
    for now in (system.create_graph(), graph):
        hits = system.query(variables_of(), now, inputs(), k=2)
        np.testing.assert_array_equal(hits.ids, ours.query(variables_of(), now, inputs(), k=2).ids)
    assert len(asked) == 2
    assert asked[0] is asked[1]


def test_wrong_calls_are_refused():
    run = compiled()
    with pytest.raises(ValueError, match=r"x must have shape \[B, S, input_dim=16\], got \(8, 16,"):
        run(variables_of(), inputs()[..., :5])
    reader = system_of(memory_read=True)
    with pytest.raises(ValueError, match="graph must be given when memory_read=True, got None"):
        jax.eval_shape(reader.init, jax.random.key(0), inputs())
    with pytest.raises(ValueError, match="graph must have width output_dim=8, got 4"):
        jax.eval_shape(reader.init, jax.random.key(0), inputs(), KnowledgeGraph.create(8, 4))
    with pytest.raises(ValueError, match='report_scope must not be "none" to write a graph'):
        system_of(report_scope="none").inference_step()


@pytest.mark.parametrize("scope", ["batch", "none"])
def test_queries_need_a_report_per_sequence(scope):
    # As many reports per batch as would make one per sequence do not pass for such.
    system, x = system_of(report_scope=scope), inputs()[:2]
    graph = system.create_graph()
    variables = jax.eval_shape(system.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match='report_scope must be "sequence" to query by sequence'):
        jax.eval_shape(functools.partial(system.query, k=2), variables, graph, x)


def test_nnx_users_can_wrap_it():
    system = system_of()
    model = nnx.bridge.ToNNX(system, rngs=nnx.Rngs(0))
    nnx.jit(nnx.bridge.lazy_init)(model, inputs())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected = compiled()({"params": params}, inputs())
    out = nnx.jit(lambda model, x: model(x))(model, inputs())
    np.testing.assert_allclose(out.output, expected.output, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(out.plan.expert, expected.plan.expert)


def test_sharded_equals_unsharded():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == B
    run, variables = compiled(expert="transformer"), variables_of(expert="transformer")
    valid = jnp.ones((B, S), bool)
    whole = run(variables, inputs(), is_valid=valid)
    over_batch = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    x, valid = jax.device_put((inputs(), valid), over_batch)
    out = run(jax.device_put(variables, everywhere), x, is_valid=valid)
    assert len(out.output.sharding.device_set) == B
    np.testing.assert_allclose(out.output, whole.output, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out.proposals.leader, whole.proposals.leader)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), out.stats, whole.stats
    )
    jax.tree.map(
        np.testing.assert_array_equal, out.plan._replace(weight=0), whole.plan._replace(weight=0)
    )
