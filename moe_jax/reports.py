"""Draft reports: what each expert has to say about a sequence, as fixed-shape masked arrays."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.experts import ExpertOutput


class DraftReports(NamedTuple):
    """R summaries; R is fixed by the shapes and `is_valid` says which of them exist.

    Per (sequence, expert) R = B * E, laid out row-major as (b, e); per (batch, expert) R = E.

    Attributes:
        summary: [R, O] float32, the confidence-weighted mean of the expert's outputs.
        confidence: [R] float32, mean confidence over the same tokens.
        expert_id: [R] int32.
        sequence: [R] int32, row of the batch; of the most confident one in a report per batch.
        positions: [R, P] int32, the most confident tokens' positions, best first; S beyond the
            expert's last token.
        source: [R, 2] int32, document and offset of the most confident token; -1 if unknown.
        is_valid: [R] bool, False where the expert got no token.
    """

    summary: Float[Array, "R O"]
    confidence: Float[Array, "R"]
    expert_id: Int[Array, "R"]
    sequence: Int[Array, "R"]
    positions: Int[Array, "R P"]
    source: Int[Array, "R 2"]
    is_valid: Bool[Array, "R"]


def sequence_reports(
    expert: ExpertOutput,
    is_valid: Bool[Array, "E B C"],
    position: Int[Array, "E B C"],
    *,
    length: int,
    num_positions: int,
    source: Int[Array, "B 2"] | None = None,
) -> DraftReports:
    """One report per (sequence, expert).

    Args:
        expert: outputs [E, B, C, O] and confidences [E, B, C].
        is_valid: which tokens are the expert's.
        position: of each token in its sequence.
        length: S, which stands for "no position".
        num_positions: P.
        source: [B, 2] document id and offset of each sequence's first token.

    Returns:
        E * B reports, laid out as (b, e).

    Example:
        >>> import jax.numpy as jnp
        >>> out = ExpertOutput(output=jnp.ones((2, 1, 8, 4)), confidence=jnp.ones((2, 1, 8)))
        >>> valid = jnp.ones((2, 1, 8), bool)
        >>> position = jnp.broadcast_to(jnp.arange(8), (2, 1, 8))
        >>> sequence_reports(out, valid, position, length=8, num_positions=2).positions
        Array([[0, 1],
               [0, 1]], dtype=int32)
    """
    said = _said(expert, is_valid, position)
    return _sequence_reports(said, length, num_positions, source)


def batch_reports(
    expert: ExpertOutput,
    is_valid: Bool[Array, "E B C"],
    position: Int[Array, "E B C"],
    *,
    length: int,
    num_positions: int,
    source: Int[Array, "B 2"] | None = None,
) -> DraftReports:
    """One report per expert over the whole batch: the mean of its sequences' reports.

    The original's: confidence is averaged over all tokens; positions are those whose confidence,
    averaged over the sequences in which the expert has them, is largest.

    Args:
        expert: outputs [E, B, C, O] and confidences [E, B, C].
        is_valid: which tokens are the expert's.
        position: of each token in its sequence.
        length: S.
        num_positions: P.
        source: [B, 2] document id and offset of each sequence's first token.

    Returns:
        E reports.

    Example:
        >>> import jax.numpy as jnp
        >>> out = ExpertOutput(output=jnp.ones((2, 1, 8, 4)), confidence=jnp.ones((2, 1, 8)))
        >>> valid = jnp.ones((2, 1, 8), bool)
        >>> position = jnp.broadcast_to(jnp.arange(8), (2, 1, 8))
        >>> batch_reports(out, valid, position, length=8, num_positions=2).expert_id
        Array([0, 1], dtype=int32)
    """
    return _batch_reports(_said(expert, is_valid, position), length, num_positions, source)


def choice_reports(
    expert: ExpertOutput,
    choice: Int[Array, "B S K"],
    is_kept: Bool[Array, "B S K"],
    *,
    num_experts: int,
    scope: Literal["sequence", "batch"],
    num_positions: int,
    source: Int[Array, "B 2"] | None = None,
) -> DraftReports:
    """The same reports from what each choice gave, where experts have no buffers.

    Args:
        expert: outputs [B, S, K, O] and confidences [B, S, K].
        choice: the expert ids.
        is_kept: False for choices that were not computed.
        num_experts: E.
        scope: one report per ("sequence", expert) or per ("batch", expert).
        num_positions: P.
        source: [B, 2] document id and offset of each sequence's first token.

    Returns:
        B * E or E reports, as `sequence_reports` and `batch_reports` give them.

    Example:
        >>> import jax.numpy as jnp
        >>> out = ExpertOutput(output=jnp.ones((1, 8, 1, 4)), confidence=jnp.ones((1, 8, 1)))
        >>> choice, kept = jnp.zeros((1, 8, 1), int), jnp.ones((1, 8, 1), bool)
        >>> how = {"num_experts": 2, "scope": "sequence", "num_positions": 2}
        >>> choice_reports(out, choice, kept, **how).is_valid
        Array([ True, False], dtype=bool)
    """
    length = choice.shape[1]
    is_of = (choice[None] == _iota(num_experts)[:, None, None, None]) & is_kept[None]
    sure = jnp.where(is_of, expert.confidence[None], 0.0).astype(jnp.float32)
    # What was not kept may hold NaN, and zero times NaN is NaN.
    outputs = jnp.where(is_kept[..., None], expert.output, 0)
    summary = jnp.einsum("ebsk,bsko->ebo", sure, outputs, preferred_element_type=jnp.float32)
    is_valid = jnp.any(is_of, axis=-1)
    said = _Said(
        summary=_over(summary, jnp.sum(sure, axis=(2, 3))),
        # A token chooses an expert at most once.
        confidence=jnp.sum(sure, axis=-1),
        is_valid=is_valid,
        position=jnp.broadcast_to(_iota(length)[None, None], is_valid.shape),
    )
    make = _sequence_reports if scope == "sequence" else _batch_reports
    return make(said, length, num_positions, source)


def in_sequences(
    reports: DraftReports, batch: int, length: int, source: Int[Array, "B 2"] | None
) -> DraftReports:
    """Reports on all sequences end to end, told in terms of each.

    Args:
        reports: whose positions count through B * S tokens.
        batch: B.
        length: S.
        source: [B, 2] document id and offset of each sequence's first token.

    Returns:
        The reports with positions in their sequences, that of the most confident token, and its
        source.

    Example:
        >>> import jax.numpy as jnp
        >>> out = ExpertOutput(output=jnp.ones((1, 1, 8, 4)), confidence=jnp.ones((1, 1, 8)))
        >>> place = jnp.arange(8)[None, None] + 8
        >>> whole = batch_reports(out, place > 11, place, length=16, num_positions=2)
        >>> told = in_sequences(whole, 2, 8, None)
        >>> told.sequence.tolist(), told.positions.tolist()
        ([1], [[4, 5]])
    """
    is_there = reports.positions < batch * length
    sequence = jnp.where(is_there[:, 0], reports.positions[:, 0] // length, 0)
    positions = jnp.where(is_there, reports.positions % length, length)
    return reports._replace(
        sequence=sequence,
        positions=positions,
        source=_sources(source, sequence, positions[:, 0], length),
    )


class _Said(NamedTuple):
    """What each expert said of each sequence: the mean of its outputs, and how sure it was."""

    summary: Float[Array, "E B O"]
    confidence: Float[Array, "E B C"]
    is_valid: Bool[Array, "E B C"]
    position: Int[Array, "E B C"]

    def masked(self, otherwise: float) -> Float[Array, "E B C"]:
        """The confidences of the expert's tokens, and another number elsewhere."""
        return jnp.where(self.is_valid, self.confidence, otherwise)


