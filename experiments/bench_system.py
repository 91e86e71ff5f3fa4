"""Cases of `bench.py`: the whole system forward, writing its graph, and training, at seed sizes."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from bench_layers import peak_bytes
from measuring import NUM_INPUTS, Row, figures, time_calls
from workloads import TransformerSizes

from moe_jax import MoESystem
from moe_jax.config import MoEConfig, h100, tiny
from moe_jax.graph import KnowledgeGraph
from moe_jax.graph.state import with_keys
from moe_jax.ops import normalize
from moe_jax.routing import balanced_bias
from moe_jax.supervisor import BALANCE_BIAS, Supervisor
from moe_jax.training import (
    matrix_copies,
    store_in_bfloat16,
    with_copies,
    write_before_update,
)

_ON_DEVICE = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
BALANCE_RATE = 0.02
BALANCE_STEPS = 300
LEARNING_RATE = 1e-4


class Training(NamedTuple):
    """The state of a training step: what it donates."""

    variables: Any
    copies: dict[str, jax.Array]
    moments: Any
    graph: KnowledgeGraph | None
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class SystemCase:
    """A step of a `MoESystem`.

    Attributes:
        step: "system/forward", "system/forward+write", "training/step" or "training/step+write".
        batch: B.
        length: S.
        params: dtype of the experts' parameters.
        config: of the system.
        on_device: let the device decide loops and branches, an option of XLA off by default.
        moments: dtype in which AdamW's moments of matrices are stored.
    """

    step: str
    batch: int
    length: int
    params: str
    config: MoEConfig
    on_device: bool = False
    moments: str = "float32"

    @property
    def name(self) -> str:
        """What `--only` selects by."""
        extra = "" if self.config.remat == "none" else f"/remat-{self.config.remat}"
        extra += "/loops-on-device" if self.on_device else ""
        extra += "" if self.moments == "float32" else f"/moments-{self.moments}"
        return f"{self.step}/{self.batch}x{self.length}/{self.params}{extra}"

    @property
    def flags(self) -> str:
        """Options of XLA."""
        return _ON_DEVICE if self.on_device else ""

    @property
    def trains(self) -> bool:
        """Whether a step updates the parameters."""
        return self.step.startswith("training")

    @property
    def writes(self) -> bool:
        """Whether a step writes the graph."""
        return self.step.endswith("write")

    def measure(self, options: argparse.Namespace) -> list[Row]:
        """Runs the case and takes its figures; statistics are those of the last step."""
        config = configured(self.config, options)
        step, state = make_step(MoESystem(config), self)
        least = least_bytes(self, config, state[0])
        shape = (NUM_INPUTS, self.batch, self.length, config.input_dim)
        inputs = list(jax.random.normal(jax.random.key(3), shape))

        def call(i: int) -> Any:
            nonlocal state
            state, result = step(state, inputs[i % NUM_INPUTS])
            return state, result

        times, (_, (result, stats, *_)) = time_calls(call, jax.block_until_ready, options.repeats)
        if not bool(jnp.all(jnp.isfinite(result))):
            raise FloatingPointError("there are numbers that are not finite")
        dropped = float(stats.dropped_fraction)
        flops = sizes_of(config).flops_per_token(self.length, 1 - dropped)
        router = "" if options.router == "initial" else f"/router-{options.router}"
        router += "" if options.dispatch == "capacity" else f"/{options.dispatch}"
        row = figures(
            self.name + router,
            times,
            flops=flops * self.batch * self.length * (3 if self.trains else 1),
            least_bytes=least,
            peak_bytes=peak_bytes(),
            samples=self.batch,
            load=float(stats.max_over_mean),
            dropped=dropped,
        )
        return [row]


def configured(config: MoEConfig, options: argparse.Namespace) -> MoEConfig:
    """The case's config with the command line's wishes."""
    config = config.replace(dispatch=options.dispatch)
    if options.capacity_factor:
        factor = options.capacity_factor
        config = config.replace(capacity_factor=factor, eval_capacity_factor=factor)
    if options.router == "balanced":
        config = config.replace(balance_bias_rate=BALANCE_RATE)
    return config


def sizes_of(config: MoEConfig) -> TransformerSizes:
    """The sizes that the count of useful operations goes by."""
    return TransformerSizes(
        config.input_dim,
        config.hidden_dim,
        config.output_dim,
        config.num_experts,
        config.top_k_experts,
        config.expert_heads,
    )


def cast_experts(variables: Any, dtype: str) -> Any:
    """The variables with the experts' parameters cast; the float32 supervisor stays."""

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        is_expert = any(getattr(part, "key", None) == "bank" for part in path)
        return leaf.astype(dtype) if is_expert else leaf

    return jax.tree_util.tree_map_with_path(cast, variables)


