"""The knowledge graph written the slow, obvious way: dicts, loops and Python integers."""

import functools

import numpy as np

F32 = np.float32
FOREVER = 2**31 - 1


def split(x):
    """Three integers per coordinate: x = a0/2^8 + a1/2^16 + a2/2^24 + rest."""
    parts, rest = [], np.asarray(x, np.float64)
    for _ in range(3):
        rest = rest * 256
        parts.append(np.rint(rest).astype(np.int64))
        rest = rest - np.rint(rest)
    return parts


def join(t0, t1, t2, t3):
    total = F32(t0) * F32(2.0**-16)
    for part, scale in ((t1, 2.0**-24), (t2, 2.0**-32), (t3, 2.0**-40)):
        total = total + F32(part) * F32(scale)
    return total


def normalize(x):
    """The unit vector, or None where x has no direction."""
    x = np.asarray(x, np.float32)
    largest = np.abs(x).max()
    if not np.isfinite(largest) or largest < np.finfo(np.float32).tiny:
        return None
    _, exponent = np.frexp(largest)
    scaled = np.ldexp(x.astype(np.float64), -exponent)
    a, b, c = split(scaled)
    squares = join(int(a @ a), int(2 * (a @ b)), int(2 * (a @ c) + b @ b), int(2 * (b @ c)))
    return scaled.astype(np.float32) * (F32(1) / np.sqrt(squares))


@functools.lru_cache(maxsize=10_000)
def split_bytes(data):
    return split(np.frombuffer(data, np.float32))


def cosine(u, v):
    (a0, a1, a2), (b0, b1, b2) = split_bytes(u.tobytes()), split_bytes(v.tobytes())
    t2 = a0 @ b2 + a1 @ b1 + a2 @ b0
    return join(int(a0 @ b0), int(a0 @ b1 + a1 @ b0), int(t2), int(a1 @ b2 + a2 @ b1))


