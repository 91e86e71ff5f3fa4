"""The librarian: encodes draft reports, finds repetitions among them, and proposes the rest."""

import math
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.experts import LayerNorm
from moe_jax.ops import exact_cosine, first_independent, normalize
from moe_jax.reports import DraftReports

_TEMPERATURE = 0.1


class Proposals(NamedTuple):
    """Reports as the librarian would store them; row r stands for report r.

    Attributes:
        key: [R, O] float32, unit norm; zero where the report does not exist.
        value: [R, O] float32, the report's summary.
        confidence: [R] float32.
        expert_id: [R] int32.
        source: [R, 2] int32.
        weight: [R] int32, how many reports a kept one stands for; 0 elsewhere.
        leader: [R] int32, the kept report that stands for this one; R where there is none.
        is_kept: [R] bool, the report exists and repeats no other.
    """

    key: Float[Array, "R O"]
    value: Float[Array, "R O"]
    confidence: Float[Array, "R"]
    expert_id: Int[Array, "R"]
    source: Int[Array, "R 2"]
    weight: Int[Array, "R"]
    leader: Int[Array, "R"]
    is_kept: Bool[Array, "R"]


class Librarian(nn.Module):
    """Encodes summaries and proposes those that say something new.

    The encoder is Linear -> LayerNorm -> GELU -> Linear. With `residual` it is added to the
    summary and its last layer starts at zero, so that similarity means something before any
    training; without, it is the original's.

    Attributes:
        threshold: cosine above which a report repeats another.
        rule: "leader" or "any_earlier"; see `deduplicate`.
        residual: see above.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax.reports import DraftReports
        >>> reports = DraftReports(
        ...     summary=jnp.array([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]),
        ...     confidence=jnp.array([0.5, 0.9, 0.1]), expert_id=jnp.arange(3),
        ...     sequence=jnp.zeros(3, int), positions=jnp.zeros((3, 1), int),
        ...     source=jnp.zeros((3, 2), int), is_valid=jnp.ones(3, bool),
        ... )
        >>> proposals, _ = jax.jit(Librarian().init_with_output)(jax.random.key(0), reports)
        >>> proposals.is_kept
        Array([False,  True,  True], dtype=bool)
    """

    threshold: float = 0.85
    rule: Literal["leader", "any_earlier"] = "leader"
    residual: bool = True

    @nn.compact
    def __call__(self, reports: DraftReports) -> Proposals:
        """Proposes what to store.

        Args:
            reports: R draft reports.

        Returns:
            R proposals; the graph itself is not touched.
        """
        key = normalize(jnp.where(reports.is_valid[:, None], self.encode(reports.summary), 0.0))
        leader = deduplicate(
            key, reports.confidence, reports.is_valid, threshold=self.threshold, rule=self.rule
        )
        rows = leader.shape[0]
        is_kept = leader == jnp.arange(rows)
        return Proposals(
            key=key,
            value=reports.summary,
            confidence=reports.confidence,
            expert_id=reports.expert_id,
            source=reports.source,
            weight=jnp.zeros(rows, jnp.int32).at[leader].add(1, mode="drop"),
            leader=leader,
            is_kept=is_kept,
        )

    @nn.compact
    def encode(self, summary: Float[Array, "R O"]) -> Float[Array, "R O"]:
        """Encodes summaries into the space of the graph's keys, not yet normalised."""
        width = summary.shape[-1]
        last_init = nn.initializers.zeros if self.residual else nn.initializers.lecun_normal()
        hidden = nn.Dense(width, name="encoder_hidden")(summary)
        hidden = nn.gelu(LayerNorm(name="encoder_norm")(hidden), approximate=False)
        encoded = nn.Dense(width, kernel_init=last_init, name="encoder_out")(hidden)
        return summary + encoded if self.residual else encoded