def with_bias(variables: Any, bias: jax.Array) -> Any:
    """The variables with another balance bias."""

    def replace(path: tuple, leaf: jax.Array) -> jax.Array:
        return bias if getattr(path[-1], "key", None) == BALANCE_BIAS else leaf

    return jax.tree_util.tree_map_with_path(replace, variables)


def bias_of(variables: Any) -> jax.Array:
    """[E] the balance bias."""
    return variables["params"]["constellation"]["supervisor"][BALANCE_BIAS]


def balance(config: MoEConfig, variables: Any, batch: int, length: int) -> Any:
    """Trains the router's balance alone, by loss-free balancing (Wang et al. 2024).

    300 steps of the library's own `balanced_bias` on fresh random tokens, none of them timed
    later; experts and gate stay as they are. What the bias cannot learn, since it is of single
    sequences, is how evenly each of them spreads over the experts.
    """
    own = variables["params"]["constellation"]
    supervisor = Supervisor(
        config.num_experts,
        config.top_k_experts,
        num_heads=config.num_gating_heads,
        residual=config.gating_residual,
        balance_bias=True,
    )

    @jax.jit
    def train(params: Any, embeddings: jax.Array) -> jax.Array:
        def step(i: jax.Array, bias: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(5), i)
            x = jax.random.normal(key, (batch, length, config.input_dim))
            chosen = supervisor.apply(
                {"params": params | {BALANCE_BIAS: bias}},
                x.astype(config.compute_dtype),
                embeddings,
            ).choices.expert
            load = jnp.bincount(chosen.reshape(-1), length=config.num_experts) / chosen.size
            return balanced_bias(bias, load, BALANCE_RATE)

        return jax.lax.fori_loop(0, BALANCE_STEPS, step, params[BALANCE_BIAS])

    return with_bias(variables, train(own["supervisor"], own["expert_embeddings"]))


def half_full(graph: KnowledgeGraph) -> KnowledgeGraph:
    """The graph with every second half of its slots taken by random nodes."""
    key = normalize(jax.random.normal(jax.random.key(2), graph.key.shape))
    is_live = jnp.arange(graph.num_nodes) < graph.num_nodes // 2
    at = jnp.where(is_live, jnp.arange(graph.num_nodes), graph.num_nodes)
    return with_keys(graph, at, key)._replace(value=key + 0, is_live=is_live)


def least_bytes(case: SystemCase, config: MoEConfig, variables: Any) -> float:
    """What a step must move at least.

    Forward: parameters and tokens in, outputs out. Training: parameters and AdamW's two moments
    in and out. Writing: the codes of the graph's nodes, once to find what merges and once for the
    links.
    """
    params = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    tokens = case.batch * case.length
    moved = tokens * (4 * config.input_dim + 2 * config.output_dim)
    moved += params * 6 if case.trains else params
    if case.writes:
        moved += 2 * config.max_kg_nodes * (config.output_dim + 4)
    return float(moved)


