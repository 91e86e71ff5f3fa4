"""Slow and obvious routing: loops and dicts over numpy arrays."""

import math

import numpy as np


def softmax(logits):
    """Over the last axis, in float64."""
    logits = np.asarray(logits, np.float64)
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def topk(logits, k, bias=None):
    """Experts and weights of every token; ties go to the lower id."""
    logits = np.asarray(logits, np.float32)
    biased = logits if bias is None else logits + np.asarray(bias, np.float32)
    expert = np.zeros((*logits.shape[:2], k), int)
    weight = np.zeros((*logits.shape[:2], k))
    for b, s in np.ndindex(*logits.shape[:2]):
        order = sorted(range(logits.shape[2]), key=lambda e: (-biased[b, s, e], e))
        expert[b, s] = order[:k]
        weight[b, s] = softmax(logits[b, s, order[:k]])
    return expert, weight


def plan(expert, best, capacity, priority, is_valid):
    """One dict per row of the batch: the slot of each (token, choice) that found one.

    `best` [B, S] is the probability of a token's first choice among all experts.
    """
    batch, length, num_choices = expert.shape
    rows = []
    for b in range(batch):
        tokens = [s for s in range(length) if is_valid[b, s]]
        if priority == "probability":
            tokens = sorted(tokens, key=lambda s: (-best[b, s], s))
        if priority == "position":
            order = [(s, k) for s in tokens for k in range(num_choices)]
        else:
            order = [(s, k) for k in range(num_choices) for s in tokens]
        taken, slots = {}, {}
        for s, k in order:
            e = int(expert[b, s, k])
            slot = taken.get(e, 0)
            taken[e] = slot + 1
            if slot < capacity:
                slots[s, k] = slot
        rows.append(slots)
    return rows


def dispatch(x, expert, slots, num_experts, capacity):
    """Buffers, validity and positions, by expert, row and slot."""
    batch, length, width = x.shape
    buffer = np.zeros((num_experts, batch, capacity, width))
    is_valid = np.zeros((num_experts, batch, capacity), bool)
    position = np.full((num_experts, batch, capacity), length)
    for b, row in enumerate(slots):
        for (s, k), slot in row.items():
            e = expert[b, s, k]
            assert not is_valid[e, b, slot]
            buffer[e, b, slot] = x[b, s]
            is_valid[e, b, slot] = True
            position[e, b, slot] = s
    return buffer, is_valid, position


def combine(outputs, weight, expert, slots):
    """The weighted sum of what each token's kept choices gave."""
    total = np.zeros((*weight.shape[:2], outputs.shape[-1]))
    for b, row in enumerate(slots):
        for (s, k), slot in row.items():
            total[b, s] += float(weight[b, s, k]) * outputs[expert[b, s, k], b, slot]
    return total


def one_hot(expert, slots, num_experts, capacity):
    """[B, S, K, E, C], 1 where a choice sits in a slot: the dense form of a plan."""
    dense = np.zeros((*expert.shape, num_experts, capacity))
    for b, row in enumerate(slots):
        for (s, k), slot in row.items():
            dense[b, s, k, expert[b, s, k], slot] = 1.0
    return dense


def load(expert, num_experts, is_valid):
    """Share of the valid tokens' choices that each expert received."""
    count = np.zeros(num_experts)
    for b, s, k in np.ndindex(*expert.shape):
        if is_valid[b, s]:
            count[expert[b, s, k]] += 1
    return count / max(count.sum(), 1)


def mean_probability(logits, is_valid):
    """Mean router probability of each expert over the valid tokens."""
    rows = [softmax(logits[b, s]) for b, s in zip(*np.nonzero(is_valid), strict=True)]
    return np.mean(rows, axis=0) if rows else np.zeros(logits.shape[-1])


def switch_balance_loss(logits, expert, is_valid):
    """E * sum over experts of share times probability."""
    num_experts = logits.shape[-1]
    share, probability = load(expert, num_experts, is_valid), mean_probability(logits, is_valid)
    return num_experts * sum(f * p for f, p in zip(share, probability, strict=True))


def usage_mse_loss(logits, is_valid):
    """Mean squared distance of the mean probabilities from 1/E."""
    num_experts = logits.shape[-1]
    return sum((p - 1 / num_experts) ** 2 for p in mean_probability(logits, is_valid)) / num_experts


def router_z_loss(logits, is_valid):
    """Mean squared log-sum-exp."""
    each = [
        math.log(sum(math.exp(x) for x in logits[b, s])) ** 2
        for b, s in zip(*np.nonzero(is_valid), strict=True)
    ]
    return sum(each) / max(len(each), 1)


def stats(logits, expert, slots, is_valid):
    """Load, largest load over mean load, share dropped, mean entropy."""
    num_experts = logits.shape[-1]
    share = load(expert, num_experts, is_valid)
    wanted = int(is_valid.sum()) * expert.shape[2]
    kept = sum(len(row) for row in slots)
    entropies = []
    for b, s in zip(*np.nonzero(is_valid), strict=True):
        p = softmax(logits[b, s])
        entropies.append(-sum(q * math.log(q) for q in p if q > 0))
    return {
        "load": share,
        "max_over_mean": share.max() * num_experts,
        "dropped_fraction": 1 - kept / wanted if wanted else 0.0,
        "entropy": np.mean(entropies) if entropies else 0.0,
    }
