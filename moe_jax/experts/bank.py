"""E experts of one kind, stacked so that XLA sees one batched matmul per layer."""

from typing import Literal

import flax.linen as nn
import jax

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.experts.base import ExpertOutput


class ExpertBank(nn.Module):
    """Runs E independent experts of one kind, each on its own buffer.

    Every parameter of `expert` gets a leading axis E, the one to shard for expert parallelism.

    Attributes:
        expert: one expert, unbound; its fields are shared, its parameters are not.
        num_experts: E.
        remat: what the backward pass recomputes: "none", "dots" (all but matmul results) or
            "full" (everything inside the experts).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax.experts import MLPExpert
        >>> bank = ExpertBank(MLPExpert(16, 4), num_experts=3)
        >>> x, valid = jnp.ones((3, 2, 8, 4)), jnp.ones((3, 2, 8), bool)
        >>> position = jnp.zeros((3, 2, 8), int)
        >>> out, _ = jax.jit(bank.init_with_output)(jax.random.key(0), x, valid, position)
        >>> out.output.shape
        (3, 2, 8, 4)
    """

    expert: nn.Module
    num_experts: int
    remat: Literal["none", "dots", "full"] = "none"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "E *B C D"],
        is_valid: Bool[Array, "E *B C"],
        position: Int[Array, "E *B C"],
        is_training: bool = False,
    ) -> ExpertOutput:
        """Runs expert e on x[e].

        Args:
            x: [E, ..., C, D].
            is_valid: [E, ..., C], False where a slot is empty.
            position: [E, ..., C], original position of each token in its sequence.
            is_training: apply dropout; needs the rng "dropout".

        Returns:
            Outputs [E, ..., C, O] and confidences [E, ..., C].

        Raises:
            ValueError: the leading axis is not E.
        """
        if x.shape[0] != self.num_experts:
            raise ValueError(
                f"x must have a leading axis of num_experts={self.num_experts}, got {x.shape}"
            )

        def run(
            expert: nn.Module,
            x: Float[Array, "*B C D"],
            is_valid: Bool[Array, "*B C"],
            position: Int[Array, "*B C"],
        ) -> ExpertOutput:
            return expert(x, is_valid, position, is_training)

        if self.remat != "none":
            policy = None
            if self.remat == "dots":
                policy = jax.checkpoint_policies.dots_saveable
            run = nn.remat(run, policy=policy)
        stacked = nn.vmap(
            run,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=self.num_experts,
        )
        return stacked(self.expert, x, is_valid, position)
