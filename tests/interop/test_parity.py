"""The original system's numbers, reproduced in float32 within 1e-4, integers exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden import load

from moe_jax import MoESystem
from moe_jax.config import original
from moe_jax.experts import SpecializedExpert, TransformerExpert
from moe_jax.interop import torch as interop
from moe_jax.librarian import Librarian
from moe_jax.ops import exact_cosine, normalize
from moe_jax.reports import batch_reports
from moe_jax.routing import usage_mse_loss
from moe_jax.supervisor import Supervisor

HEADS = 8
TOLERANCE = 1e-4


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("expert.npz", TransformerExpert), ("specialized_expert.npz", SpecializedExpert)],
)
def test_expert(name, kind):
    golden, state = load(name)
    x = jnp.asarray(golden["x"])
    batch, length, _ = x.shape
    hidden, output = state["encoder.0.weight"].shape[0], state["decoder.3.weight"].shape[0]
    fields = {"hidden_dim": hidden, "output_dim": output, "num_heads": HEADS}
    if kind is SpecializedExpert:
        fields["num_specialists"] = state["specialist_router.weight"].shape[0]
    valid = jnp.ones((batch, length), bool)
    position = jnp.broadcast_to(jnp.arange(length), (batch, length))
    out = kind(**fields).apply({"params": interop.expert_params(state)}, x, valid, position)
    close(out.output, golden["output"])
    close(out.confidence, golden["confidence"])
    num_positions = golden["report_top_k_indices"].shape[0]
    report = batch_reports(
        jax.tree.map(lambda a: a[None], out),
        valid[None],
        position[None],
        length=length,
        num_positions=num_positions,
    )
    close(report.summary[0], golden["report_summary"])
    close(report.confidence[0], golden["report_avg_confidence"])
    np.testing.assert_array_equal(report.positions[0], golden["report_top_k_indices"])


def test_supervisor():
    golden, state = load("supervisor.npz")
    embeddings = jnp.asarray(golden["expert_embeddings"])
    top_k = golden["expert_indices"].shape[-1]
    supervisor = Supervisor(embeddings.shape[0], top_k, HEADS, residual=False)
    variables = {"params": interop.supervisor_params(state)}
    out = supervisor.apply(variables, jnp.asarray(golden["x"]), embeddings)
    close(out.logits, golden["gate_logits"])
    np.testing.assert_array_equal(out.choices.expert, golden["expert_indices"])
    close(out.choices.weight, golden["gating_weights"])
    close(usage_mse_loss(out.logits), golden["load_balancing_loss"])


def test_librarian():
    golden, state = load("librarian.npz")
    summaries = jnp.asarray(golden["summaries"])
    rows = summaries.shape[0]
    librarian = Librarian(float(golden["threshold"]), "any_earlier", residual=False)
    variables = {"params": interop.librarian_params(state)}
    key = normalize(librarian.apply(variables, summaries, method="encode"))
    close(exact_cosine(key, key), golden["similarity"])
    reports = batch_reports_of(summaries)
    proposals = librarian.apply(variables, reports)
    np.testing.assert_array_equal(np.flatnonzero(proposals.is_kept), golden["kept"])
    assert int(proposals.weight.sum()) == rows


def batch_reports_of(summaries):
    from moe_jax import DraftReports

    rows = summaries.shape[0]
    return DraftReports(
        summary=summaries,
        confidence=jnp.ones(rows),
        expert_id=jnp.arange(rows),
        sequence=jnp.zeros(rows, int),
        positions=jnp.zeros((rows, 1), int),
        source=jnp.zeros((rows, 2), int),
        is_valid=jnp.ones(rows, bool),
    )


def system_of(state, x, top_k, num_positions=4):
    hidden, width = state["experts.0.encoder.0.weight"].shape
    config = original().replace(
        input_dim=width,
        hidden_dim=hidden,
        output_dim=state["experts.0.decoder.3.weight"].shape[0],
        num_experts=state["constellation.expert_embeddings"].shape[0],
        top_k_experts=top_k,
        dropout=0.0,
        max_kg_nodes=64,
        report_positions=num_positions,
    )
    return MoESystem(config), interop.from_state_dict(state, config)


# The files do not say how many experts each token gets; the supervisor's file does.
def top_k_of_the_original():
    golden, _ = load("supervisor.npz")
    return golden["expert_indices"].shape[-1]


def test_constellation():
    golden, state = load("constellation.npz")
    x = jnp.asarray(golden["x"])
    system, variables = system_of(state, x, top_k_of_the_original())
    out = jax.jit(system.apply)(variables, x)
    close(out.output, golden["output"])
    reports = out.reports
    chosen = np.asarray(reports.expert_id)[np.asarray(reports.is_valid)]
    np.testing.assert_array_equal(chosen, np.unique(golden["report_expert_ids"]))
    for row, expert in enumerate(golden["report_expert_ids"]):
        close(reports.summary[expert], golden["report_summaries"][row])
        close(reports.confidence[expert], golden["report_avg_confidence"][row])


def test_training():
    golden, last = load("training.npz")
    _, first = load("constellation.npz")
    x, target = jnp.asarray(golden["x"]), jnp.asarray(golden["target"])
    system, variables = system_of(first, x, top_k_of_the_original())
    optimizer = optax.chain(
        optax.clip_by_global_norm(float(golden["clip"])),
        optax.adamw(float(golden["lr"]), weight_decay=float(golden["weight_decay"])),
    )

    def loss_of(params):
        out = system.apply({"params": params}, x)
        weight = float(golden["load_balance_weight"])
        return jnp.mean((out.output - target) ** 2) + weight * out.losses.load_balance

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, optax.tree.norm(grads)

    # The original's optimizer leaves alone what got no gradient: the librarian here.
    params = jax.tree.map(jnp.asarray, variables["params"])
    librarian = params.pop("librarian")
    frozen = loss_of
    loss_of = lambda params: frozen({**params, "librarian": librarian})  # noqa: E731
    state = optimizer.init(params)
    losses, norms = [], []
    for _ in golden["losses"]:
        params, state, loss, norm = step(params, state)
        losses.append(float(loss))
        norms.append(float(norm))
    close(losses, golden["losses"])
    close(norms, golden["grad_norms"])
    ours = interop.to_state_dict({"params": {**params, "librarian": librarian}})
    for name in ("supervisor.gate.0.weight", "constellation.expert_embeddings"):
        close(ours[name], last[name])


def test_round_trip_keeps_every_array():
    _, state = load("constellation.npz")
    system, variables = system_of(state, None, top_k_of_the_original())
    back = interop.to_state_dict(variables)
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)
    with pytest.raises(ValueError, match="unknown names: mystery"):
        interop.from_state_dict({**state, "mystery": np.ones(1)}, system.config)
    lacking = {k: v for k, v in state.items() if not k.endswith("experts.1.encoder.0.bias")}
    with pytest.raises(ValueError, match=r"lacks 'encoder\.0\.bias'"):
        interop.from_state_dict(lacking, system.config)
    with pytest.raises(ValueError, match=r"config\.hidden_dim"):
        interop.from_state_dict(state, system.config.replace(hidden_dim=128))
