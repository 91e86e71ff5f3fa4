"""The command line: what it prints, what it leaves behind, how it fails."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from moe_jax import cli
from moe_jax.config import smallest_run
from moe_jax.training import read_metrics
from moe_jax.training.run import open_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = ["def __enter__(self):", "    return self.value[0]", "raise ValueError(name)", "x = 1"]
    for i in range(40):
        (folder / f"file{i}.py").write_text("\n".join(rng.choice(lines, 30)))
    return folder


def call(monkeypatch, *words):
    """Runs the command line; gives its exit code."""
    monkeypatch.setattr("sys.argv", ["moe-jax", *map(str, words)])
    monkeypatch.setattr(cli, "byte_lm", smallest_run)
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("runs") / "first"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert call(monkeypatch, "train", "--out", out, "--data", data) == 0
    return out


def test_a_run_folder_holds_config_metrics_checkpoints_and_plots(run):
    assert json.loads((run / "config.json").read_text()) == smallest_run().to_dict()
    records = read_metrics(run / "metrics.jsonl")
    assert [r["step"] for r in records] == [2, 4, 6]
    wanted = {"loss", "load", "dropped_fraction", "graph_nodes", "tokens_per_second"}
    assert all(wanted <= r.keys() for r in records)
    assert {"eval_bits_per_byte", "graph_health"} <= records[-1].keys()
    assert "eval_bits_per_byte_memory_off" not in records[-1]  # this model reads no memory
    plots = {"learning.png", "load.png", "graph.png", "health.png"}
    assert {p.name for p in (run / "plots").iterdir()} == plots
    assert all(p.stat().st_size > 5000 for p in (run / "plots").iterdir())
    assert any((run / "checkpoints").iterdir())


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_config_gives_the_options(monkeypatch, capsys, tmp_path, is_folder):
    training = smallest_run().training.replace(seed=7, learning_rate=0.5)
    file = tmp_path / "config.json"
    file.write_text(smallest_run().replace(training=training).to_json())
    started = []

    def start_run(out, config, **how):
        started.append(config)
        raise cli.RunError("enough")

    monkeypatch.setattr(cli, "start_run", start_run)
    given = tmp_path if is_folder else file
    assert call(monkeypatch, "train", "--config", given, "--steps", 5, "--out", tmp_path / "r") == 2
    assert started == [smallest_run().replace(training=training.replace(steps=5))]
    assert call(monkeypatch, "train", "--config", tmp_path / "none", "--out", tmp_path / "r") == 2
    assert "it has no config.json" in capsys.readouterr().err
    words = "train", "--resume", "--out", tmp_path, "--config", file
    assert call(monkeypatch, *words) == 2
    assert "--config cannot change on --resume" in capsys.readouterr().err


def test_training_closes_with_baselines_queries_and_paths(monkeypatch, capsys, tmp_path, data):
    monkeypatch.setattr(cli._console, "_width", 160, raising=False)
    assert call(monkeypatch, "train", "--out", tmp_path / "run", "--data", data, "--steps", 2) == 0
    shown = capsys.readouterr().out
    for part in ("this model", "order-0", "order-2", "xz", "max over mean", "dropped", "nodes"):
        assert part in shown
    assert shown.count("query: ") == 3
    assert str(tmp_path / "run" / "plots" / "load.png") in shown


def test_query_shows_the_nearest_insights_with_their_source(monkeypatch, capsys, run):
    assert call(monkeypatch, "query", run, "def __enter__(self):") == 0
    shown = capsys.readouterr().out
    assert shown.count(".py:") == 5
    assert "similarity" in shown
    assert "confidence" in shown


def test_a_run_can_be_asked_through_faiss(run):
    pytest.importorskip("faiss")
    opened = open_run(run)
    moe = opened.config.model.moe.replace(use_faiss=True)
    model = dataclasses.replace(opened.config.model, moe=moe)
    through = dataclasses.replace(opened, config=dataclasses.replace(opened.config, model=model))
    ours, theirs = opened.query("def __enter__(self):"), through.query("def __enter__(self):")
    assert [insight.node for insight in theirs] == [insight.node for insight in ours]
    similarities = [insight.similarity for insight in theirs]
    np.testing.assert_allclose(similarities, [i.similarity for i in ours], atol=1e-6)
    assert through._faiss_index is through._faiss_index
    assert opened._faiss_index is None


def test_info_shows_the_run(monkeypatch, capsys, run):
    assert call(monkeypatch, "info", run) == 0
    shown = capsys.readouterr().out
    for part in ("6 of 6", "near-duplicates", "no read recorded", "isolated", "dead edges"):
        assert part in shown


def test_a_source_that_changed_is_said_to_have_changed(monkeypatch, capsys, run, data):
    texts = {path: path.read_bytes() for path in data.iterdir()}
    try:
        for path in texts:
            path.write_text("changed")
        assert call(monkeypatch, "query", run, "x = 1") == 0
        assert "changed" in capsys.readouterr().out
    finally:
        for path, text in texts.items():
            path.write_bytes(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("query", "nowhere", "x"), "no run in nowhere"),
        (("query", "{run}", " \n"), "the query is empty"),
        (("query", "{run}", "x", "--k", "0"), "k must lie in"),
        (("info", "nowhere"), "no run in nowhere"),
        (("train", "--resume"), "--resume needs --out"),
        (("train", "--resume", "--out", "nowhere"), "no run in nowhere"),
        (("train", "--resume", "--out", "{run}", "--seed", "9"), "--seed cannot change"),
        (("train", "--out", "{run}"), "is not empty"),
        (("train", "--out", "{tmp}/new", "--steps", "0"), "steps must be positive"),
        (("train", "--out", "{tmp}/new", "--data", "{tmp}/absent"), "absent"),
        (("train", "--resume", "--out", "{run}", "--data", "{tmp}"), ""),
    ],
)
def test_wrong_calls_end_with_one_line_and_code_2(
    monkeypatch, capsys, run, tmp_path, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("other data" * 50)
    words = [word.format(run=run, tmp=tmp_path) for word in words]
    assert call(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("moe-jax: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("damage", ["arrays", "config", "manifest", "uncommitted"])
def test_a_damaged_run_ends_with_one_line_and_code_2(monkeypatch, capsys, run, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    newest = max((copy / "checkpoints").iterdir(), key=lambda p: int(p.name))
    match damage:
        case "arrays":
            for file in (newest / "tree").rglob("*"):
                if file.is_file():
                    file.write_bytes(b"damaged")
        case "config":
            (copy / "config.json").write_text('{"model": {"mystery": 1}}')
        case "manifest":
            (copy / "data.json").write_text("{")
        case "uncommitted":
            for step in (copy / "checkpoints").iterdir():
                (step / "_CHECKPOINT_METADATA").unlink()
    assert call(monkeypatch, "query", copy, "x = 1") == 2
    error = capsys.readouterr().err
    assert error.startswith("moe-jax: ")
    assert error.count("\n") == 1
