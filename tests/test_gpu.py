"""What only a GPU can show: the seed sizes, no transfers, and answers equal to the CPU's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import MoESystem
from moe_jax.config import h100, tiny
from moe_jax.graph import KnowledgeGraph, insert, link_similar, search
from moe_jax.ops.search import encode, nearest
from moe_jax.routing import combine, dispatch, dispatch_index, make_plan, topk

pytestmark = pytest.mark.gpu

SIZES = {
    "small": (tiny().replace(compute_dtype="bfloat16"), 4, 32),
    "seed": (h100().replace(max_kg_nodes=20_000), 8, 128),
}


def is_finite(tree):
    numbers = [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.floating)]
    return all(bool(jnp.all(jnp.isfinite(a))) for a in numbers)


def build(size):
    config, batch, length = SIZES[size]
    system = MoESystem(config)
    x = jax.random.normal(jax.random.key(1), (batch, length, config.input_dim))
    return system, jax.jit(system.init)(jax.random.key(0), x), x


@pytest.mark.parametrize("size", SIZES)
def test_inference_step_is_finite_and_transfers_nothing(size):
    system, variables, x = build(size)
    graph, step = system.create_graph(), system.inference_step()
    graph, out, _ = step(variables, graph, x)
    with jax.transfer_guard("disallow"):
        graph, out, info = jax.block_until_ready(step(variables, graph, x))
    assert is_finite((graph, out))
    assert int(info.merged.sum()) > 0
    assert int(info.created.sum()) == 0


@pytest.mark.parametrize(
    ("size", "remat"), [("small", "none"), ("small", "full"), ("seed", "none")]
)
def test_training_step_learns_and_transfers_nothing(size, remat):
    system, variables, x = build(size)
    system = MoESystem(system.config.replace(remat=remat))
    optimizer = optax.adamw(1e-4)
    target = jnp.ones((*x.shape[:2], system.config.output_dim))

    def loss(variables, x, key):
        out = system.apply(variables, x, is_training=True, rngs={"dropout": key})
        error = out.output.astype(jnp.float32) - target
        return jnp.mean(jnp.square(error)) + out.losses.total, out.proposals

    def step(variables, moments, graph, key, x):
        key, own = jax.random.split(key)
        (value, proposals), grads = jax.value_and_grad(loss, has_aux=True)(variables, x, own)
        updates, moments = optimizer.update(grads, moments, variables)
        graph, _ = system.write(graph, proposals)
        return optax.apply_updates(variables, updates), moments, graph, key, value

    step = jax.jit(step, donate_argnums=(0, 1, 2, 3))
    state = (variables, optimizer.init(variables), system.create_graph(), jax.random.key(2))
    *state, first = step(*state, x)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            *state, last = step(*state, x)
    assert is_finite((state[0], state[2], last))
    assert float(last) < float(first)


def random_stream(rng, rows, dim):
    centres = rng.normal(size=(rows // 3, dim))
    keys = centres[rng.integers(rows // 3, size=rows)] + 0.24 * rng.normal(size=(rows, dim))
    keys[rng.integers(rows, size=4)] = keys[0]
    return {
        "keys": keys.astype(np.float32),
        "confidence": rng.random(rows).astype(np.float32),
        "expert_id": rng.integers(8, size=rows).astype(np.int32),
    }


def run_stream(items, num_nodes, cuts=()):
    """The graph after the stream, cut into calls, then linked; and the ids of all items."""
    rows, dim = items["keys"].shape
    graph, ids = KnowledgeGraph.create(num_nodes, dim), []
    for part in np.split(np.arange(rows), cuts):
        graph, info = insert(graph, **{k: v[part] for k, v in items.items()}, merge_threshold=0.94)
        ids.append(np.asarray(info.node_id))
    graph, _ = link_similar(graph, jnp.asarray(np.concatenate(ids)), k=4)
    return jax.device_get(graph), np.concatenate(ids)


def assert_same(ours, theirs):
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        if np.issubdtype(a.dtype, np.floating):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("dim", [64, 512, 600])
def test_the_graph_equals_the_cpus(dim):
    rng = np.random.default_rng(dim)
    items = random_stream(rng, 300, dim)
    queries = (items["keys"][:40] + 0.1 * rng.normal(size=(40, dim))).astype(np.float32)
    results = []
    for device in (jax.devices("gpu")[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            graph, ids = run_stream(items, 5000)
            held = KnowledgeGraph(*map(jnp.asarray, graph))
            # As many as the kernels pick in 16, 32 and 64 rows, and more than they take.
            hits = jax.device_get([search(held, queries, k=k) for k in (7, 20, 32, 48, 60)])
        results.append((graph, ids, hits))
    (graph, ids, hits), (cpu_graph, cpu_ids, cpu_hits) = results
    assert 0 < len(np.unique(ids)) < 300
    np.testing.assert_array_equal(ids, cpu_ids)
    assert_same(graph, cpu_graph)
    for ours, theirs in zip(hits, cpu_hits, strict=True):
        assert_same(ours, theirs)


def test_near_ties_among_more_keys_than_are_multiplied_at_once():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2**18 + 1000, 64))
    crowd = rng.choice(len(keys), 1000, replace=False)
    keys[crowd] = keys[0] + 1e-4 * rng.normal(size=(1000, 64))
    queries = np.concatenate([keys[:1], rng.normal(size=(39, 64))])
    # Unit vectors of the host, as devices round square roots and quotients differently.
    keys, queries = (
        (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (keys, queries)
    )
    found = []
    for device in (jax.devices("gpu")[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            held, is_candidate = jnp.asarray(keys), jnp.ones(len(keys), bool)
            find = functools.partial(nearest, keys=held, is_candidate=is_candidate, k=10)
            # One query whose bound cannot tell the crowd apart, alone and among many; all of them.
            some = queries[:1], queries, np.repeat(queries[:1], 40, axis=0)
            hits = [find(jnp.asarray(q), code=code) for q in some for code in (None, encode(held))]
            found.append(jax.device_get(hits))
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("dim", [64, 512, 600])
def test_a_split_of_the_stream_does_not_matter_to_the_bit(dim):
    items = random_stream(np.random.default_rng(dim), 300, dim)
    whole, whole_ids = run_stream(items, 5000)
    for cuts in ([1], [100, 200], range(50, 300, 50)):
        graph, ids = run_stream(items, 5000, cuts)
        np.testing.assert_array_equal(ids, whole_ids)
        # By default the clock ticks once per item, in whatever calls they come.
        for name, a, b in zip(graph._fields, graph, whole, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_gradients_of_dispatch_and_combine_are_the_same_bits_every_time():
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jax.random.normal(keys[0], (4, 256, 16))
    x = jax.random.normal(keys[1], (4, 256, 128), jnp.bfloat16)
    out = jax.random.normal(keys[2], (4, 256, 128))

    def loss(x, logits):
        plan = make_plan(topk(logits, 3), num_experts=16, capacity=64)
        index = dispatch_index(plan, 16, 64)
        buffers = dispatch(x, index).x
        return jnp.sum(combine(jnp.tanh(buffers), plan.weight, index) * out)

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    first = jax.device_get(grad(x, logits))
    assert all(np.abs(g.astype(np.float32)).max() > 0 for g in first)
    for _ in range(10):
        for a, b in zip(first, jax.device_get(grad(x, logits)), strict=True):
            np.testing.assert_array_equal(a, b)
