"""The config of a `moe_jax.MoESystem`."""

import dataclasses
from typing import Literal

from moe_jax.config.base import Config, between, divides, not_negative, positive

ExpertKind = Literal["transformer", "specialized", "mlp", "swiglu"]
GatingType = Literal["topk", "noisy_topk", "dense"]
Priority = Literal["auto", "position", "choice", "probability"]
DtypeName = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class MoEConfig(Config):
    """Everything that shapes a `moe_jax.MoESystem`; the defaults are the original system's.

    Attributes:
        input_dim: D, width of the tokens that come in.
        hidden_dim: H, width inside an expert.
        output_dim: O, width of the experts' outputs, and of the graph's keys and values.
        num_experts: E.
        top_k_experts: K, experts that each token is sent to. Their weights sum to one, so that a
            single choice is trained by the routing losses alone.
        expert: kind of expert, a key of `moe_jax.experts.EXPERTS`.
        expert_heads: attention heads of the transformer experts.
        expert_specializations: a name for each expert, for plots and logs; empty or E long.
        num_specialists: sub-specialists inside each expert of kind "specialized".
        expert_context: "routed", an expert sees only the tokens sent to it; or "sequence", every
            expert sees the whole sequence, as the original does, at the original's cost.
        gating_type: router: "topk", "noisy_topk" (Shazeer et al. 2017) or "dense" (K = E).
        num_gating_heads: heads of the supervisor's attention over expert embeddings.
        gating_residual: add the token itself to the attention's result before the gate. False
            is the original, whose router hardly sees the token.
        dispatch: "capacity", every expert has so many slots and what does not fit is dropped; or
            "dropless", every choice is computed, at the cost of what was chosen.
        capacity_factor: a training group has C = ceil(capacity_factor * K * S / E) slots per
            expert, rounded up to a multiple of 8.
        eval_capacity_factor: the same outside training.
        routing_group: what shares the slots: each "sequence", or the whole "batch" (only for
            experts without attention).
        priority: who gets a slot first: by "position", by "choice" (all first choices before
            any second), by router "probability"; "auto" is "position" if `causal`, else "choice".
        causal: no output may depend on a later token.
        load_balance_loss: "switch" (Fedus et al. 2022, eq. 4) or "mse", the original's.
        load_balance_weight: its weight.
        balance_bias_rate: largest step of the bias that balances the choice of experts without a
            loss (Wang et al. 2024); 0 for no bias. The training step moves it.
        router_z_weight: weight of the router z-loss (Zoph et al. 2022, eq. 5).
        dropout: rate, inside the experts.
        report_scope: one draft report per (sequence, expert), per (batch, expert), or none.
        report_positions: how many of its most confident positions a report names.
        dedup_threshold: cosine above which a report repeats another.
        dedup_rule: "leader", compare with kept reports in order of confidence; or
            "any_earlier", with all earlier ones in the given order, as the original does.
        librarian_residual: encode summaries as x + MLP(x) with MLP zero at the start; False is
            the original's plain MLP.
        librarian_contrastive_weight: weight of the encoder's contrastive loss; 0 leaves it out.
        max_kg_nodes: N, node slots of the knowledge graph.
        kg_edge_slots: M, edge slots per node.
        kg_merge_threshold: cosine at or above which an insight merges into a node.
        kg_merge_rule: "leader", keys never move; or "ema", the original's moving mean.
        kg_policy: when the graph is full, "reject" what needs a slot, or evict the "oldest",
            "least_used" or "lowest_confidence" node. Uses are never forgotten, so in a long run
            "least_used" wants a `kg_ttl`, or nodes once used keep new ones out.
        kg_ttl: nodes not updated for more ticks than this are deleted after each write; 0 for
            never. A write is one tick.
        kg_link_top_k: how many similar nodes a written node is linked to.
        kg_link_threshold: least cosine of such a link.
        kg_link_symmetric: link back as well.
        kg_link_stream: link each report to the next one of its document in the same write.
        kg_checkpoint_dir: folder of the graph's rolling checkpoints; None for none.
        kg_save_interval: node updates between two of them.
        kg_checkpoints_kept: how many are kept.
        use_faiss: answer `MoESystem.query` through faiss on the host.
        memory_read: read the graph by gated cross-attention before routing.
        memory_top_k: nodes that each token reads.
        memory_heads: heads of that attention.
        memory_threshold: least cosine of a node that is read.
        compute_dtype: dtype of the experts' arithmetic; parameters stay float32.
        remat: recompute experts in the backward pass: "none", "dots" (keep matmul results) or
            "full".
        approximate_gelu: tanh GELU in place of the exact one: faster, not the original's.
    """

    input_dim: int = 512
    hidden_dim: int = 2048
    output_dim: int = 512
    num_experts: int = 32
    top_k_experts: int = 3
    expert: ExpertKind = "transformer"
    expert_heads: int = 8
    expert_specializations: tuple[str, ...] = ()
    num_specialists: int = 4
    expert_context: Literal["routed", "sequence"] = "routed"
    gating_type: GatingType = "topk"
    num_gating_heads: int = 8
    gating_residual: bool = True
    dispatch: Literal["capacity", "dropless"] = "capacity"
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 1.25
    routing_group: Literal["sequence", "batch"] = "sequence"
    priority: Priority = "auto"
    causal: bool = False
    load_balance_loss: Literal["switch", "mse"] = "switch"
    load_balance_weight: float = 0.01
    balance_bias_rate: float = 0.0
    router_z_weight: float = 0.001
    dropout: float = 0.1
    report_scope: Literal["sequence", "batch", "none"] = "sequence"
    report_positions: int = 4
    dedup_threshold: float = 0.85
    dedup_rule: Literal["leader", "any_earlier"] = "leader"
    librarian_residual: bool = True
    librarian_contrastive_weight: float = 0.0
    max_kg_nodes: int = 100_000
    kg_edge_slots: int = 8
    kg_merge_threshold: float = 0.95
    kg_merge_rule: Literal["leader", "ema"] = "leader"
    kg_policy: Literal["reject", "oldest", "least_used", "lowest_confidence"] = "least_used"
    kg_ttl: int = 0
    kg_link_top_k: int = 5
    kg_link_threshold: float = 0.3
    kg_link_symmetric: bool = False
    kg_link_stream: bool = False
    kg_checkpoint_dir: str | None = None
    kg_save_interval: int = 1000
    kg_checkpoints_kept: int = 5
    use_faiss: bool = False
    memory_read: bool = False
    memory_top_k: int = 4
    memory_heads: int = 4
    memory_threshold: float = 0.0
    compute_dtype: DtypeName = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    approximate_gelu: bool = False

    @property
    def resolved_priority(self) -> Literal["position", "choice", "probability"]:
        """`priority` with "auto" resolved."""
        if self.priority == "auto":
            return "position" if self.causal else "choice"
        return self.priority

    @property
    def num_choices(self) -> int:
        """K as the router gives it: all experts when the gating is dense."""
        return self.num_experts if self.gating_type == "dense" else self.top_k_experts

    def _check(self) -> None:
        positive(
            self,
            *("input_dim", "hidden_dim", "output_dim", "num_experts", "top_k_experts"),
            *("expert_heads", "num_specialists", "num_gating_heads", "capacity_factor"),
            *("eval_capacity_factor", "report_positions", "max_kg_nodes", "kg_edge_slots"),
            *("kg_link_top_k", "kg_save_interval", "kg_checkpoints_kept"),
            *("memory_top_k", "memory_heads"),
        )
        not_negative(
            self,
            *("load_balance_weight", "balance_bias_rate", "router_z_weight"),
            *("librarian_contrastive_weight", "kg_ttl"),
        )
        between(self, 0.0, 1.0, "dropout", upper_open=True)
        between(
            self,
            *(-1.0, 1.0),
            *("dedup_threshold", "kg_merge_threshold", "kg_link_threshold", "memory_threshold"),
        )
        self._check_experts()
        self._check_routing()
        self._check_memory()

    def _check_experts(self) -> None:
        if self.top_k_experts > self.num_experts:
            raise ValueError(
                f"top_k_experts must be at most num_experts={self.num_experts}, "
                f"got {self.top_k_experts}"
            )
        named = len(self.expert_specializations)
        if named not in (0, self.num_experts):
            raise ValueError(
                f"expert_specializations must be empty or name all num_experts={self.num_experts} "
                f"experts, got {named} names"
            )
        if self.expert in ("transformer", "specialized"):
            divides(self, "expert_heads", "hidden_dim")
        divides(self, "num_gating_heads", "input_dim")

    def _check_routing(self) -> None:
        if self.dispatch == "dropless" and (
            self.expert == "specialized" or self.expert_context == "sequence"
        ):
            raise ValueError(
                'dispatch="dropless" needs expert "transformer", "mlp" or "swiglu" and '
                f'expert_context="routed", got expert={self.expert!r} and '
                f"expert_context={self.expert_context!r}"
            )
        if self.causal and self.resolved_priority != "position":
            raise ValueError(
                f'priority must be "auto" or "position" when causal=True, since any other order '
                f"lets a later token displace an earlier one, got {self.priority!r}"
            )
        if self.routing_group == "batch":
            if self.expert in ("transformer", "specialized") or self.expert_context == "sequence":
                raise ValueError(
                    'routing_group="batch" needs experts without attention ("mlp", "swiglu") and '
                    f'expert_context="routed", got expert={self.expert!r} and '
                    f"expert_context={self.expert_context!r}"
                )
            if self.report_scope == "sequence":
                raise ValueError(
                    'report_scope must be "batch" or "none" when routing_group="batch", since '
                    'slots are shared by sequences, got "sequence"'
                )
            if self.causal:
                raise ValueError(
                    'routing_group must be "sequence" when causal=True, since a shared capacity '
                    'lets one sequence displace another\'s tokens, got "batch"'
                )
        if self.balance_bias_rate > 0 and self.gating_type == "dense":
            raise ValueError(
                'balance_bias_rate must be 0 when gating_type="dense", which chooses every expert, '
                f"got {self.balance_bias_rate}"
            )

    def _check_memory(self) -> None:
        if self.librarian_contrastive_weight > 0 and self.report_scope != "sequence":
            raise ValueError(
                'librarian_contrastive_weight must be 0 unless report_scope="sequence", whose '
                f"reports it compares, got {self.librarian_contrastive_weight} and "
                f"report_scope={self.report_scope!r}"
            )
        for name in ("memory_top_k", "kg_link_top_k"):
            if getattr(self, name) >= self.max_kg_nodes:
                raise ValueError(
                    f"{name} must be below max_kg_nodes={self.max_kg_nodes}, "
                    f"got {getattr(self, name)}"
                )
        if self.memory_read:
            divides(self, "memory_heads", "output_dim")