def deduplicate(
    key: Float[Array, "R O"],
    confidence: Float[Array, "R"],
    is_valid: Bool[Array, "R"],
    *,
    threshold: float = 0.85,
    rule: Literal["leader", "any_earlier"] = "leader",
) -> Int[Array, "R"]:
    """Finds, for every report, the report that stands for it.

    "leader": in falling order of confidence (ties to the lower row), a report repeats another
    when its cosine to an earlier kept one exceeds the threshold; the most similar such one leads
    it. "any_earlier", the original's: in row order, a report is dropped when its cosine to any
    earlier one, kept or not, exceeds the threshold.

    Args:
        key: [R, O] unit vectors, from `moe_jax.ops.normalize`.
        confidence: [R].
        is_valid: [R].
        threshold: cosine that a repetition exceeds.
        rule: see above.

    Returns:
        [R] int32: r itself where report r is kept, R where it does not exist.

    Raises:
        ValueError: an unknown rule.

    Example:
        >>> import jax.numpy as jnp
        >>> key = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> deduplicate(key, jnp.array([0.1, 0.2, 0.3]), jnp.ones(3, bool))
        Array([1, 1, 2], dtype=int32)
    """
    rows = key.shape[0]
    if rule not in ("leader", "any_earlier"):
        raise ValueError(f'rule must be "leader" or "any_earlier", got {rule!r}')
    by_rank = jnp.arange(rows)
    if rule == "leader":
        by_rank = jnp.argsort(jnp.where(is_valid, -confidence, jnp.inf), stable=True)
    similarity = exact_cosine(key[by_rank], key[by_rank])
    exists = is_valid[by_rank]
    is_earlier = jnp.tri(rows, k=-1, dtype=bool) & exists[:, None] & exists[None, :]
    repeats = is_earlier & (similarity > threshold)
    if rule == "leader":
        is_kept = first_independent(repeats, exists)
        closest = jnp.argmax(jnp.where(repeats & is_kept[None, :], similarity, -jnp.inf), axis=1)
        leader = jnp.where(is_kept, jnp.arange(rows), closest)
    else:
        first = jnp.argmax(repeats, axis=1)
        leader = jnp.where(jnp.any(repeats, axis=1), first, jnp.arange(rows))
        # A dropped report may repeat another dropped one: pointer jumping finds the kept one.
        for _ in range(math.ceil(math.log2(max(rows, 2)))):
            leader = leader[leader]
    by_row = jnp.where(exists, by_rank[leader], rows).astype(jnp.int32)
    return jnp.zeros(rows, jnp.int32).at[by_rank].set(by_row)


def contrastive_loss(
    key: Float[Array, "R O"], sequence: Int[Array, "R"], is_valid: Bool[Array, "R"]
) -> Float[Array, ""]:
    """Pulls reports of one sequence together and others apart.

    Supervised contrastive loss (Khosla et al. 2020, equation 2) with the sequence as the label
    and temperature 0.1.

    Args:
        key: [R, O] unit vectors.
        sequence: [R], row of the batch that a report speaks of.
        is_valid: [R].

    Returns:
        A scalar; 0 where no report has a partner.

    Example:
        >>> import jax.numpy as jnp
        >>> float(contrastive_loss(jnp.eye(2), jnp.arange(2), jnp.ones(2, bool)))
        0.0
    """
    rows = key.shape[0]
    logits = key @ key.T / _TEMPERATURE
    is_other = is_valid[None, :] & is_valid[:, None] & ~jnp.eye(rows, dtype=bool)
    # A finite mask: with minus infinity the gradient of a row without others would be NaN.
    masked = jnp.where(is_other, logits, -1e9)
    log_share = masked - jax.nn.logsumexp(masked, axis=1, keepdims=True)
    is_partner = is_other & (sequence[:, None] == sequence[None, :])
    count = jnp.sum(is_partner, axis=1)
    per_row = -jnp.sum(jnp.where(is_partner, log_share, 0.0), axis=1) / jnp.maximum(count, 1)
    return jnp.sum(per_row) / jnp.maximum(jnp.sum(count > 0), 1)
