"""Graph checkpoints: incremental, verified, kept readable, restored anywhere, to the bit."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import CheckpointError, DamagedError, GraphCheckpoints, complete_steps
from moe_jax.checkpoint.delta import delta_rows
from moe_jax.checkpoint.store import Checkpoints
from moe_jax.graph import KnowledgeGraph, digest_hex, insert, link

N, D, STEPS = 1024, 4, 9


def on_device(graph):
    """Fresh arrays, placed as restored ones are, so that no program is compiled twice."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x), jax.devices()[0]), graph)


NEW = on_device(KnowledgeGraph.create(N, D, num_edge_slots=2))


def step(graph, i):
    """Step i of the stream: new nodes, merges and links."""
    keys = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (4, D))
    graph, info = insert(graph, keys, merge_threshold=0.97)
    return link(graph, info.node_id, info.node_id[::-1])[0]


advance = jax.jit(step, donate_argnums=0)


@pytest.fixture(scope="module")
def stream():
    """The graph after every step, on the host."""
    graph, states = on_device(NEW), []
    for i in range(STEPS):
        graph = advance(graph, i)
        states.append(jax.tree.map(np.array, graph))
    return states


def saved(folder, steps=STEPS, **options):
    """Runs the stream, saving after every step; each graph is donated right after its save."""
    rolling, graph, numbers = GraphCheckpoints(folder, interval=1, **options), on_device(NEW), []
    for i in range(steps):
        graph = advance(graph, i)
        numbers.append(rolling.save(graph))
    rolling.close()
    return numbers


def notes(folder):
    return {number: Checkpoints(folder).note(number) for number in complete_steps(folder)}


def same(graph, state):
    return all(np.array_equal(a, b) for a, b in zip(graph, state, strict=True))


