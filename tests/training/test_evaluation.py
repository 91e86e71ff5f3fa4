"""Evaluations: the loss with the memory off, and the graph's health in the metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import smallest_run
from moe_jax.data import load_corpus
from moe_jax.graph import GraphHealth, insert
from moe_jax.lm import MoELanguageModel
from moe_jax.training import Evaluator, create_graph, read_metrics, train


def reading_run(**training):
    run = smallest_run()
    moe = run.model.moe.replace(memory_read=True)
    model = run.model.replace(moe=moe, num_layers=1)
    return run.replace(model=model, training=run.training.replace(**training))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(20):
        (folder / f"f{i}.py").write_text("".join(rng.choice(["def ", "x", "(y)", ":\n"], 60)))
    return load_corpus([folder])


@pytest.fixture(scope="module")
def reader(corpus):
    """An evaluator, parameters whose gate to the memory is open, and a graph with nodes."""
    config = reading_run()
    model = MoELanguageModel(config.model)
    graph = create_graph(model)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((4, 32), jnp.int32), graph)["params"]
    gate = params["blocks_0"]["system"]["memory"]["gate"]
    params["blocks_0"]["system"]["memory"]["gate"] = jnp.ones_like(gate)
    keys = jax.random.normal(jax.random.key(1), (32, graph.dim))
    return Evaluator(model, corpus, config), params, insert(graph, keys)[0], create_graph(model)


def test_memory_off_is_as_if_the_graph_were_empty(reader):
    evaluate, params, graph, empty = reader
    record = evaluate(params, graph, memory_off=True)
    without = evaluate(params, empty)
    assert record["eval_bits_per_byte_memory_off"] == without["eval_bits_per_byte"]
    assert record["eval_bits_per_byte"] != without["eval_bits_per_byte"]
    assert record["graph_health"]["num_live"] == 32
    assert "eval_bits_per_byte_memory_off" not in without
    assert int(graph.num_live) == 32


def test_metrics_hold_the_health_and_at_the_end_the_loss_without_memory(corpus, tmp_path):
    config = reading_run(steps=4, eval_every=2, memory_write=False)
    how = {"directory": tmp_path, "at_end": lambda state, graph: {"end": int(state.step)}}
    result = train(config, corpus, **how)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "eval_bits_per_byte" in r]
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert set(record["graph_health"]) == set(GraphHealth._fields)
    has_off = ["eval_bits_per_byte_memory_off" in record for record in records]
    assert has_off == [False, True]
    assert [record.get("end") for record in records] == [None, 4]
    assert result.evaluation.items() <= records[-1].items()
    # A run resumed after its end is judged again, and writes nothing more.
    assert train(config, corpus, resume=True, **how).evaluation == result.evaluation
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(records)


def test_lines_count_what_was_written_between_them():
    """Writes fall between lines, where no line is."""
    config = smallest_run()
    config = config.replace(
        training=config.training.replace(
            steps=7, log_every=3, memory_write_every=2, memory_write_from=0.0, eval_every=0
        )
    )
    records = []
    train(config, load_corpus(), on_step=lambda step, record: records.append(record))
    lines = [record for record in records if "nodes_created" in record]
    assert [line["step"] for line in lines] == [3, 6, 7]
    assert sum(line["nodes_created"] for line in lines) == lines[-1]["graph_nodes"] > 0
    written = sum(line["nodes_created"] + line["nodes_merged"] for line in lines)
    assert written == lines[-1]["graph_updates"]