class Graph:
    """Nodes by slot; edges in a list of dicts (or None) by node."""

    def __init__(self, num_nodes, dim, num_edge_slots=8):
        self.num_nodes, self.dim, self.num_edge_slots = num_nodes, dim, num_edge_slots
        self.nodes = {}
        self.edges = {n: [None] * num_edge_slots for n in range(num_nodes)}
        self.clock = self.num_updates = self.num_merged = self.num_rejected = 0
        self.num_evicted = 0

    def best(self, unit, skip=()):
        """(slot, score) of the most similar node, ties to the lowest slot."""
        scored = [(-cosine(unit, self.nodes[n]["key"]), n) for n in self.nodes if n not in skip]
        return (min(scored)[1], -min(scored)[0]) if scored else (None, None)

    def remove(self, slot):
        """Free a slot and forget every edge out of it and into it."""
        del self.nodes[slot]
        self.edges[slot] = [None] * self.num_edge_slots
        for row in self.edges.values():
            for i, edge in enumerate(row):
                if edge is not None and edge["target"] == slot:
                    row[i] = None

    def victim(self, policy):
        def rank(slot):
            node = self.nodes[slot]
            uses = min(int(node["hits"]) + int(node["reads"]), FOREVER)
            return {
                "oldest": (node["created"], slot),
                "least_used": (uses, node["updated"], slot),
                "lowest_confidence": (node["confidence"], node["updated"], slot),
            }[policy]

        return min(self.nodes, key=rank)

    def insert_one(
        self, key, threshold, rule, decay, policy, value, confidence, weight, time, **labels
    ):
        """(node id, what happened, similarity) of one valid item."""
        unit = normalize(key)
        value = unit if value is None else value
        if (
            unit is None
            or not np.isfinite(value).all()
            or not np.isfinite(confidence)
            or weight < 0
        ):
            self.num_rejected += 1
            return self.num_nodes, "rejected", F32(0)
        time = self.clock + 1 if time is None else time
        self.clock = max(self.clock, time)
        slot, score = (None, None) if threshold is None else self.best(unit)
        if threshold is not None:
            threshold = min(F32(threshold), F32(1 - 1e-5)) if threshold <= 1 else F32(threshold)
        if slot is not None and score >= threshold:
            node, outcome = self.nodes[slot], "merged"
            node["hits"] += weight
            node["updated"] = time
            self.num_merged += 1
            if confidence > node["confidence"]:
                node.update(value=value, confidence=confidence, **labels)
            if rule == "ema":
                decay = F32(decay)
                moved = normalize(decay * node["key"] + (F32(1) - decay) * unit)
                node["key"] = node["key"] if moved is None else moved
        elif len(self.nodes) < self.num_nodes or policy != "reject":
            if len(self.nodes) == self.num_nodes:
                self.remove(self.victim(policy))
                self.num_evicted += 1
            slot, outcome = min(set(range(self.num_nodes)) - set(self.nodes)), "created"
            new = {"key": unit, "value": value, "confidence": confidence, "hits": weight}
            self.nodes[slot] = dict(new, created=time, updated=time, reads=0, **labels)
        else:
            self.num_rejected += 1
            return self.num_nodes, "rejected", F32(0) if score is None else score
        self.num_updates += 1
        return slot, outcome, F32(0) if score is None else score

    def insert(self, items, threshold=0.95, rule="leader", decay=0.3, policy="reject"):
        """Outcomes of a dict of columns; "time" and "value" may be absent."""
        outcomes = []
        for i in range(len(items["key"])):
            if not items["is_valid"][i]:
                outcomes.append((self.num_nodes, "invalid", F32(0)))
                continue
            item = {name: items[name][i] if name in items else None for name in COLUMNS}
            item.update(threshold=threshold, rule=rule, decay=decay, policy=policy)
            outcomes.append(self.insert_one(**item))
        return outcomes

    def link_one(self, source, target, weight, kind, time, on_duplicate, start=0, end=FOREVER):
        """Whether the edge was written."""
        if source == target or source not in self.nodes or target not in self.nodes:
            return False
        if weight is None:
            weight = cosine(self.nodes[source]["key"], self.nodes[target]["key"])
        if not np.isfinite(weight) or kind < 0 or start > end:
            return False
        row = self.edges[source]
        new = {"target": target, "weight": weight, "kind": kind, "time": time}
        new.update(start=start, end=end)
        for slot, edge in enumerate(row):
            is_same = edge is not None and (edge["target"], edge["kind"]) == (target, kind)
            if is_same and on_duplicate == "update":
                row[slot] = new
                return True
        if None in row:
            row[row.index(None)] = new
            return True
        weakest = min(range(len(row)), key=lambda slot: row[slot]["weight"])
        if weight > row[weakest]["weight"]:
            row[weakest] = new
            return True
        return False

    def link(self, edges, symmetric, on_duplicate):
        """How many of a list of (source, target, weight, kind, time[, start, end]) were written."""
        count = 0
        for source, target, weight, kind, time, *valid in edges:
            count += self.link_one(source, target, weight, kind, time, on_duplicate, *valid)
            if symmetric:
                count += self.link_one(target, source, weight, kind, time, on_duplicate, *valid)
        return count

    def link_similar(self, node_id, queries, k, threshold, on_duplicate, symmetric=False):
        """How many edges were written; `queries` may be None."""
        wanted = []
        for i, source in enumerate(node_id):
            if source not in self.nodes or (queries is None and source in node_id[:i]):
                continue
            unit = self.nodes[source]["key"] if queries is None else normalize(queries[i])
            found = (
                [] if unit is None else self.search(unit, k, threshold, lambda n, s=source: n != s)
            )
            wanted += [(source, n, score, 0, self.clock) for n, score in found]
        return self.link(wanted, symmetric, on_duplicate)

    def link_stream(self, node_id, stream, position, weight, is_valid, tail, num_carried):
        """How many edges were written; tail, a dict from stream to node, goes on."""
        wanted, last = [], dict(tail)
        for i in sorted(range(len(node_id)), key=lambda i: (stream[i], position[i], i)):
            if is_valid[i] and node_id[i] in self.nodes:
                if stream[i] in last:
                    wanted.append((last[stream[i]], node_id[i], weight[i], 1, self.clock))
                last[stream[i]] = node_id[i]
        tail.update((s, node) for s, node in last.items() if 0 <= s < num_carried)
        return self.link(wanted, False, "update")

    def search(self, unit, k, threshold=-1.0, accept=lambda slot: True):
        scored = [(-cosine(unit, self.nodes[n]["key"]), n) for n in self.nodes if accept(n)]
        # Rounding takes cosines of opposite vectors below -1, and those of equal ones below 1.
        least = -np.inf if threshold <= -1 else min(F32(threshold), F32(1 - 1e-5))
        return [(n, -s) for s, n in sorted(scored)[:k] if -s >= least]

    def arrays(self):
        """The same leaves as the fast graph, as a dict of numpy arrays."""
        n, d, m = self.num_nodes, self.dim, self.num_edge_slots
        empty = {
            "key": np.zeros(d),
            "value": np.zeros(d),
            "kind": 0,
            "expert_id": -1,
            "confidence": 0,
        }
        empty.update(hits=0, created=0, updated=0, source=[-1, -1], symbol=-1, reads=0)
        free = {"target": n, "weight": 0, "kind": 0, "time": 0, "start": 0, "end": FOREVER}
        out = {name: np.array([self.nodes.get(i, empty)[name] for i in range(n)]) for name in empty}
        out["is_live"] = np.array([i in self.nodes for i in range(n)])
        for name in free:
            rows = [[(self.edges[i][j] or free)[name] for j in range(m)] for i in range(n)]
            out["edge_" + name] = np.array(rows)
        counters = ("clock", "num_updates", "num_merged", "num_rejected", "num_evicted")
        return out | {name: np.array(getattr(self, name)) for name in counters}


COLUMNS = ("key", "value", "confidence", "expert_id", "kind", "source", "symbol", "weight", "time")
