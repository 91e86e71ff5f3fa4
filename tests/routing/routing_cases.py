"""Random routings of few shapes, and the whole path from logits to outputs as one function."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import routing_oracle as oracle

from moe_jax.routing import (
    combine,
    dispatch,
    dispatch_index,
    make_plan,
    router_z_loss,
    routing_stats,
    switch_balance_loss,
    topk,
    usage_mse_loss,
)

# B, S, E, K, C: few, so that few programs are compiled. Capacities below, at and above need.
SHAPES = [(2, 7, 3, 2, 2), (1, 12, 4, 1, 8), (3, 5, 5, 5, 3)]
PRIORITIES = ["position", "choice", "probability"]
WIDTH = 3


class Case(NamedTuple):
    """One random routing: what the router says, what is padding, and the tokens."""

    logits: np.ndarray
    is_valid: np.ndarray
    x: np.ndarray


def random_case(rng, shape):
    """Logits on a coarse grid, so that ties abound, or skewed, so that experts overflow."""
    batch, length, num_experts, *_ = shape
    logits = rng.normal(size=(batch, length, num_experts))
    match rng.integers(4):
        case 0:
            logits = np.round(logits)
        case 1:
            logits = np.round(2 * logits) + np.arange(num_experts)
        case 2:
            logits = np.zeros_like(logits)
    is_valid = rng.random((batch, length)) < rng.choice([0.0, 0.5, 0.9, 1.0])
    x = rng.normal(size=(batch, length, WIDTH))
    return Case(logits.astype(np.float32), is_valid, x.astype(np.float32))


def route(logits, is_valid, x, *, k, capacity, priority):
    """Everything that routing computes, with experts that scale by their id plus one."""
    num_experts = logits.shape[-1]
    plan = make_plan(
        topk(logits, k),
        num_experts=num_experts,
        capacity=capacity,
        priority=priority,
        is_valid=is_valid,
    )
    index = dispatch_index(plan, num_experts, capacity)
    inputs = dispatch(x, index)
    scale = jnp.arange(1.0, num_experts + 1)[:, None, None, None]
    return {
        "plan": plan,
        "inputs": inputs,
        "output": combine(inputs.x * scale, plan.weight, index),
        "stats": routing_stats(logits, plan, is_valid),
        "switch": switch_balance_loss(logits, plan.expert, is_valid),
        "mse": usage_mse_loss(logits, is_valid),
        "z": router_z_loss(logits, is_valid),
    }


STATIC = ("k", "capacity", "priority")
fast_route = jax.jit(route, static_argnames=STATIC)


@functools.partial(jax.jit, static_argnames=STATIC)
def vmapped_route(logits, is_valid, x, **options):
    return jax.vmap(functools.partial(route, **options))(logits, is_valid, x)


@jax.jit
def fast_best(logits):
    """The probability of each token's first choice."""
    return topk(logits, 1).probability[..., 0]


def expected_route(case, shape, priority):
    """The oracle's account of `route`; its slots are given as one dict per row."""
    _, _, num_experts, k, capacity = shape
    expert, weight = oracle.topk(case.logits, k)
    # The order by probability must break ties on the very float32 numbers that are compared.
    # As the library rounds it: ties are many, and go to the earlier token.
    best = np.asarray(fast_best(case.logits))
    slots = oracle.plan(expert, best, capacity, priority, case.is_valid)
    buffer, is_valid, position = oracle.dispatch(case.x, expert, slots, num_experts, capacity)
    scale = np.arange(1.0, num_experts + 1)[:, None, None, None]
    return {
        "expert": expert,
        "weight": weight,
        "slots": slots,
        "inputs": (buffer, is_valid, position),
        "output": oracle.combine(buffer * scale, weight, expert, slots),
        "stats": oracle.stats(case.logits, expert, slots, case.is_valid),
        "switch": oracle.switch_balance_loss(case.logits, expert, case.is_valid),
        "mse": oracle.usage_mse_loss(case.logits, case.is_valid),
        "z": oracle.router_z_loss(case.logits, case.is_valid),
    }


def slots_of(plan):
    """The plan's slots as the oracle gives them: one dict of kept choices per row."""
    rows = [{} for _ in plan.expert]
    for b, s, k in zip(*np.nonzero(plan.is_kept), strict=True):
        rows[b][int(s), int(k)] = int(plan.slot[b, s, k])
    return rows
