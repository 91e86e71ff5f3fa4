"""The constellation: a supervisor, a bank of experts, and the way between them and back."""

import functools
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.experts import ExpertBank, ExpertOutput, Rows
from moe_jax.ops.grouped import is_row
from moe_jax.reports import (
    DraftReports,
    batch_reports,
    choice_reports,
    in_sequences,
    sequence_reports,
)
from moe_jax.routing import (
    Choices,
    RoutingPlan,
    RowIndex,
    combine,
    combine_rows,
    dispatch,
    dispatch_index,
    dispatch_rows,
    expert_capacity,
    gather_choices,
    make_plan,
    row_index,
)
from moe_jax.supervisor import Supervisor


class ConstellationOutput(NamedTuple):
    """What a constellation gives.

    Attributes:
        output: [B, S, O], in the experts' compute dtype.
        confidence: [B, S] float32, the chosen experts' confidence, weighted as their outputs.
        logits: [B, S, E] float32 router logits.
        plan: who went where.
        reports: the draft reports, cut off from gradients; None when `report_scope` is "none".
    """

    output: Float[Array, "B S O"]
    confidence: Float[Array, "B S"]
    logits: Float[Array, "B S E"]
    plan: RoutingPlan
    reports: DraftReports | None


class Constellation(nn.Module):
    """Sends each token to its K experts, and only to those, and sums what they return.

    Attributes:
        supervisor: chooses experts.
        bank: the experts.
        dispatch: "capacity", each expert has slots and what finds none is dropped; "dropless",
            every choice has a row of its own, and the experts must take rows.
        capacity_factor: slots in training; see `moe_jax.routing.expert_capacity`.
        eval_capacity_factor: slots outside training.
        context: "routed", an expert sees the tokens sent to it; "sequence", it sees the whole
            sequence and is used where it was chosen (the original's semantics and cost).
        group: what shares an expert's slots: a "sequence" or the whole "batch".
        priority: who gets slots first: "position", "choice" or "probability".
        report_scope: "sequence", "batch" or "none".
        num_positions: most confident positions named in a report.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax.experts import MLPExpert
        >>> constellation = Constellation(
        ...     Supervisor(num_experts=4, top_k=2, num_heads=2), ExpertBank(MLPExpert(16, 8), 4)
        ... )
        >>> init = jax.jit(constellation.init_with_output)
        >>> out, _ = init(jax.random.key(0), jnp.ones((2, 16, 8)))
        >>> out.output.shape, out.reports.summary.shape
        ((2, 16, 8), (8, 8))
    """

    supervisor: Supervisor
    bank: ExpertBank
    dispatch: Literal["capacity", "dropless"] = "capacity"
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 1.25
    context: Literal["routed", "sequence"] = "routed"
    group: Literal["sequence", "batch"] = "sequence"
    priority: Literal["position", "choice", "probability"] = "choice"
    report_scope: Literal["sequence", "batch", "none"] = "sequence"
    num_positions: int = 4

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        *,
        is_valid: Bool[Array, "B S"] | None = None,
        source: Int[Array, "B 2"] | None = None,
        is_training: bool = False,
    ) -> ConstellationOutput:
        """Routes, computes, combines and reports.

        Args:
            x: [B, S, D] tokens.
            is_valid: [B, S], False for padding, which takes no slot and outputs zero.
            source: [B, 2] int32 document id and offset of each sequence's first token.
            is_training: selects the capacity factor and turns on dropout and router noise.

        Returns:
            Outputs, plan and reports.

        Raises:
            ValueError: an attribute is not one of its values, or supervisor and bank differ in E.
        """
        self._check()
        if is_valid is not None:
            x = jnp.where(is_valid[..., None], x, 0)
        embeddings = self.param(
            "expert_embeddings",
            nn.initializers.normal(1.0),
            (self.supervisor.num_experts, x.shape[-1]),
        )
        logits, choices = self.supervisor(x, embeddings, is_training)
        run = self._dropless if self.dispatch == "dropless" else self._with_capacity
        output, confidence, plan, reports = run(x, choices, is_valid, source, is_training)
        return ConstellationOutput(
            output=output, confidence=confidence, logits=logits, plan=plan, reports=reports
        )

    def _check(self) -> None:
        for name, allowed in (
            ("dispatch", ("capacity", "dropless")),
            ("context", ("routed", "sequence")),
            ("group", ("sequence", "batch")),
            ("report_scope", ("sequence", "batch", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if self.supervisor.num_experts != self.bank.num_experts:
            raise ValueError(
                f"supervisor and bank must have the same num_experts, got "
                f"{self.supervisor.num_experts} and {self.bank.num_experts}"
            )

    def _dropless(self, x, choices, is_valid, source, is_training):
        """Each choice is computed in a row of its own, next to its expert's others."""
        batch, length, num_choices = choices.expert.shape
        tokens = batch * length
        index = row_index(
            choices.expert.reshape(tokens, num_choices),
            self.bank.num_experts,
            None if is_valid is None else is_valid.reshape(tokens),
        )
        rows = dispatch_rows(x.reshape(tokens, -1), index)
        whose = Rows(index.groups, sequence=index.token_of_row // length)
        position = index.token_of_row % length
        expert = self.bank(rows, is_row(index.groups), position, is_training, rows=whose)
        weight = choices.weight.reshape(tokens, num_choices)
        output = combine_rows(expert.output, weight, index)
        confidence = combine_rows(expert.confidence[:, None], weight, index)
        plan = _plan(choices, index)
        reports = self._report_choices(expert, plan, index.row_of_choice, source)
        shape = (batch, length)
        return output.reshape(*shape, -1), confidence.reshape(shape), plan, reports

    def _report_choices(
        self,
        expert: ExpertOutput,
        plan: RoutingPlan,
        row: Int[Array, "T K"],
        source: Int[Array, "B 2"] | None,
    ) -> DraftReports | None:
        if self.report_scope == "none":
            return None
        # A row out of range is read as zero, and its choice is not kept.
        row = row.reshape(plan.expert.shape)
        said = jax.tree.map(
            lambda a: jax.lax.stop_gradient(a).at[row].get(mode="fill", fill_value=0), expert
        )
        return choice_reports(
            said,
            plan.expert,
            plan.is_kept,
            num_experts=self.bank.num_experts,
            scope=self.report_scope,
            num_positions=self.num_positions,
            source=source,
        )

    def _with_capacity(self, x, choices, is_valid, source, is_training):
        """Each choice that finds a slot is computed there."""
        batch, length, num_choices = choices.expert.shape
        group_size = length if self.group == "sequence" else batch * length
        factor = self.capacity_factor if is_training else self.eval_capacity_factor
        capacity = expert_capacity(group_size, self.bank.num_experts, num_choices, factor)
        if self.context == "sequence":
            # Every expert sees every token, so there are no slots to run out of.
            capacity = length
        pooled = (-1, group_size)
        plan = make_plan(
            jax.tree.map(lambda a: a.reshape(*pooled, num_choices), choices),
            num_experts=self.bank.num_experts,
            capacity=capacity,
            priority=self.priority,
            is_valid=None if is_valid is None else is_valid.reshape(pooled),
        )
        grouped = x.reshape(*pooled, x.shape[-1])
        run = self._routed if self.context == "routed" else self._whole_sequence
        output, confidence, expert, takes_part, position = run(
            grouped, plan, capacity, is_valid, is_training
        )
        reports = self._report(expert, takes_part, position, batch, length, source)
        plan = jax.tree.map(lambda a: a.reshape(batch, length, num_choices), plan)
        shape = (batch, length)
        return output.reshape(*shape, -1), confidence.reshape(shape), plan, reports

    def _routed(self, x, plan, capacity, is_valid, is_training):
        """Each expert computes only the tokens sent to it."""
        del is_valid  # The plan already leaves padding out.
        index = dispatch_index(plan, self.bank.num_experts, capacity)
        inputs = dispatch(x, index)
        expert = self.bank(inputs.x, inputs.is_valid, inputs.position, is_training)
        output = combine(expert.output, plan.weight, index)
        confidence = combine(expert.confidence[..., None], plan.weight, index)[..., 0]
        return output, confidence, expert, inputs.is_valid, inputs.position

    def _whole_sequence(self, x, plan, capacity, is_valid, is_training):
        """Each expert computes the whole sequence; its outputs are used where it was chosen."""
        del capacity
        shape = (self.bank.num_experts, *x.shape[:2])
        if is_valid is None:
            is_valid = jnp.ones(x.shape[:2], bool)
        is_valid = jnp.broadcast_to(is_valid[None], shape)
        position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, None], shape)
        everywhere = jnp.broadcast_to(x[None], (shape[0], *x.shape))
        expert = self.bank(everywhere, is_valid, position, is_training)
        weight = jnp.where(plan.is_kept, plan.weight, 0.0)
        chosen = gather_choices(expert.output, plan.expert)
        output = jnp.einsum("bsk,bsko->bso", weight, chosen, preferred_element_type=jnp.float32)
        sure = gather_choices(expert.confidence[..., None], plan.expert)[..., 0]
        confidence = jnp.einsum("bsk,bsk->bs", weight, sure)
        is_asked = jax.nn.one_hot(plan.expert, shape[0], dtype=bool) & plan.is_kept[..., None]
        is_asked = jnp.moveaxis(jnp.any(is_asked, axis=(1, 2)), 1, 0)
        if self.report_scope == "batch":
            # The original reports once over all sequences as soon as one token asked.
            is_asked = jnp.any(is_asked, axis=1, keepdims=True)
        takes_part = is_valid & is_asked[..., None]
        return output.astype(expert.output.dtype), confidence, expert, takes_part, position

    def _report(
        self,
        expert: ExpertOutput,
        takes_part: Bool[Array, "E G C"],
        position: Int[Array, "E G C"],
        batch: int,
        length: int,
        source: Int[Array, "B 2"] | None,
    ) -> DraftReports | None:
        if self.report_scope == "none":
            return None
        expert = jax.lax.stop_gradient(expert)
        make = sequence_reports if self.report_scope == "sequence" else batch_reports
        make = functools.partial(make, expert, takes_part, position)
        if self.group == "batch":
            reports = make(length=batch * length, num_positions=self.num_positions)
            return in_sequences(reports, batch, length, source)
        return make(length=length, num_positions=self.num_positions, source=source)


def _plan(choices: Choices, index: RowIndex) -> RoutingPlan:
    """The plan that drops nothing; a slot is a place among all rows of the expert."""
    row = index.row_of_choice.reshape(choices.expert.shape)
    has_row = row < index.groups.num_rows
    slot = jnp.where(has_row, row - index.groups.start[choices.expert], 0)
    return RoutingPlan(choices.expert, choices.weight, slot=slot, is_kept=has_row)
