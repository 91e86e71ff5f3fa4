"""Knowledge graphs to NetworkX and to files, and back to the same bits."""

import base64
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph_cases import assert_identical

from moe_jax.graph import FOREVER, KnowledgeGraph, neighbours, search
from moe_jax.graph.state import with_keys
from moe_jax.interop.networkx import (
    from_networkx,
    load_graphml,
    load_json,
    save_graphml,
    save_json,
    to_networkx,
)
from moe_jax.ops import normalize

nx = pytest.importorskip("networkx")

N, D, M = 12, 3, 3
INTS = ("kind", "expert_id", "hits", "created", "updated", "symbol", "reads")
COUNTERS = ("clock", "num_updates", "num_merged", "num_rejected", "num_evicted")
EDGES = ("target", "weight", "kind", "time", "start", "end")
AWKWARD = np.float32([0.1, 1 / 3, -0.0, 1e-45, 3e38, 16777217.0])


def random_graph(rng, num_live):
    """Free slots in between, self-loops, parallel edges, dead ends, full and empty rows."""
    empty = KnowledgeGraph.create(N, D, num_edge_slots=M)
    host = {name: np.array(field) for name, field in empty._asdict().items()}
    live = rng.choice(N, size=num_live, replace=False)
    for name in INTS:
        host[name][:] = rng.integers(-(2**31), 2**31, size=N)
    host["source"][:] = rng.integers(-1, 100, size=(N, 2))
    host["confidence"][:] = rng.choice(AWKWARD, size=N)
    host["value"][:] = rng.normal(size=(N, D)) * 10.0 ** rng.integers(-30, 30, size=(N, 1))
    host["value"][0] = AWKWARD[:3]
    host["key"][live] = normalize(rng.normal(size=(num_live, D)))
    host["is_live"][live] = True
    host["edge_target"][:] = rng.integers(0, N + 1, size=(N, M))
    host["edge_weight"][:] = rng.choice(AWKWARD, size=(N, M))
    for name in ("kind", "time", "start", "end"):
        host[f"edge_{name}"][:] = rng.integers(-(2**31), 2**31, size=(N, M))
    for name in COUNTERS:
        host[name][...] = rng.integers(2**31)
    graph = KnowledgeGraph(**{name: jnp.asarray(field) for name, field in host.items()})
    return with_keys(graph, jnp.arange(N), graph.key)


def tidy(graph):
    """The graph with free slots and edges that lead from or to them as `create` makes them."""
    empty = KnowledgeGraph.create(N, D, num_edge_slots=M)
    live, target = np.asarray(graph.is_live), np.asarray(graph.edge_target)
    is_edge = live[:, None] & (target < N) & live[np.minimum(target, N - 1)]
    fields = {}
    for name, field in graph._asdict().items():
        blank = np.asarray(getattr(empty, name))
        mask = is_edge if name.startswith("edge_") else live
        if blank.ndim:
            field = np.where(
                mask.reshape(mask.shape + (1,) * (blank.ndim - mask.ndim)), field, blank
            )
        fields[name] = field
    return KnowledgeGraph(**fields)


GRAPHS = [
    random_graph(np.random.default_rng(seed), size) for seed, size in enumerate((0, 1, 7, 12))
]


