"""Frozen, checked, JSON-serialisable configuration.

Every dataclass here checks itself in ``__post_init__`` and raises ``ValueError`` naming the field,
what it must be and what it was. ``to_json`` and ``from_json`` are exact inverses.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

ExpertKind = Literal["transformer", "specialized", "mlp", "swiglu"]
GatingType = Literal["topk", "noisy_topk", "dense"]
Priority = Literal["auto", "position", "choice", "probability"]
DtypeName = Literal["float32", "bfloat16"]
# Not typing.Self, which run-time checkers of single functions cannot resolve.
ConfigT = TypeVar("ConfigT", bound="_Config")


class _Config:
    """Checks every field's type, and converts to and from JSON."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not _has_type(value, hints[field.name]):
                raise ValueError(
                    f"{field.name} must be {_describe(hints[field.name])}, got {value!r}"
                )
        self._check()

    def _check(self) -> None:
        """Checks values; a subclass overrides it."""

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """Returns a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain Python values, nested configs as dicts, tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    def to_json(self, indent: int | None = 2) -> str:
        """Returns the config as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Builds the config from `to_dict`'s result; absent fields take their defaults.

        Raises:
            ValueError: a key is not a field, or a value is refused.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__} must be given a mapping, got {values!r}")
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(names)}"
            )
        return cls(**{name: _from_plain(value, hints[name]) for name, value in values.items()})

    @classmethod
    def from_json(cls: type[ConfigT], text: str) -> ConfigT:
        """Builds the config from `to_json`'s result.

        Raises:
            ValueError: the text is no JSON, a key is not a field, or a value is refused.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{cls.__name__} is not valid JSON: {error}") from error
        return cls.from_dict(values)


@dataclasses.dataclass(frozen=True)
class MoEConfig(_Config):
    """Everything that shapes a `moe_jax.MoESystem`; the defaults are the original system's.

    Attributes:
        input_dim: D, width of the tokens that come in.
        hidden_dim: H, width inside an expert.
        output_dim: O, width of the experts' outputs, and of the graph's keys and values.
        num_experts: E.
        top_k_experts: K, experts that each token is sent to.
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
        kg_link_top_k: how many similar nodes a written node is linked to.
        kg_link_threshold: least cosine of such a link.
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
    kg_link_top_k: int = 5
    kg_link_threshold: float = 0.3
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
        _positive(
            self,
            *("input_dim", "hidden_dim", "output_dim", "num_experts", "top_k_experts"),
            *("expert_heads", "num_specialists", "num_gating_heads", "capacity_factor"),
            *("eval_capacity_factor", "report_positions", "max_kg_nodes", "kg_edge_slots"),
            *("kg_link_top_k", "kg_save_interval", "kg_checkpoints_kept"),
            *("memory_top_k", "memory_heads"),
        )
        _not_negative(
            self,
            *("load_balance_weight", "balance_bias_rate", "router_z_weight"),
            "librarian_contrastive_weight",
        )
        _between(self, 0.0, 1.0, "dropout", upper_open=True)
        _between(
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
            _divides(self, "expert_heads", "hidden_dim")
        _divides(self, "num_gating_heads", "input_dim")

    def _check_routing(self) -> None:
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

    def _check_memory(self) -> None:
        for name in ("memory_top_k", "kg_link_top_k"):
            if getattr(self, name) >= self.max_kg_nodes:
                raise ValueError(
                    f"{name} must be below max_kg_nodes={self.max_kg_nodes}, "
                    f"got {getattr(self, name)}"
                )
        if self.memory_read:
            _divides(self, "memory_heads", "output_dim")


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(_Config):
    """A byte-level causal language model built from a `MoESystem`.

    Attributes:
        moe: the feed-forward system of every block; must be causal, with equal widths in and out.
        num_layers: blocks of causal attention and sparse experts.
        num_heads: attention heads.
        max_length: longest sequence.
        vocab_size: V; 256 bytes and one symbol for the start of a document.
        ngram_sizes: lengths of the hashed n-gram embeddings added to the byte embedding
            (Pagnoni et al. 2024, section 3.2.1); empty for none.
        ngram_rows: rows of each n-gram table.
        ngram_dim: width of each n-gram table.
    """

    moe: MoEConfig = dataclasses.field(
        default_factory=lambda: MoEConfig(causal=True, expert="swiglu", dropout=0.0)
    )
    num_layers: int = 2
    num_heads: int = 8
    max_length: int = 512
    vocab_size: int = 257
    ngram_sizes: tuple[int, ...] = ()
    ngram_rows: int = 16_384
    ngram_dim: int = 64

    def _check(self) -> None:
        _positive(
            self,
            *("num_layers", "num_heads", "max_length", "vocab_size", "ngram_rows", "ngram_dim"),
        )
        if not self.moe.causal:
            raise ValueError("moe.causal must be True in a language model, got False")
        if self.moe.input_dim != self.moe.output_dim:
            raise ValueError(
                f"moe.output_dim must equal moe.input_dim={self.moe.input_dim} in a language "
                f"model, got {self.moe.output_dim}"
            )
        if self.moe.input_dim % (2 * self.num_heads):
            raise ValueError(
                f"num_heads must divide moe.input_dim={self.moe.input_dim} into even head widths, "
                f"got {self.num_heads}"
            )
        if any(size < 2 for size in self.ngram_sizes):
            raise ValueError(f"ngram_sizes must be at least 2 each, got {self.ngram_sizes}")


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Config):
    """How to train.

    Attributes:
        steps: optimizer steps.
        batch_size: B, sequences per step.
        seq_len: S, tokens per sequence.
        learning_rate: AdamW's peak rate, after the warm-up.
        router_rate_scale: the supervisors learn at this share of the rate: a router that moves
            slower than its experts keeps the load even.
        table_rate_scale: the n-gram tables learn at this multiple of the rate.
        warmup_fraction: share of the steps that warms up linearly.
        final_fraction: the cosine decays to this share of the peak.
        weight_decay: AdamW's decoupled decay, on matrices only.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: AdamW's epsilon.
        clip_norm: largest global gradient norm.
        accumulate: gradient accumulation: micro-batches per step; divides batch_size.
        confidence_weight: weight of the loss that teaches the experts' confidence to match the
            probability given to the right token.
        memory_write: write the knowledge graph.
        memory_write_every: steps between two writes.
        memory_write_from: share of the steps before the first write; what an untrained model
            reports would fill the graph with noise.
        seed: of parameters, data order and dropout.
        log_every: steps between two lines of metrics.
        eval_every: steps between two held-out evaluations; 0 for one at the end only.
        save_every: steps between two checkpoints; 0 for one at the end only.
        checkpoints_kept: how many are kept.
        eval_bytes: least number of held-out bytes that are predicted.
        eval_context: positions at the start of a held-out window that only give context.
    """

    steps: int = 1000
    batch_size: int = 16
    seq_len: int = 256
    learning_rate: float = 3e-3
    router_rate_scale: float = 1.0
    table_rate_scale: float = 1.0
    warmup_fraction: float = 0.05
    final_fraction: float = 0.05
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    accumulate: int = 1
    confidence_weight: float = 0.1
    memory_write: bool = True
    memory_write_every: int = 1
    memory_write_from: float = 0.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 100
    checkpoints_kept: int = 3
    eval_bytes: int = 65_536
    eval_context: int = 0

    def _check(self) -> None:
        _positive(
            self,
            *(
                "steps",
                "batch_size",
                "seq_len",
                "learning_rate",
                "router_rate_scale",
                "table_rate_scale",
                "eps",
                "clip_norm",
            ),
            *("accumulate", "memory_write_every", "log_every", "checkpoints_kept", "eval_bytes"),
        )
        _not_negative(
            self,
            "confidence_weight",
            "weight_decay",
            "eval_every",
            "save_every",
            "seed",
            "eval_context",
        )
        _between(self, 0.0, 1.0, "warmup_fraction", "final_fraction", "memory_write_from")
        _between(self, 0.0, 1.0, "beta1", "beta2", upper_open=True)
        _divides(self, "accumulate", "batch_size")
        if self.eval_context >= self.seq_len:
            raise ValueError(
                f"eval_context must be below seq_len={self.seq_len}, got {self.eval_context}"
            )