def _said(
    expert: ExpertOutput, is_valid: Bool[Array, "E B C"], position: Int[Array, "E B C"]
) -> _Said:
    sure = jnp.where(is_valid, expert.confidence, 0.0).astype(jnp.float32)
    # An empty slot may hold NaN, and zero times NaN is NaN: mask the outputs as well.
    outputs = jnp.where(is_valid[..., None], expert.output, 0)
    summary = jnp.einsum("ebc,ebco->ebo", sure, outputs, preferred_element_type=jnp.float32)
    summary = _over(summary, jnp.sum(sure, axis=-1))
    return _Said(summary, expert.confidence, is_valid, position)


def _over(sums: Float[Array, "E B O"], total: Float[Array, "E B"]) -> Float[Array, "E B O"]:
    return sums / jnp.where(total > 0, total, 1.0)[..., None]


def _mean_confidence(said: _Said) -> tuple[Float[Array, "E B"], Bool[Array, "E B"]]:
    """Mean confidence, and whether there was any token."""
    total = jnp.sum(said.masked(0.0).astype(jnp.float32), axis=-1)
    count = jnp.sum(said.is_valid, axis=-1)
    return total / jnp.maximum(count, 1), count > 0


def _sequence_reports(
    said: _Said, length: int, num_positions: int, source: Int[Array, "B 2"] | None
) -> DraftReports:
    num_experts, batch = said.is_valid.shape[:2]
    confidence, exists = _mean_confidence(said)
    best = _best_positions(said.masked(-1.0), said.position, length, num_positions)
    sequence = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[None], (num_experts, batch))
    reports = DraftReports(
        summary=said.summary,
        confidence=confidence,
        expert_id=jnp.broadcast_to(_iota(num_experts)[:, None], (num_experts, batch)),
        sequence=sequence,
        positions=best,
        source=_sources(source, sequence, best[..., 0], length),
        is_valid=exists,
    )
    return jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), reports)


