"""Configurations: exact JSON both ways, the original's defaults, and refusal of what is wrong."""

import dataclasses
import importlib
import json
import math
import sys
import typing

import pytest

import moe_jax


def without_the_import_hook():
    """The package as users get it: under the hook beartype refuses wrong types first."""

    def take_out():
        names = [name for name in sys.modules if (name + ".").startswith("moe_jax.config.")]
        return {name: sys.modules.pop(name) for name in names}

    hooked, finders = take_out(), list(sys.meta_path)
    sys.meta_path[:] = [f for f in finders if not type(f).__module__.startswith("jaxtyping")]
    try:
        plain = importlib.import_module("moe_jax.config")
        take_out()
    finally:
        sys.meta_path[:] = finders
        sys.modules.update(hooked)
        moe_jax.config = hooked["moe_jax.config"]
    return plain


config = without_the_import_hook()
MoEConfig, LanguageModelConfig = config.MoEConfig, config.LanguageModelConfig
TrainConfig, RunConfig = config.TrainConfig, config.RunConfig

PRESETS = ["original", "tiny", "colab", "h100", "byte_lm", "smallest_run"]
KINDS = [MoEConfig, LanguageModelConfig, TrainConfig, RunConfig]

UNUSUAL = [
    MoEConfig(
        num_experts=2,
        top_k_experts=1,
        expert_specializations=("syntax", "s\u00e9mantique"),
        kg_checkpoint_dir="/tmp/graph",
        dropout=0.1 + 0.2,
        capacity_factor=1,
    ),
    LanguageModelConfig(ngram_sizes=(2, 3), ngram_rows=7),
    TrainConfig(learning_rate=1e-300, memory_write=False, seed=2**40),
    RunConfig(training=TrainConfig(seq_len=17), model=LanguageModelConfig(num_layers=1)),
]


@pytest.mark.parametrize(
    "original",
    [getattr(config, name)() for name in PRESETS] + [kind() for kind in KINDS] + UNUSUAL,
    ids=lambda c: type(c).__name__,
)
def test_json_round_trip(original):
    kind = type(original)
    assert kind.from_json(original.to_json()) == original
    assert kind.from_json(original.to_json(indent=None)) == original
    assert kind.from_dict(original.to_dict()) == original
    assert json.loads(original.to_json()) == original.to_dict()


def test_absent_keys_take_their_defaults():
    assert MoEConfig.from_json('{"input_dim": 64}') == MoEConfig(input_dim=64)
    assert RunConfig.from_dict({"training": {"steps": 3}}) == RunConfig(
        training=TrainConfig(steps=3)
    )