def damage(folder, number, how="truncate"):
    """Spoils the largest file of a step's arrays, or its note."""
    if how == "note":
        files = [p for p in (folder / str(number) / "note").rglob("*") if p.is_file()]
        files[0].write_text("{")
        return
    files = [p for p in (folder / str(number) / "tree").rglob("*") if p.is_file()]
    file = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    if how == "truncate":
        data = data[: len(data) // 2]
    else:
        for at in range(len(data) // 4, len(data), 7):
            data[at] ^= 0xFF
    file.write_bytes(data)


def test_every_kept_checkpoint_comes_back_and_no_more_is_kept(tmp_path, stream):
    numbers = saved(tmp_path, keep=3, full_every=4)
    assert numbers == [int(state.num_updates) for state in stream]
    # Saves 0, 4 and 8 are whole; the newest three are 6, 7 and 8, and 6 needs 4 and 5.
    assert complete_steps(tmp_path) == numbers[4:]
    bases = [note["base"] for note in notes(tmp_path).values()]
    assert bases == [None, *numbers[4:7], None]
    rolling = GraphCheckpoints(tmp_path)
    for number, state in list(zip(numbers, stream, strict=True))[4:]:
        assert same(rolling.restore(NEW, number), state)
    assert same(rolling.restore(NEW), stream[-1])


def test_a_delta_holds_the_rows_that_changed_and_no_others(tmp_path, stream):
    numbers = saved(tmp_path, steps=3)
    for before, after, number in zip(stream, stream[1:], numbers[1:], strict=False):
        note = Checkpoints(tmp_path).note(number)
        assert note["rows"] == 256
        shapes = {"ids": np.zeros(256, np.int32)}
        rows = {name: x[:256] if x.ndim else x for name, x in after._asdict().items()}
        like = {**shapes, "graph": rows}
        delta = Checkpoints(tmp_path).restore(like, number)[1]
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.ndim]
        differs = [(a != b).reshape(N, -1).any(axis=1) for a, b in pairs]
        changed = np.flatnonzero(np.any(differs, axis=0))
        assert 0 < len(changed) < 20
        assert delta["ids"].tolist() == [*changed, *[N] * (256 - len(changed))]
        np.testing.assert_array_equal(delta["graph"]["value"][: len(changed)], after.value[changed])


def test_a_stream_replayed_from_any_checkpoint_ends_in_the_same_digest(tmp_path, stream):
    numbers = saved(tmp_path, keep=STEPS, full_every=5)
    final = digest_hex(on_device(stream[-1]))
    for i, number in enumerate(numbers):
        graph = GraphCheckpoints(tmp_path).restore(NEW, number)
        for later in range(i + 1, STEPS):
            graph = advance(graph, later)
        assert digest_hex(graph) == final


def test_a_large_change_is_saved_whole(tmp_path, stream):
    rolling = GraphCheckpoints(tmp_path)
    graph = advance(on_device(NEW), 0)
    numbers = [rolling.save(graph)]
    numbers.append(rolling.save(graph._replace(reads=graph.reads.at[:512].add(1))))
    numbers.append(rolling.save(graph._replace(reads=graph.reads.at[:1].add(1))))
    rolling.close()
    # From the second to the third save 512 rows change: half of all, still a delta.
    assert [note["rows"] for note in notes(tmp_path).values()] == [None, 512, 512]
    rolling = GraphCheckpoints(tmp_path)
    rolling.restore(NEW)
    numbers.append(rolling.save(graph._replace(reads=graph.reads + 5)))
    rolling.close()
    assert notes(tmp_path)[numbers[-1]]["base"] is None
    assert (GraphCheckpoints(tmp_path).restore(NEW).reads == 5).all()


@pytest.mark.parametrize("how", ["truncate", "flip", "note"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, stream, how):
    numbers = saved(tmp_path, steps=3)
    damage(tmp_path, numbers[2], how)
    rolling = GraphCheckpoints(tmp_path, interval=1)
    with pytest.warns(UserWarning, match=f"/{numbers[2]} .*trying the checkpoint before it"):
        graph = rolling.restore(NEW)
    assert same(graph, stream[1])
    with pytest.raises(DamagedError):
        rolling.restore(NEW, numbers[2])
    # Going on saves the lost step again, above the damaged one, as a delta from what was restored.
    assert rolling.maybe_save(advance(graph, 2))
    rolling.close()
    assert complete_steps(tmp_path)[-1] == numbers[2] + 1
    assert Checkpoints(tmp_path).note()["base"] == numbers[1]
    assert same(GraphCheckpoints(tmp_path).restore(NEW), stream[2])


def test_a_damaged_base_takes_its_deltas_with_it(tmp_path, stream):
    numbers = saved(tmp_path, steps=6, full_every=3)
    damage(tmp_path, numbers[3])
    with pytest.warns(UserWarning, match="trying the checkpoint before it") as warned:
        assert same(GraphCheckpoints(tmp_path).restore(NEW), stream[2])
    assert len(warned) == 3
    damage(tmp_path, numbers[0])
    with (
        pytest.warns(UserWarning, match="trying the checkpoint before it"),
        pytest.raises(DamagedError, match="every checkpoint") as error,
    ):
        GraphCheckpoints(tmp_path).restore(NEW)
    assert "\n" not in str(error.value)


def test_a_missing_base_is_damage(tmp_path, stream):
    numbers = saved(tmp_path, steps=3)
    (tmp_path / str(numbers[1]) / "_CHECKPOINT_METADATA").unlink()
    with pytest.warns(UserWarning, match=f"needs step {numbers[1]}, which is not there"):
        assert same(GraphCheckpoints(tmp_path).restore(NEW), stream[0])


def test_what_cannot_be_restored_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        GraphCheckpoints(tmp_path).restore(NEW)
    number = saved(tmp_path, steps=1)[0]
    with pytest.raises(CheckpointError, match=r"sizes N 1024, D 4, M 2, and one of N 512, D 4"):
        GraphCheckpoints(tmp_path).restore(KnowledgeGraph.create(512, D))
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 99"):
        GraphCheckpoints(tmp_path).restore(NEW, 99)
    file = next(p for p in (tmp_path / str(number) / "note").rglob("*") if p.is_file())
    text = json.loads(file.read_text())
    file.write_text(json.dumps({**text, "format_version": 999}))
    with pytest.raises(CheckpointError, match="format version 999, this release reads") as error:
        GraphCheckpoints(tmp_path).restore(NEW)
    assert not isinstance(error.value, DamagedError)
    assert "\n" not in str(error.value)
    other = Checkpoints(tmp_path / "other")
    other.save(1, {"w": jnp.ones(2)})
    other.close()
    with pytest.raises(CheckpointError, match="is not of a graph"):
        GraphCheckpoints(tmp_path / "other").restore(NEW)


def over_eight(graph):
    """The graph with its slots spread over eight devices."""
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = jax.make_mesh((8,), ("n",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in [("n",), ()]
    )
    return jax.tree.map(lambda x: jax.device_put(x, spread if x.ndim else whole), graph)


def test_restores_on_another_number_of_devices(tmp_path, stream):
    saved(tmp_path / "one", steps=3)
    like = over_eight(NEW)
    graph = GraphCheckpoints(tmp_path / "one").restore(like)
    assert same(graph, stream[2])
    assert all(a.sharding == b.sharding for a, b in zip(graph, like, strict=True))

    rolling = GraphCheckpoints(tmp_path / "eight")
    for state in stream[:2]:
        rolling.save(over_eight(state))
    rolling.close()
    assert [note["rows"] for note in notes(tmp_path / "eight").values()] == [None, 256]
    graph = GraphCheckpoints(tmp_path / "eight").restore(NEW)
    assert same(graph, stream[1])
    assert all(len(leaf.devices()) == 1 for leaf in graph)


def test_a_graph_that_went_back_is_the_newest_again(tmp_path, stream):
    numbers = saved(tmp_path, steps=5)
    rolling = GraphCheckpoints(tmp_path, interval=8, keep=2)
    assert not rolling.maybe_save(on_device(stream[5]))
    back = on_device(stream[1])
    assert rolling.maybe_save(back)
    assert not rolling.maybe_save(on_device(stream[2]))
    assert rolling.maybe_save(on_device(stream[4]))
    rolling.close()
    assert complete_steps(tmp_path) == [numbers[4] + 1, numbers[4] + 2]
    assert same(GraphCheckpoints(tmp_path).restore(NEW, numbers[4] + 1), stream[1])
    assert same(GraphCheckpoints(tmp_path).restore(NEW), stream[4])


def test_a_save_that_never_arrived_is_no_base(tmp_path, stream):
    rolling = GraphCheckpoints(tmp_path)
    first = rolling.save(on_device(stream[0]))
    rolling.wait()
    (tmp_path / str(first) / "_CHECKPOINT_METADATA").unlink()
    rolling.save(on_device(stream[1]))
    rolling.close()
    assert Checkpoints(tmp_path).note()["base"] is None
    assert same(GraphCheckpoints(tmp_path).restore(NEW), stream[1])


def test_bases_that_another_object_wrote_stay(tmp_path, stream):
    rolling = GraphCheckpoints(tmp_path, keep=1)
    numbers = saved(tmp_path, steps=3)
    rolling.restore(NEW)
    rolling.save(on_device(stream[3]))
    rolling.close()
    assert complete_steps(tmp_path)[:-1] == numbers
    assert same(GraphCheckpoints(tmp_path).restore(NEW), stream[3])


@pytest.mark.parametrize("name", ["interval", "keep", "full_every"])
def test_wrong_numbers(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        GraphCheckpoints(tmp_path, **{name: 0})


def test_deltas_take_few_shapes_and_hold_what_changed():
    edges = [2**i + more for i in range(6, 17) for more in (-1, 0, 1)]
    sizes = {changed: delta_rows(changed, 100_000) for changed in [0, 1, 2, *edges, 100_000]}
    assert set(sizes.values()) == {None, *(2**i for i in range(8, 16))}
    assert all(size is None or size >= changed for changed, size in sizes.items())
    assert [changed for changed, size in sizes.items() if size is None] == [
        *(2**15 + 1, 2**16 - 1, 2**16, 2**16 + 1, 100_000)
    ]


def test_names_are_plain_numbers(tmp_path):
    saved(tmp_path, steps=2)
    assert all(re.fullmatch(r"\d+", path.name) for path in tmp_path.iterdir())
