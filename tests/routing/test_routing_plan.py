"""Properties of plans and capacities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routing_cases import PRIORITIES

from moe_jax.routing import Choices, expert_capacity, make_plan, topk

E, K, C = 4, 2, 5


@pytest.fixture(scope="module")
def plan_of():
    def plan(logits, is_valid, priority):
        return make_plan(
            topk(logits, K), num_experts=E, capacity=C, priority=priority, is_valid=is_valid
        )

    return jax.jit(plan, static_argnames="priority")


@pytest.fixture(params=range(2))
def case(request):
    rng = np.random.default_rng(request.param)
    logits = rng.normal(size=(3, 16, E)).astype(np.float32) + np.array([1, 0, 0, -1], np.float32)
    return logits, rng.random((3, 16)) < 0.8


@pytest.mark.parametrize("priority", PRIORITIES)
def test_no_slot_is_used_twice_and_capacity_holds(plan_of, case, priority):
    plan = plan_of(*case, priority=priority)
    assert 0 < plan.is_kept.sum() < plan.is_kept.size
    for expert, slot, kept in zip(plan.expert, plan.slot, plan.is_kept, strict=True):
        for e in range(E):
            used = np.asarray(slot)[np.asarray(kept) & (np.asarray(expert) == e)]
            # Slots are handed out from the front, so the first n are used, n at most C.
            np.testing.assert_array_equal(np.sort(used), np.arange(len(used)))
            assert len(used) <= C


@pytest.mark.parametrize("priority", PRIORITIES)
def test_padding_takes_no_slot_and_changes_nothing(plan_of, case, priority):
    logits, is_valid = case
    plan = plan_of(logits, is_valid, priority=priority)
    assert not np.any(np.asarray(plan.is_kept)[~is_valid])
    garbage = np.where(is_valid[..., None], logits, np.random.default_rng(9).normal(size=E) * 50)
    other = plan_of(garbage.astype(np.float32), is_valid, priority=priority)
    for a, b in zip(plan, other, strict=True):
        np.testing.assert_array_equal(np.asarray(a)[is_valid], np.asarray(b)[is_valid])


@pytest.mark.parametrize("priority", PRIORITIES)
def test_rows_do_not_share_slots(plan_of, case, priority):
    logits, is_valid = case
    plan = plan_of(logits, is_valid, priority=priority)
    changed = plan_of(np.concatenate([logits[:1], -logits[1:]]), is_valid, priority=priority)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), plan, changed)


def test_position_priority_is_causal(plan_of, case):
    logits, is_valid = case
    plan = jax.tree.map(np.asarray, plan_of(logits, is_valid, priority="position"))
    assert not np.all(plan.is_kept[is_valid])
    for t in range(1, 16):
        later = np.concatenate([logits[:, :t], np.roll(logits[:, t:], 1, axis=-1)], axis=1)
        valid = np.concatenate([is_valid[:, :t], ~is_valid[:, t:]], axis=1)
        changed = jax.tree.map(np.asarray, plan_of(later, valid, priority="position"))
        for a, b in zip(plan, changed, strict=True):
            np.testing.assert_array_equal(a[:, :t], b[:, :t])


def test_first_choices_come_before_second_ones(plan_of, case):
    plan = jax.tree.map(np.asarray, plan_of(*case, priority="choice"))
    _, is_valid = case
    for b in range(3):
        for e in range(E):
            sent = (plan.expert[b] == e) & is_valid[b][:, None]
            first, second = sent[:, 0], sent[:, 1]
            if np.any(plan.is_kept[b, :, 1] & second):
                assert np.all(plan.is_kept[b, :, 0][first])


def test_probable_tokens_come_before_others(plan_of, case):
    plan = jax.tree.map(np.asarray, plan_of(*case, priority="probability"))
    logits, is_valid = case
    sure = np.asarray(jax.nn.softmax(logits, axis=-1)).max(axis=-1)
    for b in range(3):
        for e in range(E):
            sent = (plan.expert[b, :, 0] == e) & is_valid[b]
            best = sure[b]
            kept, dropped = best[sent & plan.is_kept[b, :, 0]], best[sent & ~plan.is_kept[b, :, 0]]
            if len(dropped):
                assert kept.min() >= dropped.max()


def test_a_token_is_as_probable_as_its_best_choice():
    """A balance bias may put the lighter choice first."""
    best = jnp.linspace(0.5, 1.0, 16)[None, :, None]
    expert = jnp.broadcast_to(jnp.array([0, 1]), (1, 16, 2))
    choices = Choices(expert, jnp.concatenate([1.0 - best, best], axis=-1))
    plan = make_plan(choices, num_experts=2, capacity=8, priority="probability")
    np.testing.assert_array_equal(plan.is_kept[0, :, 0], np.arange(16) >= 8)


@pytest.mark.parametrize("k", [1, 2])
def test_the_least_sure_tokens_go_by_the_softmax_over_all_experts(k):
    """Weights among the chosen say nothing of it: with one choice they are all 1."""
    sure = jnp.linspace(0.0, 2.0, 16)[None, :, None] * jnp.array([[[1.0, 0.9, 0.0, 0.0]]])
    plan = make_plan(topk(sure, k), num_experts=4, capacity=8, priority="probability")
    np.testing.assert_array_equal(plan.is_kept[0, :, 0], np.arange(16) >= 8)


def test_no_mask_means_no_padding():
    choices = topk(jax.random.normal(jax.random.key(0), (2, 6, E)), K)
    options = {"num_experts": E, "capacity": 2}
    everything = make_plan(choices, is_valid=jnp.ones((2, 6), bool), **options)
    jax.tree.map(np.testing.assert_array_equal, make_plan(choices, **options), everything)


@pytest.mark.parametrize(
    ("size", "num_experts", "k", "factor", "expected"),
    [
        (128, 32, 3, 1.25, 16),  # ceil(15) -> 16
        (512, 8, 2, 1.25, 160),
        (64, 4, 1, 1.0, 16),
        (64, 4, 1, 1.01, 24),
        (80, 1, 1, 1.1, 80),  # never more than the group has tokens
        (80, 10, 10, 1.1, 80),
        (40, 4, 4, 0.2, 8),
        (100, 10, 8, 1.1, 88),  # 1.1 * 80 = 88.00000000000001 asks for no 89th slot
        (1, 64, 1, 1.0, 8),
        (9, 2, 2, 100.0, 16),
    ],
)
def test_capacity(size, num_experts, k, factor, expected):
    assert expert_capacity(size, num_experts, k, factor) == expected


@pytest.mark.parametrize("name", ["group_size", "num_experts", "num_choices", "capacity_factor"])
@pytest.mark.parametrize("value", [0, -2])
def test_capacity_refuses_what_is_not_positive(name, value):
    sizes = {"group_size": 8, "num_experts": 4, "num_choices": 2, "capacity_factor": 1.0}
    sizes[name] = float(value) if name == "capacity_factor" else value
    with pytest.raises(ValueError, match=f"{name} must be positive, got {value}"):
        expert_capacity(**sizes)


def test_plan_refuses_no_capacity():
    choices = Choices(jnp.zeros((1, 2, 1), jnp.int32), jnp.ones((1, 2, 1)))
    with pytest.raises(ValueError, match="capacity must be positive, got 0"):
        make_plan(choices, num_experts=2, capacity=0)