def assert_same_bits(graph, other):
    assert_identical(graph, other)
    for a, b in zip(graph, other, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()  # the sign of zero too
        assert a.dtype == b.dtype


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_way_back_keeps_every_bit(graph, tmp_path):
    g = to_networkx(graph, with_vectors=True)
    expected = tidy(graph)
    back, info = from_networkx(g)
    assert_same_bits(back, expected)
    assert info.slots == {int(slot): int(slot) for slot in np.flatnonzero(graph.is_live)}
    assert (info.num_dropped_edges, info.ignored) == (0, ())
    for save, load in ((save_graphml, load_graphml), (save_json, load_json)):
        save(graph, tmp_path / "file")
        again, file_info = load(tmp_path / "file")
        assert_same_bits(again, expected)
        assert file_info == info


@pytest.mark.parametrize("graph", GRAPHS)
def test_what_networkx_sees(graph):
    g = to_networkx(graph)
    assert isinstance(g, nx.MultiDiGraph)
    live, target = np.asarray(graph.is_live), np.asarray(graph.edge_target)
    edges = {
        (n, int(target[n, m]), m)
        for n in range(N)
        for m in range(M)
        if live[n] and target[n, m] < N and live[target[n, m]]
    }
    assert set(g) == set(np.flatnonzero(live).tolist())
    assert set(g.edges(keys=True)) == edges
    assert g.graph["num_dangling_edges"] == (target < N).sum() - len(edges)
    for n, data in g.nodes(data=True):
        expected = {name: int(getattr(graph, name)[n]) for name in INTS}
        expected["source_document"], expected["source_offset"] = graph.source[n].tolist()
        assert data == {**expected, "confidence": float(graph.confidence[n])}
        assert all(type(value) in (int, float) for value in data.values())
    for n, t, m in edges:
        expected = {name: getattr(graph, f"edge_{name}")[n, m].item() for name in EDGES[1:]}
        assert g.edges[n, t, m] == expected


def test_a_file_is_plain(tmp_path):
    graph = GRAPHS[2]
    slot = int(np.flatnonzero(graph.is_live)[0])
    save_json(graph, tmp_path / "json")
    node = json.loads((tmp_path / "json").read_text())["nodes"][0]
    key = np.frombuffer(base64.b64decode(node["key"]), "<f4")
    np.testing.assert_array_equal(key, graph.key[slot])
    save_graphml(graph, tmp_path / "graphml")
    plain = nx.read_graphml(tmp_path / "graphml", force_multigraph=True)
    ids = [data["id"] for *_, data in plain.edges(data=True)]
    assert len(ids) == len(set(ids)) > 0
    save_json(graph, tmp_path / "bare", with_vectors=False)
    with pytest.raises(ValueError, match=f"keys must hold a vector for node {slot}"):
        load_json(tmp_path / "bare")
    keys = {int(n): graph.key[n] for n in np.flatnonzero(graph.is_live)}
    np.testing.assert_array_equal(load_json(tmp_path / "bare", keys=keys)[0].key, graph.key)


def test_a_graph_changed_in_networkx():
    graph = GRAPHS[2]
    g = to_networkx(graph, with_vectors=True)
    gone, first, *_ = list(g)
    free = next(slot for slot in range(N) if slot not in g or slot == gone)
    g.remove_node(gone)
    g.add_node("new", key=[2.0, 0.0, 0.0], confidence=0.5)
    g.add_edge("new", first, weight=0.25, kind=4)
    back, info = from_networkx(g)
    assert info.slots == {**{n: n for n in g if n != "new"}, "new": free}
    assert int(back.num_live) == 7
    assert back.key[free].tolist() == [1.0, 0.0, 0.0]
    assert back.value[free].tolist() == [1.0, 0.0, 0.0]
    out = neighbours(back, jnp.array([free]))
    assert out.ids[0].tolist() == [first, N, N]
    assert out.kind[0].tolist() == [4, 0, 0]
    np.testing.assert_array_equal(back.edge_weight[first], tidy_without(graph, gone)[first])


def tidy_without(graph, gone):
    clean = tidy(graph)
    return np.where(np.asarray(clean.edge_target) == gone, 0.0, clean.edge_weight)


def test_a_foreign_graph():
    g = nx.DiGraph(name="anything")
    vectors = {"a": [3.0, 0.0, 4.0], (1, 2): [0.0, 1.0, 0.0], 7: [1.0, 1.0, 0.0]}
    g.add_nodes_from(vectors, colour="red")
    g.add_edge("a", 7, weight=0.5)
    g.add_edge(7, 7, time=9, label="self")
    graph, info = from_networkx(g, keys=vectors, num_nodes=5, num_edge_slots=2)
    assert info.slots == {"a": 0, (1, 2): 1, 7: 2}
    assert info.ignored == ("colour", "label")
    assert (graph.num_nodes, graph.dim, graph.num_edge_slots) == (5, 3, 2)
    np.testing.assert_array_equal(graph.is_live, [True, True, True, False, False])
    np.testing.assert_array_equal(graph.key[:3], normalize(np.array(list(vectors.values()))))
    assert graph.edge_target.tolist() == [[2, 5], [5, 5], [2, 5], [5, 5], [5, 5]]
    assert graph.edge_weight[:, 0].tolist() == [0.5, 0.0, 1.0, 0.0, 0.0]
    assert graph.edge_end[0].tolist() == [FOREVER, FOREVER]
    assert graph.hits.tolist() == [1, 1, 1, 0, 0]
    assert graph.expert_id.tolist() == [-1] * 5
    assert (int(graph.clock), int(graph.num_updates)) == (9, 3)
    assert search(graph, np.float32([[0, 2, 0.1]]), k=1).ids.tolist() == [[1]]
    as_array = from_networkx(g, keys=np.array(list(vectors.values())), num_nodes=5)[0]
    np.testing.assert_array_equal(as_array.key, graph.key)
    assert as_array.num_edge_slots == 1


def test_the_strongest_edges_stay():
    g = nx.MultiDiGraph()
    g.add_nodes_from(range(5))
    weights = [0.2, 0.5, 0.2, 0.9, 0.2]
    for i, weight in enumerate(weights):
        g.add_edge(0, i % 4 + 1, weight=weight, time=i)
    g.add_edge(1, 0)
    # Edges come in the order of NetworkX, those to one node together.
    for num_edge_slots, times in ((1, [3]), (3, [0, 1, 3]), (None, [0, 4, 1, 2, 3])):
        graph, info = from_networkx(g, keys=np.eye(5), num_edge_slots=num_edge_slots)
        assert graph.edge_time[0].tolist() == times
        assert info.num_dropped_edges == 5 - len(times)
        assert graph.edge_target[1, 0] == 0


@pytest.mark.parametrize("kind", [nx.Graph, nx.MultiGraph])
def test_undirected_edges_go_both_ways(kind):
    g = kind([(0, 1), (1, 2), (2, 2)])
    graph, _ = from_networkx(g, keys=np.eye(3))
    ends = {(n, int(t)) for n in range(3) for t in graph.edge_target[n] if t < 3}
    assert ends == {(0, 1), (1, 0), (1, 2), (2, 1), (2, 2)}
    assert int((graph.edge_target < 3).sum()) == 5


def test_a_graph_from_a_file_of_others(tmp_path):
    g = nx.Graph([("x", "y")])
    nx.write_graphml(g, tmp_path / "graphml")
    for form in ("edges", "links"):
        data = nx.node_link_data(g, edges=form)
        (tmp_path / form).write_text(json.dumps(data))
    keys = {"x": [1, 0], "y": [0, 1]}
    read = [load_graphml(tmp_path / "graphml", keys=keys)]
    read += [load_json(tmp_path / form, keys=keys) for form in ("edges", "links")]
    for graph, info in read:
        assert info.slots == {"x": 0, "y": 1}
        assert graph.edge_target.tolist() == [[1], [0]]


def one(**attributes):
    g = nx.MultiDiGraph()
    g.add_node("n", **attributes)
    return g


def edge(**attributes):
    g = nx.MultiDiGraph()
    g.add_node("n", key=[1.0])
    g.add_edge("n", "n", **attributes)
    return g


WRONG = [
    (one(), {}, "keys must hold a vector for node 'n'"),
    (one(), {"keys": {"m": [1.0]}}, "keys must hold a vector for node 'n'"),
    (one(), {"keys": np.ones((2, 2))}, r"keys must have shape \[1, D\], got \(2, 2\)"),
    (one(key=[0.0, 0.0]), {}, "key of node 'n' must have a direction"),
    (one(key=[1.0, float("nan")]), {}, "key of node 'n' must be a list of finite numbers"),
    (one(key=[1.0, 1e39]), {}, "key of node 'n' must be a list of finite numbers"),
    (one(key=[]), {}, "key of node 'n' must be a list of finite numbers"),
    (one(key="?"), {}, "key of node 'n' must be a list of numbers, or float32 bytes in base64"),
    (one(key=[1.0]), {"dim": 2}, "key of node 'n' must have width 2, got 1"),
    (one(key=[1.0], value=[1.0, 2.0]), {}, "value of node 'n' must have width 1, got 2"),
    (one(key=[1.0], kind="verb"), {}, "kind of node 'n' must be a whole number.*got 'verb'"),
    (one(key=[1.0], kind=1.5), {}, "kind of node 'n' must be a whole number.*got 1.5"),
    (one(key=[1.0], hits=2**31), {}, "hits of node 'n' must be a whole number of 32 bits"),
    (one(key=[1.0], confidence=None), {}, "confidence of node 'n' must be a finite number"),
    (one(key=[1.0], confidence=1e300), {}, "confidence of node 'n' must be a finite number"),
    (edge(weight=float("inf")), {}, r"weight of edge \('n', 'n'\) must be a finite number"),
    (edge(time="now"), {}, r"time of edge \('n', 'n'\) must be a whole number"),
    (nx.path_graph(3), {"keys": np.eye(3), "num_nodes": 2}, "num_nodes must be at least 3.*got 2"),
    (nx.path_graph(3), {"keys": np.eye(3), "num_edge_slots": 0}, "num_edge_slots must be at least"),
    (nx.Graph(), {}, "dim must be given for a graph without nodes"),
    (nx.Graph(), {"dim": 2, "num_nodes": 0}, "num_nodes must be at least 1, got 0"),
    (nx.Graph(), {"dim": 0}, "dim must be at least 1, got 0"),
]


@pytest.mark.parametrize(("g", "options", "message"), WRONG)
def test_nothing_is_lost_silently(g, options, message):
    with pytest.raises(ValueError, match=message):
        from_networkx(g, **options)


def test_without_networkx(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "networkx", None)
    with pytest.raises(
        ImportError, match=r"networkx is not installed: pip install 'moe-jax\[graph\]'"
    ):
        to_networkx(GRAPHS[0])


def test_an_imported_graph_can_be_donated():
    graph, _ = from_networkx(to_networkx(GRAPHS[3], with_vectors=True))
    buffers = {leaf.unsafe_buffer_pointer() for leaf in graph}
    assert len(buffers) == len(graph)
    step = jax.jit(lambda g: g._replace(clock=g.clock + 1), donate_argnums=0)
    assert int(step(graph).num_live) == 12
