"""What a call of the system gives."""

from typing import NamedTuple

from moe_jax._types import Array, Float
from moe_jax.librarian import Proposals
from moe_jax.memory import Reads
from moe_jax.reports import DraftReports
from moe_jax.routing import RoutingPlan, RoutingStats


class MoELosses(NamedTuple):
    """Auxiliary losses, unweighted, and their weighted sum.

    Attributes:
        load_balance: of the configured kind.
        router_z: router z-loss.
        contrastive: the librarian's; 0 when its weight is 0.
        total: the sum, weighted as configured: add it to the task's loss.
    """

    load_balance: Float[Array, ""]
    router_z: Float[Array, ""]
    contrastive: Float[Array, ""]
    total: Float[Array, ""]


class MoEOutput(NamedTuple):
    """What one call of a `MoESystem` gives.

    Attributes:
        output: [B, S, O].
        confidence: [B, S] float32, how sure each token's experts are.
        plan: who went where.
        reports: draft reports; None when `report_scope` is "none".
        proposals: what the librarian would store; None likewise.
        losses: auxiliary losses.
        stats: balance and drops.
        reads: the nodes that each token read, [B, S, K]; None without `memory_read`. What writes
            the graph first counts them with `moe_jax.memory.note_reads`.
    """

    output: Float[Array, "B S O"]
    confidence: Float[Array, "B S"]
    plan: RoutingPlan
    reports: DraftReports | None
    proposals: Proposals | None
    losses: MoELosses
    stats: RoutingStats
    reads: Reads | None = None