def test_unknown_keys_are_refused_by_name():
    with pytest.raises(ValueError, match="MoEConfig has no field 'hiden_dim', 'zeal'; it has inp"):
        MoEConfig.from_dict({"zeal": 1, "hiden_dim": 2})
    with pytest.raises(ValueError, match="MoEConfig has no field 'experts'"):
        RunConfig.from_json('{"model": {"moe": {"experts": 3}}}')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "MoEConfig is not valid JSON"),
        ("[1]", r"MoEConfig must be given a mapping, got \[1\]"),
        ('{"dropout": NaN}', "dropout must be a finite number, got nan"),
        ('{"capacity_factor": Infinity}', "capacity_factor must be a finite number, got inf"),
        ('{"num_experts": 4.0}', "num_experts must be int, got 4.0"),
        ('{"expert_specializations": [1]}', r"expert_specializations must be .*got \(1,\)"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_json(text)


def test_nested_configs_must_be_configs():
    with pytest.raises(ValueError, match="moe must be MoEConfig, got 3"):
        LanguageModelConfig.from_dict({"moe": 3})
    with pytest.raises(ValueError, match="model must be LanguageModelConfig, got MoEConfig"):
        RunConfig(model=MoEConfig())


NOT_A = {
    int: [True, 1.0, math.nan, "8", None],
    float: [True, math.nan, math.inf, -math.inf, "0.1", None, 1j],
    bool: [1, 0, "true", None],
    str | None: [1, True, ("a",)],
    tuple[str, ...]: ["a", ["a"], (1,), None],
    tuple[int, ...]: [2, [2], ("2",), (True,), (2.0,)],
}


def wrong_types():
    for kind in KINDS:
        for name, hint in typing.get_type_hints(kind).items():
            if typing.get_origin(hint) is typing.Literal:
                values = ["no_such_choice", None, 1, True]
            else:
                values = NOT_A.get(hint, [None, {}])
            yield pytest.param(kind, name, values, id=f"{kind.__name__}.{name}")


@pytest.mark.parametrize(("kind", "name", "values"), list(wrong_types()))
def test_wrong_types_are_refused(kind, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got ") as error:
            kind(**{name: value})
        assert str(error.value).endswith(f"got {value!r}")


POSITIVE = {
    MoEConfig: """input_dim hidden_dim output_dim num_experts top_k_experts expert_heads
        num_specialists num_gating_heads capacity_factor eval_capacity_factor report_positions
        max_kg_nodes kg_edge_slots kg_link_top_k kg_save_interval kg_checkpoints_kept
        memory_top_k memory_heads""",
    LanguageModelConfig: "num_layers num_heads max_length vocab_size ngram_rows ngram_dim",
    TrainConfig: """steps batch_size seq_len learning_rate router_rate_scale table_rate_scale eps
        clip_norm accumulate memory_write_every log_every checkpoints_kept eval_bytes""",
}
NOT_NEGATIVE = {
    MoEConfig: """load_balance_weight balance_bias_rate router_z_weight
        librarian_contrastive_weight kg_ttl""",
    TrainConfig: "confidence_weight weight_decay eval_every save_every seed eval_context",
}
RANGES = {
    (MoEConfig, "dropout"): ([-0.1, 1.0, 1.5], "[0, 1)"),
    (MoEConfig, "dedup_threshold"): ([-1.1, 1.1], "[-1, 1]"),
    (MoEConfig, "kg_merge_threshold"): ([-2, 2], "[-1, 1]"),
    (MoEConfig, "kg_link_threshold"): ([-2, 2], "[-1, 1]"),
    (MoEConfig, "memory_threshold"): ([-2, 2], "[-1, 1]"),
    (TrainConfig, "warmup_fraction"): ([-0.1, 1.1], "[0, 1]"),
    (TrainConfig, "final_fraction"): ([-0.1, 1.1], "[0, 1]"),
    (TrainConfig, "memory_write_from"): ([-0.1, 1.1], "[0, 1]"),
    (TrainConfig, "beta1"): ([-0.1, 1.0], "[0, 1)"),
    (TrainConfig, "beta2"): ([-0.1, 1.0], "[0, 1)"),
}


def bad_numbers():
    for kind, names in POSITIVE.items():
        for name in names.split():
            for value in (0, -1):
                yield kind, name, value, f"{name} must be positive, got {value}"
    for kind, names in NOT_NEGATIVE.items():
        for name in names.split():
            yield kind, name, -1, f"{name} must not be negative, got -1"
    for (kind, name), (values, interval) in RANGES.items():
        for value in values:
            yield kind, name, value, f"{name} must lie in {interval}, got {value}"


@pytest.mark.parametrize(("kind", "name", "value", "message"), list(bad_numbers()))
def test_bad_numbers_are_refused(kind, name, value, message):
    with pytest.raises(ValueError, match="must") as error:
        kind(**{name: value})
    assert str(error.value) == message


BATCH = {"routing_group": "batch", "expert": "mlp", "report_scope": "batch"}
COMBINATIONS = [
    (MoEConfig, {"top_k_experts": 33}, "top_k_experts must be at most num_experts=32, got 33"),
    (
        MoEConfig,
        {"expert_specializations": ("a", "b")},
        "expert_specializations must be empty or name all num_experts=32 experts, got 2 names",
    ),
    (MoEConfig, {"expert_heads": 7}, "expert_heads must divide hidden_dim=2048, got 7"),
    (
        MoEConfig,
        {"expert_heads": 7, "expert": "specialized"},
        "expert_heads must divide hidden_dim=2048, got 7",
    ),
    (MoEConfig, {"num_gating_heads": 7}, "num_gating_heads must divide input_dim=512, got 7"),
    (
        MoEConfig,
        {"causal": True, "priority": "choice"},
        'priority must be "auto" or "position" when causal=True.*got \'choice\'',
    ),
    (MoEConfig, {"causal": True, "priority": "probability"}, "priority must.*got 'probability'"),
    (MoEConfig, {"routing_group": "batch"}, "needs experts without attention.*'transformer'"),
    (
        MoEConfig,
        {**BATCH, "expert_context": "sequence"},
        "needs experts without attention.*expert_context='sequence'",
    ),
    (MoEConfig, {**BATCH, "report_scope": "sequence"}, 'report_scope must be "batch" or "none"'),
    (MoEConfig, {**BATCH, "causal": True}, 'routing_group must be "sequence" when causal=True'),
    (
        MoEConfig,
        {"max_kg_nodes": 4, "kg_link_top_k": 1},
        "memory_top_k must be below max_kg_nodes=4, got 4",
    ),
    (MoEConfig, {"max_kg_nodes": 5}, "kg_link_top_k must be below max_kg_nodes=5, got 5"),
    (
        MoEConfig,
        {"memory_read": True, "memory_heads": 7},
        "memory_heads must divide output_dim=512, got 7",
    ),
    (
        MoEConfig,
        {"gating_type": "dense", "top_k_experts": 32, "balance_bias_rate": 0.1},
        "balance_bias_rate must be 0 when gating_type",
    ),
    (
        MoEConfig,
        {"librarian_contrastive_weight": 0.1, "report_scope": "none"},
        "librarian_contrastive_weight must be 0 unless report_scope.*'none'",
    ),
    (LanguageModelConfig, {"moe": MoEConfig()}, "moe.causal must be True.*got False"),
    (
        LanguageModelConfig,
        {"moe": MoEConfig(causal=True, output_dim=256)},
        "moe.output_dim must equal moe.input_dim=512.*got 256",
    ),
    (
        LanguageModelConfig,
        {"num_heads": 512},
        "num_heads must divide moe.input_dim=512 into even head widths, got 512",
    ),
    (
        LanguageModelConfig,
        {"ngram_sizes": (2, 1)},
        r"ngram_sizes must be at least 2 each, got \(2, 1\)",
    ),
    (TrainConfig, {"accumulate": 5}, "accumulate must divide batch_size=16, got 5"),
    (TrainConfig, {"eval_context": 256}, "eval_context must be below seq_len=256, got 256"),
    (
        RunConfig,
        {"training": TrainConfig(seq_len=513)},
        "training.seq_len must be at most model.max_length=512, got 513",
    ),
    (
        RunConfig,
        {"model": LanguageModelConfig(moe=MoEConfig(causal=True, report_scope="none"))},
        'model.moe.report_scope must not be "none"',
    ),
]


@pytest.mark.parametrize(("kind", "changes", "message"), COMBINATIONS)
def test_bad_combinations_are_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_limits_are_allowed():
    MoEConfig(dropout=0.0, dedup_threshold=-1, kg_merge_threshold=1, top_k_experts=32)
    MoEConfig(expert="mlp", expert_heads=7, causal=True, priority="position")
    MoEConfig(**BATCH)
    MoEConfig(max_kg_nodes=6, memory_heads=7)
    TrainConfig(warmup_fraction=1, final_fraction=0, memory_write_from=1, eval_context=255)


def test_replace_checks_again():
    small = config.tiny()
    assert small.replace(num_experts=8).num_experts == 8
    assert small.num_experts == 4
    with pytest.raises(ValueError, match="top_k_experts must be at most num_experts=1, got 2"):
        small.replace(num_experts=1)


@pytest.mark.parametrize("kind", KINDS)
def test_configs_are_frozen(kind):
    one = kind()
    name = dataclasses.fields(one)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, name, getattr(one, name))
    assert hash(one) == hash(kind())


def test_defaults_are_the_original_systems():
    defaults = {
        "input_dim": 512,
        "hidden_dim": 2048,
        "output_dim": 512,
        "num_experts": 32,
        "top_k_experts": 3,
        "load_balance_weight": 0.01,
        "dedup_threshold": 0.85,
        "max_kg_nodes": 100_000,
        "num_gating_heads": 8,
        "dropout": 0.1,
        "kg_save_interval": 1000,
        "kg_checkpoint_dir": None,
        "use_faiss": False,
    }
    ours = MoEConfig()
    assert {name: getattr(ours, name) for name in defaults} == defaults


@pytest.mark.parametrize(
    ("causal", "priority", "resolved"),
    [
        (False, "auto", "choice"),
        (True, "auto", "position"),
        (False, "position", "position"),
        (False, "probability", "probability"),
    ],
)
def test_auto_priority(causal, priority, resolved):
    assert MoEConfig(causal=causal, priority=priority).resolved_priority == resolved


def test_dense_gating_chooses_every_expert():
    assert MoEConfig(gating_type="dense").num_choices == 32
    assert MoEConfig(gating_type="noisy_topk").num_choices == 3
