"""The configs of a language model, of its training, and of a whole run."""

import dataclasses

from moe_jax.config.base import Config, between, divides, not_negative, positive
from moe_jax.config.moe import DtypeName, MoEConfig


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(Config):
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
        positive(
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
class TrainConfig(Config):
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
        moment_dtype: dtype that AdamW's moments of matrices are stored in; see
            `moe_jax.training.store_in_bfloat16`.
        clip_norm: largest global gradient norm.
        accumulate: gradient accumulation: micro-batches per step; divides batch_size.
        confidence_weight: weight of the loss that teaches the experts' confidence to match the
            probability given to the right token.
        memory_write: write the knowledge graph, and count in it how often its nodes are read.
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
        eval_memory_bytes: at the end of a run, held-out documents are read from front to back with
            a token memory, about so many bytes and half as many to fit it; 0 for no such
            evaluation.
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
    moment_dtype: DtypeName = "float32"
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
    eval_memory_bytes: int = 16_384

    def _check(self) -> None:
        positive(
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
        not_negative(
            self,
            "confidence_weight",
            "weight_decay",
            "eval_every",
            "save_every",
            "seed",
            "eval_context",
            "eval_memory_bytes",
        )
        between(self, 0.0, 1.0, "warmup_fraction", "final_fraction", "memory_write_from")
        between(self, 0.0, 1.0, "beta1", "beta2", upper_open=True)
        divides(self, "accumulate", "batch_size")
        if self.eval_context >= self.seq_len:
            raise ValueError(
                f"eval_context must be below seq_len={self.seq_len}, got {self.eval_context}"
            )


@dataclasses.dataclass(frozen=True)
class RunConfig(Config):
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
