"""The training state and the optimizer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from moe_jax._types import Array, Int, PRNGKey, Variables
from moe_jax.config import TrainConfig
from moe_jax.graph import KnowledgeGraph
from moe_jax.lm import MoELanguageModel
from moe_jax.system import MoESystem
from moe_jax.training.copies import matrix_copies
from moe_jax.training.moments import store_in_bfloat16


class SavedState(NamedTuple):
    """What a checkpoint holds of a `TrainState`; the attributes are the same."""

    step: Int[Array, ""]
    params: Variables
    opt_state: optax.OptState


class TrainState(NamedTuple):
    """Everything an optimizer step changes, but the graph.

    Attributes:
        step: [] int32, optimizer steps done; also the position in the data.
        params: float32 parameters.
        opt_state: the optimizer's state.
        copies: what `matrix_copies` makes of the parameters; checkpoints are without them.
    """

    step: Int[Array, ""]
    params: Variables
    opt_state: optax.OptState
    copies: dict[str, Array]

    @property
    def saved(self) -> SavedState:
        """What a checkpoint holds."""
        return SavedState(*self[:3])


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with warm-up, cosine decay and clipping by the global norm.

    Decay touches matrices only (arrays of two or more axes), not biases, norms or gates, nor the
    embedding tables, whose rows are mostly untouched in a step.

    Args:
        config: of the training.

    Returns:
        An optax transformation.

    Example:
        >>> from moe_jax.config import TrainConfig
        >>> make_optimizer(TrainConfig()).init({"w": jnp.zeros(3)}) is not None
        True
    """
    warmup = max(1, round(config.steps * config.warmup_fraction))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(config.steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )
    adamw = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_is_decayed,
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        store_in_bfloat16(adamw) if config.moment_dtype == "bfloat16" else adamw,
        optax.masked(optax.scale(config.router_rate_scale), _named("supervisor")),
        optax.masked(optax.scale(config.table_rate_scale), _named("table")),
    )


def create_state(
    model: MoELanguageModel, optimizer: optax.GradientTransformation, key: PRNGKey
) -> TrainState:
    """Initialises parameters and optimizer.

    Args:
        model: the model.
        optimizer: from `make_optimizer`.
        key: of the parameters.

    Returns:
        The state before the first step.

    Example:
        >>> from moe_jax.config import smallest_run
        >>> config = smallest_run()
        >>> model, optimizer = MoELanguageModel(config.model), make_optimizer(config.training)
        >>> int(create_state(model, optimizer, jax.random.key(0)).step)
        0
    """

    def init(key: PRNGKey) -> TrainState:
        tokens = jnp.zeros((1, 8), jnp.int32)
        graph = create_graph(model) if model.config.moe.memory_read else None
        params = model.init(key, tokens, graph)["params"]
        copies = matrix_copies(params, model.config.moe.compute_dtype)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), copies)

    return jax.jit(init)(key)


def create_graph(model: MoELanguageModel) -> KnowledgeGraph:
    """Returns an empty knowledge graph of the model's configured size.

    Example:
        >>> from moe_jax.config import LanguageModelConfig, tiny
        >>> config = LanguageModelConfig(moe=tiny().replace(causal=True, expert="swiglu"))
        >>> create_graph(MoELanguageModel(config)).num_nodes
        64
    """
    return MoESystem(model.config.moe).create_graph()


def run_shapes(
    model: MoELanguageModel, optimizer: optax.GradientTransformation
) -> tuple[TrainState, KnowledgeGraph]:
    """A run's state and graph by shapes alone, to be restored on the first device."""

    def begin(key: PRNGKey) -> tuple[TrainState, KnowledgeGraph]:
        return create_state(model, optimizer, key), create_graph(model)

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        jax.eval_shape(begin, jax.random.key(0)),
    )


def _is_decayed(params: Variables) -> Variables:
    is_exempt = _named("table", "embedding", "expert_embeddings", "smear")(params)
    return jax.tree.map(lambda leaf, exempt: leaf.ndim >= 2 and not exempt, params, is_exempt)


def _named(*names: str) -> Callable[[Variables], Variables]:
    """A mask of the leaves whose path has one of the names."""

    def is_named(path: tuple, leaf: Array) -> bool:
        del leaf
        return any(part.key in names for part in path)

    return lambda params: jax.tree_util.tree_map_with_path(is_named, params)
