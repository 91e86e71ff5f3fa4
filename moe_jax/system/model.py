"""The module that puts the parts together, and the steps made of it."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import graph as kg
from moe_jax._types import Array, Bool, Float, Int, Variables
from moe_jax.config import MoEConfig
from moe_jax.constellation import Constellation
from moe_jax.experts import EXPERTS, ExpertBank
from moe_jax.graph import Hits, InsertInfo, KnowledgeGraph
from moe_jax.librarian import Librarian, Proposals, contrastive_loss
from moe_jax.memory import MemoryReader, note_reads
from moe_jax.reports import DraftReports
from moe_jax.routing import (
    RoutingPlan,
    router_z_loss,
    routing_stats,
    switch_balance_loss,
    usage_mse_loss,
)
from moe_jax.supervisor import Supervisor
from moe_jax.system.inputs import checked_mask, checked_source
from moe_jax.system.output import MoELosses, MoEOutput
from moe_jax.system.query import faiss_index, infer, search_reports


class MoESystem(nn.Module):
    """input -> memory -> supervisor -> expert constellation -> draft reports -> librarian.

    Calling it changes nothing; `write` puts the proposals into a graph, `inference_step` does
    both in one compiled step, and `query` asks the graph what it knows.

    Attributes:
        config: everything that shapes the system.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax.config import tiny
        >>> system = MoESystem(tiny())
        >>> x = jnp.ones((2, 16, 32))
        >>> variables = jax.jit(system.init)(jax.random.key(0), x)
        >>> jax.jit(system.apply)(variables, x).output.shape
        (2, 16, 32)
    """

    config: MoEConfig

    def setup(self) -> None:
        """Builds the parts; the one place where the config is read."""
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        supervisor = Supervisor(
            num_experts=c.num_experts,
            top_k=c.top_k_experts,
            num_heads=c.num_gating_heads,
            gating_type=c.gating_type,
            residual=c.gating_residual,
            balance_bias=c.balance_bias_rate > 0,
        )
        self.constellation = Constellation(
            supervisor=supervisor,
            bank=ExpertBank(_expert(c), num_experts=c.num_experts, remat=c.remat),
            dispatch=c.dispatch,
            capacity_factor=c.capacity_factor,
            eval_capacity_factor=c.eval_capacity_factor,
            context=c.expert_context,
            group=c.routing_group,
            priority=c.resolved_priority,
            report_scope=c.report_scope,
            num_positions=c.report_positions,
        )
        if c.report_scope != "none":
            self.librarian = Librarian(c.dedup_threshold, c.dedup_rule, c.librarian_residual)
        if c.memory_read:
            self.memory = MemoryReader(c.memory_heads, c.memory_top_k, c.memory_threshold, dtype)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        graph: KnowledgeGraph | None = None,
        *,
        is_valid: Bool[Array, "B S"] | None = None,
        source: Int[Array, "B 2"] | None = None,
        is_training: bool = False,
    ) -> MoEOutput:
        """Runs the system on a batch of sequences.

        Args:
            x: [B, S, D] tokens.
            graph: the memory to read; needed when `memory_read`, unused otherwise.
            is_valid: [B, S], False for padding, whose numbers do not matter.
            source: [B, 2] int32 document id and offset of each sequence's first token, carried
                into the reports.
            is_training: training capacity, dropout (rng "dropout") and router noise ("router").

        Returns:
            Outputs, reports, proposals, losses and statistics.

        Raises:
            ValueError: x is not [B, S, input_dim], is_valid or source has another shape or dtype,
                or the graph is missing or of another width.
        """
        c = self.config
        if x.ndim != 3 or x.shape[-1] != c.input_dim:
            raise ValueError(f"x must have shape [B, S, input_dim={c.input_dim}], got {x.shape}")
        if not x.size:
            raise ValueError(f"x must hold at least one token, got shape {x.shape}")
        is_valid = checked_mask(is_valid, x.shape[:2])
        source = checked_source(source, x.shape[0])
        x = x.astype(c.compute_dtype)
        reads = None
        if c.memory_read:
            if is_valid is not None:  # the constellation does so for all that comes after
                x = jnp.where(is_valid[..., None], x, 0)
            x, reads = self.memory.read(x, self._checked(graph), is_valid=is_valid)
        routed = self.constellation(x, is_valid=is_valid, source=source, is_training=is_training)
        proposals = None
        if routed.reports is not None:
            proposals = self.librarian(routed.reports)
        return MoEOutput(
            output=routed.output,
            confidence=routed.confidence,
            plan=routed.plan,
            reports=routed.reports,
            proposals=jax.lax.stop_gradient(proposals),
            losses=self._losses(routed.logits, routed.plan, routed.reports, proposals, is_valid),
            stats=routing_stats(routed.logits, routed.plan, is_valid),
            reads=reads,
        )

    def create_graph(self) -> KnowledgeGraph:
        """Returns an empty knowledge graph of the configured size."""
        c = self.config
        return KnowledgeGraph.create(c.max_kg_nodes, c.output_dim, num_edge_slots=c.kg_edge_slots)

    def write(
        self, graph: KnowledgeGraph, proposals: Proposals
    ) -> tuple[KnowledgeGraph, InsertInfo]:
        """Inserts the librarian's proposals and links what was written to its like.

        All proposals of one call carry the same time, one tick after the graph's clock. Nodes
        that have outlived `kg_ttl` are deleted before links are made. With `kg_link_stream`,
        reports of one document (the first column of their source) are linked in the order of
        their offsets (the second).

        Args:
            graph: the graph before.
            proposals: from a call of the system.

        Returns:
            The graph after, and what became of each proposal.
        """
        c = self.config
        graph, info = kg.insert(
            graph,
            proposals.key,
            values=proposals.value,
            confidence=proposals.confidence,
            expert_id=proposals.expert_id,
            source=proposals.source,
            weight=proposals.weight,
            is_valid=proposals.is_kept,
            time=jnp.maximum(graph.clock, graph.clock + 1),  # the last tick stays the last
            merge_threshold=c.kg_merge_threshold,
            merge_rule=c.kg_merge_rule,
            policy=c.kg_policy,
        )
        if c.kg_ttl:
            graph, _ = kg.expire(graph, c.kg_ttl)
        graph, _ = kg.link_similar(
            graph,
            info.node_id,
            k=c.kg_link_top_k,
            threshold=c.kg_link_threshold,
            symmetric=c.kg_link_symmetric,
            is_valid=info.is_current,
        )
        if c.kg_link_stream:
            document, offset = proposals.source[:, 0], proposals.source[:, 1]
            graph, _, _ = kg.link_stream(
                graph,
                info.node_id,
                document,
                position=offset,
                is_valid=info.is_current & (document >= 0),
            )
        return graph, info

    def inference_step(
        self,
    ) -> Callable[..., tuple[KnowledgeGraph, MoEOutput, InsertInfo]]:
        """Returns one compiled step that infers, counts what it read and writes what it found.

        Equal systems get the same one, so that it may be asked for at every call.

        Returns:
            A function of (variables, graph, x, is_valid=None, source=None) that gives (graph,
            output, info). The graph is donated: use the returned one from then on. One
            compilation serves all calls of equal shapes.

        Raises:
            ValueError: `report_scope` is "none", so there is nothing to write.
        """
        if self.config.report_scope == "none":
            raise ValueError('report_scope must not be "none" to write a graph')

        return _inference_step(self)

    def query(
        self,
        variables: Variables,
        graph: KnowledgeGraph,
        x: Float[Array, "B S D"],
        k: int = 5,
        *,
        is_valid: Bool[Array, "B S"] | None = None,
        threshold: float = -1.0,
    ) -> Hits:
        """Asks the graph what it knows about each sequence of x.

        The sequences take the way of any input up to the librarian; the keys of their draft
        reports are then searched for, and a sequence's answer is the best of all its reports'
        hits, each node once. With `use_faiss` the search is faiss's, on the host, through one
        index for the system, which follows the graph.

        Args:
            variables: of the system.
            graph: the graph to search.
            x: [B, S, D] tokens.
            k: nodes wanted per sequence.
            is_valid: [B, S], False for padding.
            threshold: least cosine of a hit.

        Returns:
            Hits of shape [B, k].

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from moe_jax.config import tiny
            >>> system, x = MoESystem(tiny()), jnp.ones((2, 16, 32))
            >>> variables = jax.jit(system.init)(jax.random.key(0), x)
            >>> graph = system.create_graph()
            >>> graph, _, _ = system.inference_step()(variables, graph, x)
            >>> system.query(variables, graph, x, k=3).ids.shape
            (2, 3)
        """
        output = infer(self, variables, x, graph, is_valid)
        index = faiss_index(self, graph) if self.config.use_faiss else None
        return search_reports(graph, output, k, threshold=threshold, index=index)

    def _checked(self, graph: KnowledgeGraph | None) -> KnowledgeGraph:
        if graph is None:
            raise ValueError("graph must be given when memory_read=True, got None")
        if graph.dim != self.config.output_dim:
            raise ValueError(
                f"graph must have width output_dim={self.config.output_dim}, got {graph.dim}"
            )
        return graph

    def _losses(
        self,
        logits: Float[Array, "B S E"],
        plan: RoutingPlan,
        reports: DraftReports | None,
        proposals: Proposals | None,
        is_valid: Bool[Array, "B S"] | None,
    ) -> MoELosses:
        c = self.config
        if c.load_balance_loss == "switch":
            balance = switch_balance_loss(logits, plan.expert, is_valid)
        else:
            balance = usage_mse_loss(logits, is_valid)
        z = router_z_loss(logits, is_valid)
        contrastive = jnp.zeros(())
        if c.librarian_contrastive_weight > 0 and reports is not None:
            contrastive = contrastive_loss(proposals.key, reports.sequence, reports.is_valid)
        total = (
            c.load_balance_weight * balance
            + c.router_z_weight * z
            + c.librarian_contrastive_weight * contrastive
        )
        return MoELosses(load_balance=balance, router_z=z, contrastive=contrastive, total=total)


@functools.lru_cache(maxsize=16)
def _inference_step(
    system: MoESystem,
) -> Callable[..., tuple[KnowledgeGraph, MoEOutput, InsertInfo]]:
    def step(
        variables: Variables,
        graph: KnowledgeGraph,
        x: Float[Array, "B S D"],
        is_valid: Bool[Array, "B S"] | None = None,
        source: Int[Array, "B 2"] | None = None,
    ) -> tuple[KnowledgeGraph, MoEOutput, InsertInfo]:
        output = system.apply(variables, x, graph, is_valid=is_valid, source=source)
        graph = note_reads(graph, output.reads)
        graph, info = system.write(graph, output.proposals)
        return graph, output, info

    return jax.jit(step, donate_argnums=1)


def _expert(c: MoEConfig) -> nn.Module:
    """One unbound expert of the configured kind."""
    fields = {
        "hidden_dim": c.hidden_dim,
        "output_dim": c.output_dim,
        "dropout": c.dropout,
        "dtype": jnp.dtype(c.compute_dtype),
    }
    if c.expert != "swiglu":
        fields["approximate_gelu"] = c.approximate_gelu
    if c.expert in ("transformer", "specialized"):
        fields |= {"num_heads": c.expert_heads, "causal": c.causal}
    if c.expert == "specialized":
        fields["num_specialists"] = c.num_specialists
    return EXPERTS[c.expert](**fields)