@dataclasses.dataclass(frozen=True)
class RunConfig(_Config):
    """A whole training run: the model and how to train it; a run folder's ``config.json``.

    Attributes:
        model: the language model.
        training: how to train it.
    """

    model: LanguageModelConfig = dataclasses.field(default_factory=LanguageModelConfig)
    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def _check(self) -> None:
        if self.training.memory_write and self.model.moe.report_scope == "none":
            raise ValueError(
                'model.moe.report_scope must not be "none" when training.memory_write=True'
            )
        if self.training.seq_len > self.model.max_length:
            raise ValueError(
                f"training.seq_len must be at most model.max_length={self.model.max_length}, "
                f"got {self.training.seq_len}"
            )


def original() -> MoEConfig:
    """The original system's sizes and its semantics, faults included: the parity oracle."""
    return MoEConfig(
        expert_context="sequence",
        gating_residual=False,
        load_balance_loss="mse",
        router_z_weight=0.0,
        report_scope="batch",
        dedup_rule="any_earlier",
        librarian_residual=False,
        kg_merge_rule="ema",
    )


def tiny() -> MoEConfig:
    """A system small enough for a test or a first look: D 32, E 4, 64 nodes."""
    return MoEConfig(
        input_dim=32,
        hidden_dim=64,
        output_dim=32,
        num_experts=4,
        top_k_experts=2,
        max_kg_nodes=64,
    )