def make_step(system: MoESystem, case: SystemCase) -> tuple[Callable, Any]:
    """The compiled step, (state, x) -> (state, (result, stats)), and its first state.

    A training step gives its routing plan, too. The state's first entry is the variables; what
    changes of it is donated.
    """
    config = system.config
    variables = jax.jit(lambda key: cast_experts(
        system.init(key, jnp.zeros((1, 8, config.input_dim))), case.params
    ))(jax.random.key(0))  # fmt: skip
    if config.balance_bias_rate:
        variables = balance(config, variables, case.batch, case.length)
    graph = jax.jit(lambda: half_full(system.create_graph()))() if case.writes else None
    if case.trains:
        return _training_step(system, variables, graph, case.moments)
    if case.writes:
        write = system.inference_step()

        def step(state, x):
            variables, graph = state
            graph, out, _ = write(variables, graph, x)
            return (variables, graph), (out.output, out.stats)

        return step, (variables, graph)

    @jax.jit
    def forward(variables, x):
        # What nobody asks for is not computed: proposals are for those who write.
        out = system.apply(variables, x)
        return out.output, out.stats

    def forward_step(state, x):
        return state, forward(state[0], x)

    return forward_step, (variables,)


def _training_step(
    system: MoESystem, variables: Any, graph: KnowledgeGraph | None, moments_dtype: str
):
    optimizer = optax.adamw(LEARNING_RATE)
    if moments_dtype == "bfloat16":
        optimizer = store_in_bfloat16(optimizer)
    rate, dtype = system.config.balance_bias_rate, system.config.compute_dtype

    def loss(variables, x, key):
        target = jax.random.normal(key, (*x.shape[:2], system.config.output_dim))
        rngs = {"dropout": jax.random.fold_in(key, 1)}
        out = system.apply(variables, x, is_training=True, rngs=rngs)
        error = jnp.mean(jnp.square(out.output.astype(jnp.float32) - target))
        return error + out.losses.total, out

    def step(state, x):
        variables, copies, moments, graph, key = state
        key, own = jax.random.split(key)
        used = with_copies(variables, copies)
        (value, out), grads = jax.value_and_grad(loss, has_aux=True)(used, x, own)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, variables)
        if graph is not None:
            graph, _ = system.write(graph, out.proposals)
            moments = write_before_update(graph, moments)
        updates, moments = optimizer.update(grads, moments, variables)
        variables = optax.apply_updates(variables, updates)
        if rate:
            moved = balanced_bias(bias_of(variables), out.stats.load, rate)
            variables = with_bias(variables, moved)
        copies = matrix_copies(variables, dtype)
        after = Training(variables, copies, moments, graph, key)
        return after, (value, out.stats, out.plan)

    copies = jax.jit(matrix_copies, static_argnums=1)(variables, dtype)
    moments = jax.jit(optimizer.init)(variables)
    state = Training(variables, copies, moments, graph, jax.random.key(1))
    return jax.jit(step, donate_argnums=0), state


def cases(smoke: bool) -> list[SystemCase]:
    """The seed defaults at two sizes of batch, or tiny ones."""
    config, sizes, again = h100(), ((8, 128), (32, 512)), (32, 512)
    if smoke:
        config = tiny().replace(compute_dtype="bfloat16", approximate_gelu=True)
        sizes, again = ((2, 16),), (2, 16)
    found = [
        SystemCase(step, batch, length, params, config)
        for batch, length in sizes
        for step, params in (
            ("system/forward", "float32"),
            ("system/forward", "bfloat16"),
            ("system/forward+write", "bfloat16"),
            ("training/step", "float32"),
            ("training/step+write", "float32"),
        )
    ]
    found.append(SystemCase("system/forward+write", *sizes[0], "bfloat16", config, True))
    found.append(SystemCase("training/step", *again, "float32", config.replace(remat="full")))
    found.append(SystemCase("training/step", *again, "float32", config, moments="bfloat16"))
    return sorted(found, key=lambda case: case.step.split("/")[0])