def _batch_reports(
    said: _Said, length: int, num_positions: int, source: Int[Array, "B 2"] | None
) -> DraftReports:
    num_experts = said.is_valid.shape[0]
    is_valid, position = said.is_valid, said.position
    _, exists = _mean_confidence(said)
    share = exists / jnp.maximum(jnp.sum(exists, axis=1, keepdims=True), 1)
    sure = said.masked(0.0)
    count = jnp.sum(is_valid, axis=(1, 2))

    # A row for each sequence, which has a position once: scatters of floats that meet in one place
    # add in no fixed order on GPUs.
    where, rows = jnp.where(is_valid, position, length), jnp.zeros(length)
    put = jax.vmap(jax.vmap(lambda at, c: rows.at[at].set(c, mode="drop")))
    sum_at = jnp.sum(put(where, sure), axis=1)
    count_at = jnp.sum(put(where, jnp.ones_like(sure)), axis=1)
    mean_at = jnp.where(count_at > 0, sum_at / jnp.maximum(count_at, 1.0), -1.0)
    everywhere = jnp.broadcast_to(_iota(length)[None], mean_at.shape)
    best = _best_positions(mean_at, everywhere, length, num_positions)

    at_best = is_valid & (position == best[:, :1, None])
    sure_there = jnp.max(jnp.where(at_best, said.confidence, -1.0), axis=2)
    sequence = jnp.argmax(sure_there, axis=1).astype(jnp.int32)
    return DraftReports(
        summary=jnp.einsum("ebo,eb->eo", said.summary, share),
        confidence=jnp.sum(sure, axis=(1, 2)) / jnp.maximum(count, 1),
        expert_id=_iota(num_experts),
        sequence=sequence,
        positions=best,
        source=_sources(source, sequence, best[:, 0], length),
        is_valid=count > 0,
    )


def _best_positions(
    score: Float[Array, "*B C"], position: Int[Array, "*B C"], length: int, num_positions: int
) -> Int[Array, "*B P"]:
    """Positions of the highest scores; a negative score marks no token."""
    found = min(num_positions, score.shape[-1])
    best, at = jax.lax.top_k(score, found)
    chosen = jnp.where(best >= 0, jnp.take_along_axis(position, at, axis=-1), length)
    pad = [(0, 0)] * (score.ndim - 1) + [(0, num_positions - found)]
    return jnp.pad(chosen, pad, constant_values=length).astype(jnp.int32)


def _sources(
    source: Int[Array, "B 2"] | None,
    sequence: Int[Array, "*R"],
    position: Int[Array, "*R"],
    length: int,
) -> Int[Array, "*R 2"]:
    if source is None:
        return jnp.full((*sequence.shape, 2), -1, jnp.int32)
    start = source[sequence].astype(jnp.int32)
    shift = jnp.where(position < length, position, 0)
    known = start[..., 0] >= 0
    return jnp.stack([start[..., 0], jnp.where(known, start[..., 1] + shift, -1)], axis=-1)


def _iota(size: int) -> Int[Array, "I"]:
    return jnp.arange(size, dtype=jnp.int32)
