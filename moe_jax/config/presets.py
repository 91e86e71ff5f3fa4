"""Ready configs, as plain functions."""

from moe_jax.config.moe import MoEConfig
from moe_jax.config.training import LanguageModelConfig, RunConfig, TrainConfig


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
        kg_policy="reject",
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
        kg_policy="reject",  # evicting takes seconds to compile
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
    """The default sizes as one H100 likes them: bfloat16, tanh GELU, nothing dropped."""
    return MoEConfig(compute_dtype="bfloat16", approximate_gelu=True, dispatch="dropless")


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
            steps=400,
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
            steps=6,
            batch_size=4,
            seq_len=32,
            log_every=2,
            save_every=2,
            eval_bytes=256,
            eval_memory_bytes=0,
        ),
    )
