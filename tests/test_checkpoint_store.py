"""Rolling checkpoints of any pytree: what stays, what goes, what is refused."""

import jax.numpy as jnp
import pytest

from moe_jax.checkpoint import CheckpointError, Checkpoints, DamagedError, complete_steps

TREE = {"w": jnp.arange(4.0)}


def fill(checkpoints, steps):
    for step in steps:
        checkpoints.save(step, {"w": TREE["w"] + step})
    checkpoints.close()


def test_what_a_kept_step_needs_stays(tmp_path):
    needs = {3: [2], 4: [2], 5: [2], 6: [5, 2]}
    fill(Checkpoints(tmp_path, keep=2, also_keep=lambda step: needs.get(step, [])), range(7))
    assert complete_steps(tmp_path) == [2, 5, 6]
    assert Checkpoints(tmp_path).restore(TREE, 2)[1]["w"].tolist() == [2.0, 3.0, 4.0, 5.0]


def test_only_the_first_save_sweeps_what_a_killed_process_left(tmp_path):
    remains = tmp_path / "4.orbax-checkpoint-tmp"
    other = tmp_path / "notes"
    remains.mkdir()
    (remains / "part").write_text("half")
    other.mkdir()
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoints.restore(TREE)
    assert remains.exists()  # it may be another process's, which is saving
    fill(checkpoints, [3])
    assert not remains.exists()
    assert other.exists()
    fill(checkpoints, [4])
    assert complete_steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("is_open", [False, True])
def test_a_step_without_its_commit_does_not_stand_in_the_way(tmp_path, is_open):
    fill(Checkpoints(tmp_path), [2, 4, 6])
    (tmp_path / "6" / "_CHECKPOINT_METADATA").write_text("")
    checkpoints = Checkpoints(tmp_path)
    if is_open:
        assert checkpoints.restore(TREE)[0] == 4
    fill(checkpoints, [6, 8])
    assert complete_steps(tmp_path) == [4, 6, 8]
    assert len(list(tmp_path.glob("incomplete-6-*"))) == 1


def test_a_step_before_the_newest_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    fill(checkpoints, [3, 5])
    fill(checkpoints, [5])  # there already: left as it is
    with pytest.raises(CheckpointError, match="cannot be saved after step 5"):
        checkpoints.save(4, TREE)
    checkpoints.close()
    assert complete_steps(tmp_path) == [3, 5]


def test_saved_means_on_disk_after_waiting(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.wait()
    for step in range(3):
        checkpoints.save(step, TREE)
        checkpoints.wait()
        assert complete_steps(tmp_path)[-1] == step
    checkpoints.close()


def test_at_least_one_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (
            jnp.zeros((3, 2)),
            r"w as float32 of shape \(2, 3\), asked for as float32 of shape \(3, 2\)",
        ),
        (jnp.zeros((2, 3), jnp.bfloat16), "w as float32 .* asked for as bfloat16"),
        (jnp.zeros((2, 3), jnp.int32), "w as float32 .* asked for as int32"),
    ],
)
def test_other_arrays_are_no_damage(tmp_path, like, message):
    saved = Checkpoints(tmp_path)
    saved.save(1, {"w": jnp.ones((2, 3))})
    saved.close()
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoints(tmp_path).restore({"w": like})
    assert not isinstance(caught.value, DamagedError)
