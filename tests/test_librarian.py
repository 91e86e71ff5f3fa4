"""The librarian: repetition by either rule, an encoder that starts as nothing, and its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.librarian import Librarian, contrastive_loss, deduplicate
from moe_jax.ops import exact_cosine, normalize
from moe_jax.reports import DraftReports

R, O = 8, 3  # noqa: E741
RULES = ["leader", "any_earlier"]
fast_deduplicate = jax.jit(deduplicate, static_argnames=("rule", "threshold"))


def slow_leaders(similarity, confidence, is_valid, threshold, rule):
    """One report after another, each compared with the earlier ones that count."""
    leader = [R] * R
    order = [r for r in range(R) if is_valid[r]]
    if rule == "leader":
        order.sort(key=lambda r: (-confidence[r], r))
    earlier = []
    for r in order:
        repeated = [q for q in earlier if similarity[r, q] > threshold]
        if not repeated:
            leader[r] = r
        elif rule == "leader":
            leader[r] = max(repeated, key=lambda q: similarity[r, q])
        else:
            leader[r] = leader[repeated[0]]
        if rule == "any_earlier" or leader[r] == r:
            earlier.append(r)
    return leader


def random_reports(rng):
    """Clusters and grid points, so that exact ties and chains of repetition abound."""
    centres = rng.normal(size=(3, O))
    summary = centres[rng.integers(3, size=R)] + rng.choice([0.1, 0.5]) * rng.normal(size=(R, O))
    if rng.random() < 0.4:
        summary = rng.integers(-1, 2, size=(R, O))
    return DraftReports(
        summary=jnp.asarray(summary, jnp.float32),
        confidence=jnp.asarray(rng.choice([0.1, 0.5, 0.9], size=R), jnp.float32),
        expert_id=jnp.arange(R),
        sequence=jnp.asarray(rng.integers(3, size=R)),
        positions=jnp.zeros((R, 1), int),
        source=jnp.asarray(rng.integers(9, size=(R, 2))),
        is_valid=jnp.asarray(rng.random(R) < 0.8),
    )


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_repetitions_equal_the_oracle(rule, seed):
    rng = np.random.default_rng(seed)
    reports = random_reports(rng)
    key = normalize(reports.summary)
    similarity = np.asarray(exact_cosine(key, key))
    # Zero is the very cosine of many grid points, which therefore does not exceed it.
    threshold = float(rng.choice([0.85, 0.0]))
    arguments = (reports.confidence, reports.is_valid)
    leader = fast_deduplicate(key, *arguments, threshold=threshold, rule=rule)
    expected = slow_leaders(similarity, *map(np.asarray, arguments), threshold, rule)
    assert leader.tolist() == expected


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match='rule must be "leader" or "any_earlier", got'):
        deduplicate.__wrapped__(  # under the annotations' run-time check
            jnp.eye(2), jnp.ones(2), jnp.ones(2, bool), rule="latest"
        )


@functools.cache
def compiled(**fields):
    librarian = Librarian(**fields)
    return jax.jit(librarian.init), jax.jit(librarian.apply)


@functools.cache
def case(seed=0):
    return random_reports(np.random.default_rng(seed))


@functools.cache
def variables_of(**fields):
    return compiled(**fields)[0](jax.random.key(0), case())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(5))
def test_weights_add_up_to_the_number_of_reports(rule, seed):
    reports = case(seed)
    proposals = compiled(rule=rule)[1](variables_of(rule=rule), reports)
    is_valid, is_kept, leader = map(
        np.asarray, (reports.is_valid, proposals.is_kept, proposals.leader)
    )
    assert proposals.weight.sum() == is_valid.sum()
    np.testing.assert_array_equal(np.asarray(proposals.weight) > 0, is_kept)
    assert not np.any(is_kept & ~is_valid)
    np.testing.assert_array_equal(leader < R, is_valid)
    assert np.all(is_kept[leader[is_valid]])
    np.testing.assert_array_equal(is_kept, leader == np.arange(R))
    for name in ("confidence", "expert_id", "source"):
        np.testing.assert_array_equal(getattr(proposals, name), getattr(reports, name))
    np.testing.assert_array_equal(proposals.value, reports.summary)


def test_the_encoder_starts_as_the_identity():
    reports = case()
    proposals = compiled()[1](variables_of(), reports)
    summary = jnp.where(reports.is_valid[:, None], reports.summary, 0.0)
    np.testing.assert_array_equal(proposals.key, normalize(summary))
    norms = np.linalg.norm(proposals.key, axis=1)
    has_direction = np.any(np.asarray(summary) != 0, axis=1)
    np.testing.assert_allclose(norms[has_direction], 1.0, rtol=1e-6)
    plain = compiled(residual=False)[1](variables_of(residual=False), reports)
    assert not np.allclose(plain.key, proposals.key, atol=0.1)


@pytest.mark.parametrize("rule", RULES)
def test_masked_reports_never_matter(rule):
    reports = case(1)
    assert 0 < reports.is_valid.sum() < R
    run, variables = compiled(rule=rule)[1], variables_of(rule=rule)
    garbage = reports._replace(
        summary=jnp.where(reports.is_valid[:, None], reports.summary, jnp.nan),
        confidence=jnp.where(reports.is_valid, reports.confidence, jnp.nan),
    )
    clean, other = run(variables, reports), run(variables, garbage)
    for name in ("key", "weight", "leader", "is_kept"):
        np.testing.assert_array_equal(getattr(clean, name), getattr(other, name))


def slow_contrastive(key, sequence, is_valid, temperature=0.1):
    rows = [r for r in range(R) if is_valid[r]]
    losses = []
    for r in rows:
        others = [q for q in rows if q != r]
        partners = [q for q in others if sequence[q] == sequence[r]]
        if partners:
            total = np.log(sum(np.exp(key[r] @ key[q] / temperature) for q in others))
            losses.append(-np.mean([key[r] @ key[q] / temperature - total for q in partners]))
    return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("seed", range(4))
def test_contrastive_loss_equals_a_loop(seed):
    reports = case(seed)
    key = normalize(reports.summary)
    loss = contrastive_loss(key, reports.sequence, reports.is_valid)
    expected = slow_contrastive(
        np.asarray(key, np.float64), np.asarray(reports.sequence), np.asarray(reports.is_valid)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def separated(residual):
    """The contrastive loss of a librarian as a function of its parameters."""
    run, reports = compiled(residual=residual)[1], case(1)

    def loss(variables):
        key = run(variables, reports).key
        return contrastive_loss(key, reports.sequence, reports.is_valid)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("residual", [True, False])
def test_contrastive_loss_reaches_the_encoder(residual):
    variables, run = variables_of(residual=residual), separated(residual)
    before, gradient = run(variables)
    assert np.any(gradient["params"]["encoder_out"]["kernel"] != 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    # Along the gradient the loss grows as fast as the gradient says, keys' normalisation included.
    step = 1e-3

    def moved(sign):
        return run(jax.tree.map(lambda p, g: p + sign * step * g, variables, gradient))[0]

    squared = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient))
    np.testing.assert_allclose((moved(1) - moved(-1)) / (2 * step), squared, rtol=0.02)
    assert moved(-1) < before


def test_contrastive_loss_of_reports_without_partners():
    key = normalize(jnp.asarray(np.random.default_rng(0).normal(size=(R, O)), jnp.float32))
    run = jax.jit(jax.value_and_grad(contrastive_loss))
    for is_valid in (jnp.ones(R, bool), jnp.zeros(R, bool)):
        loss, gradient = run(key, jnp.arange(R), is_valid)
        assert loss == 0
        np.testing.assert_array_equal(gradient, 0.0)