def colab() -> MoEConfig:
    """A system for a free notebook GPU: D 256, E 16, bfloat16, 20,000 nodes."""
    return MoEConfig(
        input_dim=256,
        hidden_dim=512,
        output_dim=256,
        num_experts=16,
        top_k_experts=2,
        max_kg_nodes=20_000,
        compute_dtype="bfloat16",
    )


def h100() -> MoEConfig:
    """The default sizes as one H100 likes them: bfloat16, tanh GELU."""
    return MoEConfig(compute_dtype="bfloat16", approximate_gelu=True)


def byte_lm() -> RunConfig:
    """The run of `moe-jax train`: a byte language model for two CPU cores and a few minutes."""
    moe = MoEConfig(
        input_dim=256,
        hidden_dim=256,
        output_dim=256,
        num_experts=8,
        top_k_experts=2,
        expert="swiglu",
        causal=True,
        capacity_factor=1.5,
        eval_capacity_factor=2.0,
        dropout=0.0,
        load_balance_weight=0.02,
        balance_bias_rate=0.02,
        max_kg_nodes=2048,
        memory_read=True,
    )
    model = LanguageModelConfig(
        moe=moe,
        num_layers=2,
        num_heads=4,
        ngram_sizes=(2, 3, 4, 5, 6),
        ngram_rows=32_768,
        ngram_dim=32,
    )
    return RunConfig(
        model=model,
        training=TrainConfig(
            steps=500,
            batch_size=16,
            seq_len=128,
            learning_rate=4e-3,
            router_rate_scale=0.1,
            table_rate_scale=3.0,
            weight_decay=0.05,
            memory_write_every=10,
            memory_write_from=0.3,
            eval_every=200,
        ),
    )


def smallest_run() -> RunConfig:
    """A run of a few seconds, for tests and examples."""
    moe = tiny().replace(causal=True, expert="swiglu", dropout=0.0, eval_capacity_factor=2.0)
    model = LanguageModelConfig(moe=moe, num_layers=2, num_heads=2, max_length=64)
    return RunConfig(
        model=model,
        training=TrainConfig(
            steps=6, batch_size=4, seq_len=32, log_every=2, save_every=2, eval_bytes=256
        ),
    )


def _has_type(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value is choice or value == choice for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_has_type(part, item) for part in value)
    if hint is float:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and value == value
            and abs(value) != float("inf")
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if hint is float:
        return "a finite number"
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


def _from_plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return hint.from_dict(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    return value


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def _between(config: Any, low: float, high: float, *names: str, upper_open: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high) or (upper_open and value == high):
            bracket = ")" if upper_open else "]"
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}{bracket}, got {value}")


def _divides(config: Any, part: str, whole: str) -> None:
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{part} must divide {whole}={getattr(config, whole)}, got {getattr(config, part)}"
        )
