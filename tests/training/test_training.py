"""The training step, the loop, checkpoints and exact resume."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import CheckpointError, Checkpoints, GraphCheckpoints, complete_steps
from moe_jax.config import smallest_run
from moe_jax.data import load_corpus, training_batches
from moe_jax.experts import ExpertBank, MLPExpert
from moe_jax.graph import KnowledgeGraph, insert
from moe_jax.lm import MoELanguageModel
from moe_jax.training import (
    DivergedError,
    create_graph,
    create_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
    matrix_copies,
    read_metrics,
    train,
    with_copies,
)
from moe_jax.training.loop import Keeper

CONFIG = smallest_run()
ONE_LAYER = CONFIG.replace(model=CONFIG.model.replace(num_layers=1))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = np.array(["def ", "return ", "x", "(y)", ":\n", "    ", "import os\n", "for i in z"])
    for i in range(40):
        (folder / f"f{i}.py").write_text("".join(rng.choice(words, 60)))
    return load_corpus([folder])


def setup(config, corpus):
    model, optimizer = MoELanguageModel(config.model), make_optimizer(config.training)
    state = create_state(model, optimizer, jax.random.key(0))
    c = config.training
    batches = training_batches(corpus, batch_size=c.batch_size, seq_len=c.seq_len, seed=0)
    return model, state, make_train_step(model, optimizer, config), batches


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)


def with_training(config=CONFIG, **changes):
    return config.replace(training=config.training.replace(**changes))


def dropless(config):
    moe = config.model.moe.replace(dispatch="dropless")
    return config.replace(model=config.model.replace(moe=moe))


@pytest.mark.parametrize("config", [CONFIG, dropless(ONE_LAYER)], ids=["capacity", "dropless"])
def test_step_is_traced_once_and_never_leaves_the_device(corpus, config):
    model, state, step, batches = setup(config, corpus)
    graph, key = create_graph(model), jax.random.key(1)
    inputs = [jax.device_put(batches[i]) for i in range(5)]
    step(*jax.tree.map(jnp.copy, (state, graph)), inputs[0], key)
    with jax.transfer_guard("disallow"):
        for batch in inputs:
            state, graph, metrics = step(state, graph, batch, key)
        jax.block_until_ready(metrics)
    assert step._cache_size() == 1
    assert int(state.step) == 5
    assert int(metrics.graph_nodes) > 0


def test_training_lowers_the_loss(corpus):
    config = with_training(steps=60, learning_rate=1e-2, memory_write=False)
    model, state, step, batches = setup(config, corpus)
    graph, key, losses = create_graph(model), jax.random.key(1), []
    for i in range(60):
        state, graph, metrics = step(state, graph, jax.device_put(batches[i]), key)
        losses.append(float(metrics.loss))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    assert int(graph.num_live) == 0


def test_accumulated_gradients_equal_the_whole_batch(corpus):
    model, state, whole, batches = setup(with_training(ONE_LAYER, accumulate=1), corpus)
    _, _, split, _ = setup(with_training(ONE_LAYER, accumulate=2), corpus)
    batch, key = jax.device_put(batches[0]), jax.random.key(1)
    copies = [jax.tree.map(jnp.copy, (state, create_graph(model))) for _ in range(2)]
    one, _, a = whole(*copies[0], batch, key)
    two, _, b = split(*copies[1], batch, key)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
    # Auxiliary losses are averaged over micro-batches, so only the main gradient is equal.
    np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=2e-2)
    assert jax.tree.structure(one) == jax.tree.structure(two)


def test_micro_batches_count_by_their_tokens(corpus):
    """The second half is padding but for a few tokens."""
    results = []
    for parts in (1, 2):
        config = with_training(ONE_LAYER, accumulate=parts)
        moe = config.model.moe.replace(load_balance_weight=0.0, capacity_factor=4.0)
        config = config.replace(model=config.model.replace(moe=moe))
        model, state, step, batches = setup(config, corpus)
        keep = np.ones(batches[0].is_valid.shape, bool)
        keep[2:, 3:] = False
        batch = batches[0]._replace(is_valid=batches[0].is_valid & keep)
        results.append(step(state, create_graph(model), batch, jax.random.key(1))[2])
    whole, split = results
    for name in ("loss", "confidence_loss", "auxiliary_loss", "grad_norm", "load"):
        np.testing.assert_allclose(getattr(whole, name), getattr(split, name), rtol=2e-5)
    np.testing.assert_allclose(split.load.sum(-1), 1.0, rtol=1e-5)


def test_writes_are_due_every_so_many_steps_from_a_given_share_on(corpus):
    config = with_training(ONE_LAYER, steps=8, memory_write_every=2, memory_write_from=0.5)
    model, state, step, batches = setup(config, corpus)
    graph, updates = create_graph(model), []
    for i in range(8):
        state, graph, metrics = step(state, graph, jax.device_put(batches[i]), jax.random.key(1))
        updates.append(int(metrics.graph_updates))
    assert updates[:4] == [0, 0, 0, 0]
    assert updates[4] > 0
    assert updates[5] == updates[4] < updates[6] == updates[7]


def test_padding_rows_do_not_count_in_an_evaluation(corpus):
    model, state, _, batches = setup(CONFIG, corpus)
    evaluate, graph = make_eval_step(model), create_graph(model)
    batch = batches[0]
    gone = np.array([True, True, False, False])[:, None]
    cut = batch._replace(
        is_valid=batch.is_valid & gone,
        tokens=np.where(gone, batch.tokens, 7).astype(np.int32),
        source=np.where(gone, batch.source, -1).astype(np.int32),
    )
    sums, partial = evaluate(state.params, graph, batch), evaluate(state.params, graph, cut)
    assert float(partial.count) == batch.is_valid[:2].sum() < float(sums.count)
    assert np.isfinite(partial.nats)
    np.testing.assert_allclose(partial.load.sum(-1), partial.choices, rtol=1e-5)


def test_bfloat16_remat_dropout_and_memory_reading_train_together(corpus):
    moe = CONFIG.model.moe.replace(
        compute_dtype="bfloat16", remat="dots", dropout=0.1, memory_read=True
    )
    config = CONFIG.replace(model=CONFIG.model.replace(moe=moe))
    model, state, step, batches = setup(config, corpus)
    graph = create_graph(model)
    for i in range(3):
        state, graph, metrics = step(state, graph, jax.device_put(batches[i]), jax.random.key(1))
    assert np.isfinite(metrics.loss)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    gate = state.params["blocks_1"]["system"]["memory"]["gate"]
    assert float(jnp.abs(gate).max()) > 0


def test_copies_follow_the_parameters(corpus, tmp_path):
    low = ONE_LAYER.model.moe.replace(compute_dtype="bfloat16")
    config = ONE_LAYER.replace(model=ONE_LAYER.model.replace(moe=low))
    model, state, step, batches = setup(config, corpus)
    fresh = jax.tree.map(jnp.copy, state)
    graph = create_graph(model)
    for i in range(2):  # the first has a rate of zero
        state, graph, _ = step(state, graph, jax.device_put(batches[i]), jax.random.key(1))
    assert state.copies
    assert all(path.endswith("['kernel']") for path in state.copies)
    assert same(state.copies, matrix_copies(state.params, "bfloat16"))
    assert not same(state.copies, fresh.copies)
    # Checkpoints are without them, and they come back.
    keeper = Keeper(config, tmp_path, corpus)
    keeper.save(state, graph)
    keeper.close()
    restored, _ = Keeper(config, tmp_path, corpus).restore(fresh, graph)
    assert same(restored, state)


def test_float32_needs_no_copies(corpus):
    assert setup(ONE_LAYER, corpus)[1].copies == {}


def test_gradients_of_copies_are_those_of_what_they_copy():
    bank = ExpertBank(MLPExpert(8, 4, dtype=jnp.bfloat16), num_experts=2)
    x = jax.random.normal(jax.random.key(1), (2, 8, 4))
    slots = jnp.ones((2, 8), bool), jnp.zeros((2, 8), jnp.int32)
    params = jax.jit(bank.init)(jax.random.key(0), x, *slots)["params"]

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        output = bank.apply({"params": params}, x, *slots).output
        return jnp.mean(jnp.square(output.astype(jnp.float32)))

    value, grads = loss(params)
    other_value, other_grads = loss(with_copies(params, matrix_copies(params, jnp.bfloat16)))
    np.testing.assert_allclose(other_value, value, rtol=1e-3)
    # bfloat16 has eight bits, and the compiler rounds at other places in the two programs.
    for other, own in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
        error = jnp.linalg.norm(other.astype(jnp.float32) - own)
        assert float(error) <= 0.02 * float(jnp.linalg.norm(own)) + 1e-9


def test_resume_repeats_the_unbroken_run_number_for_number(corpus, tmp_path):
    whole = train(CONFIG, corpus, directory=tmp_path / "whole")

    class KilledError(Exception):
        pass

    def stop(step, record):
        if step == 5:
            raise KilledError

    with pytest.raises(KilledError):
        train(CONFIG, corpus, directory=tmp_path / "broken", on_step=stop)
    resumed = train(CONFIG, corpus, directory=tmp_path / "broken", resume=True)
    assert same(whole.state, resumed.state)
    assert same(whole.graph, resumed.graph)
    curves = [
        [{**r, "tokens_per_second": 0} for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "broken")
    ]
    assert curves[0] == curves[1]
    assert [r["step"] for r in curves[0]] == [2, 4, 6]


def test_a_run_that_diverges_stops_before_it_saves_that(corpus, tmp_path):
    config = with_training(ONE_LAYER, learning_rate=1e30, steps=12, save_every=1, log_every=5)
    with pytest.raises(DivergedError, match=r"at step \d+ the loss is"):
        train(config, corpus, directory=tmp_path)
    model, optimizer = MoELanguageModel(config.model), make_optimizer(config.training)
    like = {"state": create_state(model, optimizer, jax.random.key(0)).saved}
    like["graph"] = create_graph(model)
    step, tree, _ = Checkpoints(tmp_path / "checkpoints").restore(like)
    assert step < 11
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree["state"].params))


def test_what_fails_after_a_step_costs_no_training(corpus, tmp_path):
    config = with_training(ONE_LAYER, save_every=0, eval_bytes=64)

    def fail(state, graph):
        raise MemoryError("no room to evaluate")

    with pytest.raises(MemoryError):
        train(config, corpus, directory=tmp_path, at_end=fail)
    assert complete_steps(tmp_path / "checkpoints") == [6]
    with pytest.raises(ValueError, match="holds checkpoints up to step 6"):
        train(config, corpus, directory=tmp_path)
    for _ in range(2):
        train(config, corpus, directory=tmp_path, resume=True)
    last = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "eval_bits_per_byte" in r]
    assert [r["step"] for r in last] == [6]
    for name, value in (("seed", 1), ("batch_size", 2)):
        other = with_training(config, **{name: value})
        with pytest.raises(ValueError, match=f"saved with {name}="):
            train(other, corpus, directory=tmp_path, resume=True)
    changed = dataclasses.replace(corpus, digests=("0", *corpus.digests[1:]))
    with pytest.raises(ValueError, match="saved with another corpus"):
        train(config, changed, directory=tmp_path, resume=True)


def test_an_error_between_steps_leaves_the_save_in_flight_whole(corpus, tmp_path):
    def fail(step, record):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(ONE_LAYER, corpus, directory=tmp_path, on_step=fail)
    assert complete_steps(tmp_path / "checkpoints") == [2, 4]


def test_another_model_cannot_be_resumed(corpus, tmp_path):
    train(CONFIG, corpus, directory=tmp_path)
    moe = CONFIG.model.moe.replace(dedup_threshold=0.5)
    other = CONFIG.replace(model=CONFIG.model.replace(moe=moe))
    with pytest.raises(ValueError, match=r"another config\.model"):
        train(other, corpus, directory=tmp_path, resume=True)


def test_incomplete_and_damaged_checkpoints(tmp_path):
    tree = {"w": jnp.arange(4.0)}
    checkpoints = Checkpoints(tmp_path, keep=2)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoints.restore(tree)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": tree["w"] + step}, {"n": step})
    checkpoints.close()
    assert complete_steps(tmp_path) == [2, 3]
    (tmp_path / "9").mkdir()
    (tmp_path / "10.orbax-checkpoint-tmp").mkdir()
    step, restored, note = Checkpoints(tmp_path).restore(tree)
    assert (step, note["n"], restored["w"].tolist()) == (3, 3, [3.0, 4.0, 5.0, 6.0])
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoints(tmp_path).restore({"w": jnp.zeros(4), "more": jnp.zeros(1)})
    for file in (tmp_path / "3" / "tree").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        Checkpoints(tmp_path).restore(tree)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("eight_devices")
def test_restore_moves_to_the_current_mesh(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.arange(16.0)})
    checkpoints.close()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    like = {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=spread)}
    _, tree, _ = Checkpoints(tmp_path).restore(like)
    assert tree["w"].sharding == spread
    np.testing.assert_array_equal(tree["w"], np.arange(16.0))


def test_rolling_graph_checkpoints_by_node_updates(tmp_path):
    rolling = GraphCheckpoints(tmp_path, interval=3, keep=2)
    graph, saved = KnowledgeGraph.create(32, 8), []
    for i in range(10):
        graph, _ = insert(graph, jax.random.normal(jax.random.key(i), (2, 8)))
        saved.append(rolling.maybe_save(graph))
    rolling.close()
    assert saved == [False, True] * 5
    assert complete_steps(tmp_path) == [16, 20]
    assert same(GraphCheckpoints(tmp_path).restore(KnowledgeGraph.create(32, 8)), graph)


def test_a_killed_process_resumes_as_if_it_had_not_been(tmp_path):
    """SIGKILL in the middle of a training through the command line, then --resume."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(30):
        (data / f"{i}.txt").write_text("".join(rng.choice(list("abc de\n"), 400)))
    script = (
        "import sys, moe_jax.cli as cli; from moe_jax.config import smallest_run\n"
        "run = smallest_run()\n"
        "cli.byte_lm = lambda: run.replace(training=run.training.replace(steps=20))\n"
        "cli.main()"
    )

    # One device, and compiled as this process compiles.
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    is_quick = jax.config.read("jax_disable_most_optimizations")
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(is_quick))

    def command(out, *more):
        words = [sys.executable, "-c", script, "train", "--out", str(out), "--data", str(data)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen([*words, *more], env=env, **pipes)

    # One after the other: the later ones need not compile again.
    whole = command(tmp_path / "whole")
    assert whole.communicate()[0]
    killed = command(tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while killed.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 4:
            killed.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    resumed = command(tmp_path / "killed", "--resume")
    output = resumed.communicate()[0].decode()
    assert resumed.returncode == 0, output
    curves = [
        [(r["step"], r["loss"]) for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    ]
    assert len(curves[0]) == 10
    assert curves[0] == curves[1]
