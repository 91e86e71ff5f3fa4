"""The closing evaluation with a token memory: fitted apart from what it reports, and bounded."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_variables import random_variables
from rich.console import Console

from moe_jax.config import TrainConfig, smallest_run
from moe_jax.console import closing_table, run_table
from moe_jax.data import load_corpus, manifest
from moe_jax.graph import KnowledgeGraph
from moe_jax.lm import MoELanguageModel
from moe_jax.memory import ContextVectors
from moe_jax.training import TrainResult, TrainState, run, stream_eval
from moe_jax.training.stream import TokenReader
from moe_jax.training.stream_eval import evaluate_token_memory, token_memory_evaluation
from moe_jax.training.stream_reader import StreamReader, documents_by_name, first_documents

ROWS, S, BYTES = 2, 32, 480
LINES = ["def __enter__(self):", "    return self.value[0]", "raise ValueError(name)", "x = 1"]
RUN = smallest_run()
MODEL = MoELanguageModel(RUN.model.replace(num_layers=1))


def write_files(folder, changed=()):
    rng = np.random.default_rng(0)
    for i in range(80):
        text = "\n".join(rng.choice(LINES, 30))
        name = f"file{i}.py"
        (folder / name).write_text(text.swapcase() if name in changed else text)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def params():
    return random_variables(MODEL.init, jnp.zeros((1, 8), jnp.int32))["params"]


@pytest.fixture(scope="module")
def judged(data, params):
    """The figures, and what the gate was fitted to."""
    return judge(load_corpus([data]), params)


def judge(corpus, params):
    fitted = []

    def fit(gate, evidence, is_counted, **how):
        fitted.append((evidence, is_counted))
        return real(gate, evidence, is_counted, **how)

    real = stream_eval.fit_interpolation
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(stream_eval, "fit_interpolation", fit)
        how = {"num_bytes": BYTES, "seq_len": S, "rows": ROWS}
        found = evaluate_token_memory(MODEL, params, corpus, **how)
    assert len(fitted) == 1
    return found["token_memory"], fitted[0]


def reader_of(params, corpus):
    """Of the evaluation's own shapes, so that its programs serve."""
    how = {"seq_len": S, "context": S // 4, "rows": ROWS, "policy": "reject"}
    return StreamReader(MODEL, params, corpus, vectors=ContextVectors(hidden_dim=32), **how)


def test_a_memory_of_the_stream_helps_and_a_shuffled_one_does_not(judged):
    figures, _ = judged
    assert figures["bits_per_byte"] < 0.9 * figures["without"]
    assert figures["shuffled"] > 1.1 * figures["bits_per_byte"]


def test_the_time_is_bounded_by_the_bytes_asked_for(judged):
    figures, (_, is_counted) = judged
    assert 0.9 * BYTES < figures["bytes"] <= BYTES == figures["nodes"]
    assert 0.9 * BYTES / 2 < figures["validation_bytes"] <= BYTES / 2
    assert figures["validation_bytes"] == np.sum(is_counted)


def test_fitting_sees_nothing_of_what_is_reported(judged, params, data, tmp_path):
    """Other test files give other figures and the very same evidence to fit to."""
    figures, fitted = judged
    corpus = load_corpus([data])
    held = documents_by_name(corpus, held_out=True)
    changed = {corpus.names[i].rsplit("/", 1)[-1] for i in held[1::2]}
    other = load_corpus([shutil.copytree(data, tmp_path / data.name)])
    assert other.names == corpus.names
    write_files(tmp_path / data.name, changed)
    other = load_corpus([tmp_path / data.name])
    assert documents_by_name(other, held_out=True) == held
    its_figures, its_fitted = judge(other, params)
    jax.tree.map(np.testing.assert_array_equal, its_fitted, fitted)
    assert its_figures["without"] != figures["without"]


def test_without_is_the_model_alone_on_the_same_bytes(judged, params, data):
    corpus = load_corpus([data])
    reader = reader_of(params, corpus)
    most = BYTES // ROWS
    held = documents_by_name(corpus, held_out=True)[1::2]
    batches = reader.batches(first_documents(corpus, held, BYTES, most), most)
    batches = batches[: BYTES // reader.positions]
    nats = sum(float(reader.hidden_step(params, batch, None)[1]) for batch in batches)
    count = sum(int(np.sum(batch.is_valid)) for batch in batches)
    assert judged[0]["bytes"] == count
    np.testing.assert_allclose(judged[0]["without"], nats / count / np.log(2), rtol=1e-5)


def test_a_reading_leaves_the_memory_it_was_given(params, data):
    reader = reader_of(params, load_corpus([data]))
    batches = reader.batches([0, 1], max_document_bytes=48)
    tokens = TokenReader(reader.fit_projection(batches), reader.any_gate)
    memory = reader.written(batches, reader.empty(BYTES), tokens)
    assert int(memory.num_live) == 96
    again = [reader.read(batches, memory, tokens, is_writing=w) for w in (True, False, True)]
    assert int(memory.num_live) == 96
    assert again[0].bits_per_byte == again[2].bits_per_byte < again[0].without
    assert again[0].sums.count == again[1].sums.count == 96
    assert again[1].bits_per_byte > 0


def test_first_documents_hold_enough(data):
    corpus = load_corpus([data])
    ids = documents_by_name(corpus, held_out=False)
    assert sorted(ids) == corpus.ids(held_out=False).tolist()
    assert first_documents(corpus, ids, 100, 50) == ids[:2]
    assert first_documents(corpus, ids, 101, 50) == ids[:3]
    assert first_documents(corpus, ids, 10**9, 50) == ids


def test_one_held_out_document_cannot_be_fitted_and_reported(monkeypatch, params, data):
    monkeypatch.setattr(stream_eval, "documents_by_name", lambda corpus, held_out: [0])
    found = evaluate_token_memory(
        MODEL, params, load_corpus([data]), num_bytes=BYTES, seq_len=S, rows=ROWS
    )
    assert found == {}


def test_a_run_is_closed_by_it_also_when_resumed(monkeypatch, data, tmp_path):
    """Whatever `train` calls at its end; see the test of that."""
    at_ends, calls = [], []

    def train(config, corpus, *, at_end, **how):
        at_ends.append(at_end)
        return TrainResult(state, graph, {}, 0.0)

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(
        stream_eval, "evaluate_token_memory", lambda *a, **how: calls.append(how) or {}
    )
    state, graph = TrainState(jnp.int32(2), {}, (), {}), KnowledgeGraph.create(4, 2)
    for reads in (True, False):
        moe = RUN.model.moe.replace(memory_read=reads)
        config = RUN.replace(
            model=RUN.model.replace(moe=moe),
            training=RUN.training.replace(eval_memory_bytes=BYTES),
        )
        out = tmp_path / f"run-{reads}"
        run.start_run(out, config, data=[data])
        run.resume_run(out, data=[data])
    assert len(at_ends) == 4
    for at_end in at_ends:
        at_end(state, graph)
    same = {"num_bytes": BYTES, "seq_len": RUN.training.seq_len}
    assert [how.pop("reports") for how in calls] == [graph, graph, None, None]
    assert calls == [same] * 4


def test_the_closing_table_and_the_run_table_show_it(data, tmp_path):
    figures = {"bits_per_byte": 1.5, "without": 2.0, "shuffled": 2.25, "bytes": 1234}
    record = {"step": 6, "eval_bits_per_byte": 2.0, "eval_max_over_mean": [1.0]}
    record |= {"eval_dropped_fraction": [0.0], "token_memory": figures}
    opened = run.Run(
        tmp_path, RUN, 6, MODEL, {}, KnowledgeGraph.create(4, 2), manifest(load_corpus([data]))
    )
    console = Console(width=100, record=True)
    console.print(closing_table(record, {}, 0), run_table(opened, [record, {"step": 7}]))
    shown = console.export_text()
    for part in ("a stream of 1,234 held-out bytes", "2.000", "1.500 (-25.0%)", "2.250"):
        assert shown.count(part) >= 2


def test_zero_bytes_turn_it_off(data):
    assert token_memory_evaluation(RUN, load_corpus([data])) is None
    with pytest.raises(ValueError, match="eval_memory_bytes must not be negative"):
        TrainConfig(eval_memory_bytes=-1)
