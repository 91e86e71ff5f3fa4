"""SIGKILL at random moments of saving: a few trials of `experiments/durability.py`."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "durability.py"


@pytest.mark.skipif(not EXPERIMENT.is_file(), reason="needs the repository, for its experiments/")
def test_no_kill_loses_a_finished_save():
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(EXPERIMENT.parents[1])
    # The children compile as this process does.
    is_quick = jax.config.read("jax_disable_most_optimizations")
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(is_quick))
    words = [sys.executable, str(EXPERIMENT), "--trials", "3", "--longest", "0.2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    for child in ("graph_child", "run_child"):
        assert f"{child}: 3 kills" in done.stdout
    assert done.stdout.count(" 0 checks failed") == 2
