"""Sizes, graphs and checks that the tests of cells share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from graph_cases import random_keys

from moe_jax.graph import (
    KnowledgeGraph,
    build_cells,
    insert,
    num_missing,
    search,
    search_cells,
    update_cells,
)
from moe_jax.graph.state import with_keys

N, D, L, P, V, K = 60, 4, 5, 16, 8, 7
KEY = jax.random.key(0)
build = functools.partial(
    build_cells, num_cells=L, slots_per_cell=P, overflow_slots=V, iterations=3, key=KEY
)
exact = jax.jit(search, static_argnames="k")
probe = jax.jit(search_cells, static_argnames=("k", "probes", "first_pass"))
update = jax.jit(update_cells, donate_argnums=1)
add = jax.jit(functools.partial(insert, merge_threshold=2.0))  # copies become nodes of their own


@jax.jit
def write_all(graph, keys):
    return with_keys(graph, jnp.arange(len(keys)), keys)


def random_graph(seed):
    rows = 50
    rng = np.random.default_rng(seed)
    graph, _ = add(
        KnowledgeGraph.create(N, D),
        random_keys(rng, rows, D),
        expert_id=rng.integers(3, size=rows),
        kind=rng.integers(3, size=rows),
        confidence=rng.choice([0.0, 0.5, 0.9], size=rows).astype(np.float32),
    )
    return graph._replace(is_live=graph.is_live & jnp.asarray(rng.random(N) < 0.9))


def assert_sound(graph, cells, slots=P):
    """Each live node in the one place it says, unless it has none; every other place empty."""
    members, overflow = np.asarray(cells.members), np.asarray(cells.overflow)
    places = np.concatenate([members.ravel(), overflow])
    np.testing.assert_array_equal(cells.counts, (members < N).sum(axis=1))
    assert members.shape[1] == slots
    taken = places[places < N]
    assert len(set(taken)) == len(taken)
    for node, place in enumerate(np.asarray(cells.place)):
        if place < len(places):
            assert places[place] == node
            assert bool(graph.is_live[node])
        else:
            assert place == len(places)
            assert node not in taken
    assert int(num_missing(graph, cells)) == int(graph.num_live) - len(taken)


def all_alike():
    """A full graph of one key."""
    keys = jnp.tile(jnp.eye(D)[:1], (N, 1))
    graph = with_keys(KnowledgeGraph.create(N, D), jnp.arange(N), keys)
    return graph._replace(is_live=jnp.ones(N, bool))
