"""Knowledge graphs as NetworkX graphs and as GraphML or JSON files, and back.

NetworkX is imported when first used. A graph that goes out with its vectors comes back with the
same bits: every field of every live node and of every edge between live nodes, the sizes, the
clock and the counters. What a free slot held is not kept.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from moe_jax.graph import KnowledgeGraph
from moe_jax.interop._tables import (
    EDGE_FIELDS,
    NODE_FIELDS,
    assign_nodes,
    assign_slots,
    columns,
    filled,
    linked,
    pack,
    vectors,
)

__all__ = ["ImportInfo", "from_networkx", "to_networkx"]
__all__ += ["load_graphml", "load_json", "save_graphml", "save_json"]

_FORMAT = "moe_jax.KnowledgeGraph 1"
_SIZES = ("num_nodes", "dim", "num_edge_slots")
_COUNTERS = ("clock", "num_updates", "num_merged", "num_rejected", "num_evicted")


class ImportInfo(NamedTuple):
    """How a NetworkX graph became a knowledge graph.

    Attributes:
      slots: the node id of each node label.
      num_dropped_edges: edges left out since their node has stronger ones in all its slots.
      ignored: names of attributes of nodes and edges that have no place in a knowledge graph.
    """

    slots: dict[Any, int]
    num_dropped_edges: int
    ignored: tuple[str, ...]


def to_networkx(graph: KnowledgeGraph, *, with_vectors: bool = False) -> Any:
    """Copies the live nodes and the edges between them into a NetworkX graph.

    Nodes are labelled by their ids and carry kind, expert_id, confidence, hits, created, updated,
    source_document, source_offset, symbol and reads; edges carry weight, kind, time, start and
    end, and the key of an edge is its slot. The graph's attributes hold its sizes, clock and
    counters, and as `num_dangling_edges` the number of edges left out because an end is not live.

    Args:
      graph: the graph.
      with_vectors: give nodes `key` and `value` too, as lists of numbers.

    Returns:
      A `networkx.MultiDiGraph`.

    Raises:
      ImportError: networkx is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from moe_jax.graph import KnowledgeGraph, insert, link
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2), confidence=0.5)
      >>> graph, _ = link(graph, jnp.array([1]), jnp.array([0]), weight=0.25, kind=3)
      >>> g = to_networkx(graph)
      >>> g.nodes[1]["confidence"], g.edges[1, 0, 0]["weight"], g.edges[1, 0, 0]["kind"]
      (0.5, 0.25, 3)
    """
    g = _import_networkx().MultiDiGraph(format=_FORMAT)
    host = KnowledgeGraph(*map(np.asarray, graph))
    is_edge = (host.edge_target >= 0) & (host.edge_target < graph.num_nodes)
    target = np.where(is_edge, host.edge_target, 0)
    is_whole = is_edge & host.is_live[:, None] & host.is_live[target]
    g.graph |= {name: getattr(graph, name) for name in _SIZES}
    g.graph |= {name: int(getattr(host, name)) for name in _COUNTERS}
    g.graph["num_dangling_edges"] = int(is_edge.sum() - is_whole.sum())

    slots = np.flatnonzero(host.is_live)
    source = {"source_document": host.source[:, 0], "source_offset": host.source[:, 1]}
    names = [*NODE_FIELDS, *(("key", "value") if with_vectors else ())]
    fields = [source[n] if n in source else getattr(host, n) for n in names]
    rows = zip(*(field[slots].tolist() for field in fields), strict=True)
    for slot, row in zip(slots.tolist(), rows, strict=True):
        g.add_node(slot, **dict(zip(names, row, strict=True)))

    begin, edge_slot = (at.tolist() for at in np.nonzero(is_whole))
    fields = [getattr(host, f"edge_{name}")[is_whole].tolist() for name in EDGE_FIELDS]
    ends = zip(begin, target[is_whole].tolist(), edge_slot, strict=True)
    for end, row in zip(ends, zip(*fields, strict=True), strict=True):
        g.add_edge(*end, **dict(zip(EDGE_FIELDS, row, strict=True)))
    return g


def from_networkx(
    g: Any,
    *,
    keys: Mapping[Any, Any] | ArrayLike | None = None,
    num_nodes: int | None = None,
    dim: int | None = None,
    num_edge_slots: int | None = None,
) -> tuple[KnowledgeGraph, ImportInfo]:
    """Makes a knowledge graph of a NetworkX graph: one from `to_networkx`, or any other.

    Nodes of a graph from `to_networkx` keep their ids and edges their slots; nodes added to it
    take the lowest free ids. Nodes of another graph take ids in their order. An edge of an
    undirected graph goes both ways. Where a node has more edges than slots the strongest are
    kept, and of equal ones those that come first in `g.edges`.

    Attributes are those of `to_networkx`. An absent one is -1 if it is an id, a node's hits and
    an edge's weight are 1, an edge holds for ever, and the rest is 0.

    Args:
      g: a NetworkX graph of any of its classes.
      keys: a vector for each node, by label or as an array [nodes, D] in the nodes' order; by
        default the nodes' own. Vectors of unit length (to 1e-6) are taken as they are, others
        are normalised.
      num_nodes: N; by default the original's, else the number of nodes.
      dim: D; by default the original's, else the width of the keys.
      num_edge_slots: M; by default the original's, else enough for every edge. Every node gets
        so many, so a graph with hubs wants a limit.

    Returns:
      (graph, info).

    Raises:
      ImportError: networkx is not installed.
      ValueError: a node has no key, or one without direction or of another width; an attribute
        is not a finite number of 32 bits; there are more nodes than num_nodes; a size is not
        positive.

    Example:
      >>> import networkx as nx
      >>> g = nx.Graph()
      >>> g.add_edge("cat", "animal", weight=0.5, kind=2)
      >>> graph, info = from_networkx(g, keys={"cat": [1.0, 0.0], "animal": [3.0, 4.0]})
      >>> info.slots, graph.edge_target.tolist()
      ({'cat': 0, 'animal': 1}, [[1], [0]])
    """
    _import_networkx()
    own = g.graph if g.graph.get("format") == _FORMAT else {}
    dim = own.get("dim") if dim is None else dim
    key, value = vectors(dict(g.nodes(data=True)), keys, dim)
    nodes = columns("node", list(g.nodes(data=True)), NODE_FIELDS)
    edges = _edges(g)
    fields = columns("edge", [((u, v), data) for u, v, _, data in edges], EDGE_FIELDS)
    if num_nodes is None:
        num_nodes = own.get("num_nodes", max(1, len(g)))
    slots = assign_nodes(list(g), num_nodes, keeps_ids=bool(own))
    ends = np.array([(slots[u], slots[v]) for u, v, *_ in edges], np.int64).reshape(-1, 2)
    if num_edge_slots is None:
        num_edge_slots = own.get("num_edge_slots", int(np.bincount(ends[:, 0]).max(initial=1)))
    graph = KnowledgeGraph.create(num_nodes, key.shape[1], num_edge_slots=num_edge_slots)
    wanted = [data.get("slot", label) if own else None for _, _, label, data in edges]
    edge_slot = assign_slots(ends[:, 0], fields["weight"], wanted, num_edge_slots)
    counters = _counters(own, nodes, fields)
    at = np.fromiter(slots.values(), int, len(slots))
    graph = filled(graph, at, nodes | {"key": key, "value": value}, counters)
    graph = linked(graph, ends, edge_slot, fields)
    num_dropped = int((edge_slot == num_edge_slots).sum())
    return graph, ImportInfo(slots, num_dropped, _ignored(g, edges))


def save_graphml(graph: KnowledgeGraph, path: str | Path, *, with_vectors: bool = True) -> None:
    """Writes a graph as GraphML, which Gephi, yEd and others read.

    Attributes are those of `to_networkx`; key and value are base64 text of little-endian float32
    numbers, and `slot` is the key of an edge.

    Args:
      graph: the graph.
      path: the file.
      with_vectors: write keys and values; without them the file cannot be read back alone.

    Raises:
      ImportError: networkx is not installed.
    """
    g = _packed(graph, with_vectors)
    # Ids of edges are distinct in a whole file.
    for u, _, slot, data in g.edges(keys=True, data=True):
        data |= {"slot": slot, "id": f"{u}.{slot}"}
    _import_networkx().write_graphml(g, path, edge_id_from_attribute="id")


def load_graphml(path: str | Path, **options: Any) -> tuple[KnowledgeGraph, ImportInfo]:
    """Reads a graph from GraphML, of `save_graphml` or any other.

    Args:
      path: the file.
      **options: of `from_networkx`; labels are the node ids in the file, as text.

    Returns:
      (graph, info), see `from_networkx`.

    Raises:
      ImportError: networkx is not installed.
      ValueError: as `from_networkx`.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from moe_jax.graph import KnowledgeGraph, insert
      >>> graph, _ = insert(KnowledgeGraph.create(4, 2), jnp.eye(2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_graphml(graph, f"{folder}/graph.graphml")
      ...     again, info = load_graphml(f"{folder}/graph.graphml")
      >>> bool((again.key == graph.key).all()), int(again.clock)
      (True, 2)
    """
    nx = _import_networkx()
    g = nx.read_graphml(path, force_multigraph=True)
    if g.graph.get("format") == _FORMAT:
        g = nx.relabel_nodes(g, {label: int(label) for label in g if label.isdecimal()})
    return from_networkx(g, **options)


def save_json(graph: KnowledgeGraph, path: str | Path, *, with_vectors: bool = True) -> None:
    """Writes a graph as JSON in NetworkX's node-link form.

    Attributes are those of `to_networkx`; key and value are base64 text of little-endian float32
    numbers.

    Args:
      graph: the graph.
      path: the file.
      with_vectors: write keys and values; without them the file cannot be read back alone.

    Raises:
      ImportError: networkx is not installed.
    """
    data = _import_networkx().node_link_data(_packed(graph, with_vectors), edges="edges")
    Path(path).write_text(json.dumps(data, allow_nan=False), encoding="utf-8")


def load_json(path: str | Path, **options: Any) -> tuple[KnowledgeGraph, ImportInfo]:
    """Reads a graph from JSON in node-link form, of `save_json` or any other.

    Args:
      path: the file; its edges are under "edges" or "links".
      **options: of `from_networkx`.

    Returns:
      (graph, info), see `from_networkx`.

    Raises:
      ImportError: networkx is not installed.
      ValueError: as `from_networkx`, or the file is not JSON.
    """
    nx = _import_networkx()
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    g = nx.node_link_graph(data, edges="edges" if "edges" in data else "links")
    return from_networkx(g, **options)


def _packed(graph: KnowledgeGraph, with_vectors: bool) -> Any:
    """As `to_networkx`, with vectors as text."""
    g = to_networkx(graph, with_vectors=with_vectors)
    for _, data in g.nodes(data=True):
        data |= {name: pack(data[name]) for name in ("key", "value") if name in data}
    return g


def _counters(own: dict[str, Any], nodes: dict[str, Any], edges: dict[str, Any]) -> dict[str, int]:
    """The original's counters, or as if every node had just been inserted."""
    if own:
        return {name: own.get(name, 0) for name in _COUNTERS}
    times = nodes["created"], nodes["updated"], edges["time"]
    latest = max(int(time.max(initial=0)) for time in times)
    return {"clock": latest, "num_updates": len(nodes["created"])}


def _edges(g: Any) -> list[tuple[Any, Any, Any, dict[str, Any]]]:
    """(source, target, key or None, attributes) of every edge, both ways if undirected."""
    directed = g if g.is_directed() else g.to_directed()
    if g.is_multigraph():
        return list(directed.edges(keys=True, data=True))
    return [(u, v, None, data) for u, v, data in directed.edges(data=True)]


def _ignored(g: Any, edges: list[tuple[Any, ...]]) -> tuple[str, ...]:
    known_of_node, known_of_edge = {*NODE_FIELDS, "key", "value"}, {*EDGE_FIELDS, "slot", "id"}
    names = {name for _, data in g.nodes(data=True) for name in data.keys() - known_of_node}
    names |= {name for *_, data in edges for name in data.keys() - known_of_edge}
    return tuple(sorted(map(str, names)))


def _import_networkx() -> Any:
    try:
        import networkx
    except ImportError as error:
        raise ImportError("networkx is not installed: pip install 'moe-jax[graph]'") from error
    return networkx
