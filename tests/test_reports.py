"""Draft reports against a loop over experts, sequences and tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts import ExpertOutput
from moe_jax.reports import batch_reports, sequence_reports

E, B, C, S, P, O = 3, 2, 8, 12, 3, 4  # noqa: E741
SOURCE = np.array([[7, 100], [-1, -1]], np.int32)


def case(seed, by_slot=True):
    """Outputs, confidences, validity and positions; one expert is unused, one has one token."""
    rng = np.random.default_rng(seed)
    width = C if by_slot else S
    output = rng.normal(size=(E, B, width, O)).astype(np.float32)
    confidence = rng.choice([0.2, 0.5, 0.7, 0.9], size=(E, B, width)).astype(np.float32)
    is_valid = rng.random((E, B, width)) < 0.6
    is_valid[0, 0], is_valid[2] = False, False
    is_valid[1, 1] = np.arange(width) == 3
    if by_slot:
        position = np.stack([np.sort(rng.permutation(S)[:C]) for _ in range(E * B)])
        position = np.where(is_valid, position.reshape(E, B, C), S)
    else:
        position = np.broadcast_to(np.arange(S), (E, B, S))
    return output, confidence, is_valid, position.astype(np.int32)


def run(make, output, confidence, is_valid, position, source=SOURCE):
    return fast[make](output, confidence, is_valid, position, source)


def jitted(make):
    def call(output, confidence, is_valid, position, source):
        expert = ExpertOutput(output, confidence)
        return make(expert, is_valid, position, length=S, num_positions=P, source=source)

    return jax.jit(call)


fast = {make: jitted(make) for make in (sequence_reports, batch_reports)}


def expected_sequence_reports(output, confidence, is_valid, position):
    for b in range(B):
        for e in range(E):
            slots = [c for c in range(output.shape[2]) if is_valid[e, b, c]]
            total = sum(float(confidence[e, b, c]) for c in slots)
            summary = sum(float(confidence[e, b, c]) * output[e, b, c] for c in slots)
            # Ties go to the earlier slot.
            best = sorted(slots, key=lambda c: (-confidence[e, b, c], c))[:P]
            positions = [int(position[e, b, c]) for c in best]
            yield {
                "summary": summary / total if slots else np.zeros(O),
                "confidence": total / len(slots) if slots else 0.0,
                "expert_id": e,
                "sequence": b,
                "positions": positions + [S] * (P - len(positions)),
                "is_valid": bool(slots),
            }


def assert_equals(reports, expected):
    for r, report in enumerate(expected):
        for name, value in report.items():
            np.testing.assert_allclose(
                np.asarray(getattr(reports, name))[r], value, rtol=1e-5, atol=1e-6, err_msg=name
            )


@pytest.mark.parametrize("seed", range(4))
def test_sequence_reports_equal_a_loop(seed):
    arrays = case(seed)
    reports = run(sequence_reports, *arrays)
    expected = list(expected_sequence_reports(*arrays))
    assert reports.summary.shape == (len(expected), O)
    assert_equals(reports, expected)
    np.testing.assert_array_equal(
        reports.is_valid.reshape(B, E), [[False, True, False], [True, True, False]]
    )


def test_sources_point_at_the_most_confident_token():
    arrays = case(0)
    reports = run(sequence_reports, *arrays)
    for r in range(E * B):
        document, offset = SOURCE[r // E]
        if document < 0:
            expected = [-1, -1]
        elif reports.is_valid[r]:
            expected = [document, offset + int(reports.positions[r, 0])]
        else:
            expected = [document, offset]
        np.testing.assert_array_equal(reports.source[r], expected)
    unknown = run(sequence_reports, *arrays, None)
    np.testing.assert_array_equal(unknown.source, -1)


@pytest.mark.parametrize("seed", range(4))
def test_batch_reports_equal_a_loop(seed):
    arrays = case(seed, by_slot=seed % 2 == 0)
    confidence, is_valid, position = arrays[1:]
    reports = run(batch_reports, *arrays)
    each = list(expected_sequence_reports(*arrays))
    for e in range(E):
        mine = [r for r in each if r["expert_id"] == e and r["is_valid"]]
        by_position = {}
        for b, c in zip(*np.nonzero(is_valid[e]), strict=True):
            by_position.setdefault(int(position[e, b, c]), []).append(float(confidence[e, b, c]))
        means = {p: np.mean(values) for p, values in by_position.items()}
        best = sorted(means, key=lambda p: (-round(means[p], 5), p))[:P]
        assert bool(reports.is_valid[e]) == bool(mine)
        assert int(reports.expert_id[e]) == e
        np.testing.assert_array_equal(reports.positions[e], best + [S] * (P - len(best)))
        if not mine:
            np.testing.assert_array_equal(reports.summary[e], 0.0)
            continue
        np.testing.assert_allclose(
            reports.summary[e], np.mean([r["summary"] for r in mine], axis=0), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            reports.confidence[e], confidence[e][is_valid[e]].mean(), rtol=1e-5
        )
        at_best = {
            b: confidence[e, b][is_valid[e, b] & (position[e, b] == best[0])] for b in range(B)
        }
        surest = max(range(B), key=lambda b: (max(at_best[b], default=-1.0), -b))
        assert int(reports.sequence[e]) == surest
        document, offset = SOURCE[surest]
        source = [document, offset + best[0]] if document >= 0 else [-1, -1]
        np.testing.assert_array_equal(reports.source[e], source)


@pytest.mark.parametrize("make", [sequence_reports, batch_reports])
def test_empty_slots_may_hold_anything(make):
    output, confidence, is_valid, position = case(5)
    clean = run(make, output, confidence, is_valid, position)
    output = np.where(is_valid[..., None], output, np.nan)
    confidence = np.where(is_valid, confidence, np.nan)
    jax.tree.map(
        np.testing.assert_array_equal, run(make, output, confidence, is_valid, position), clean
    )


@pytest.mark.parametrize("make", [sequence_reports, batch_reports])
def test_more_positions_than_tokens(make):
    output, confidence, is_valid, position = (jnp.asarray(a[:, :, :2]) for a in case(0))
    reports = make(
        ExpertOutput(output, confidence), is_valid, position, length=S, num_positions=S + 3
    )
    positions = np.asarray(reports.positions)
    assert positions.shape[1] == S + 3
    found = [sorted(row[row < S]) for row in positions]
    if make is sequence_reports:
        wanted = [sorted(np.asarray(position[e, b])[is_valid[e, b]])
                  for b in range(B) for e in range(E)]  # fmt: skip
    else:
        wanted = [sorted(set(np.asarray(position[e])[is_valid[e]])) for e in range(E)]
    assert found == wanted
