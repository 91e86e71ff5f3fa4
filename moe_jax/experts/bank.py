"""E experts of one kind, stacked so that XLA sees one batched matmul per layer."""

import inspect
from typing import Literal

import flax.linen as nn
import jax

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.experts.base import ExpertOutput
from moe_jax.experts.by_row import Rows
from moe_jax.ops.grouped import SUMS


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
        x: Float[Array, "*E C D"],
        is_valid: Bool[Array, "*E C"],
        position: Int[Array, "*E C"],
        is_training: bool = False,
        rows: Rows | None = None,
    ) -> ExpertOutput:
        """Runs expert e on x[e], or on the rows of group e.

        Args:
            x: [E, ..., C, D]; [R, D] with `rows`.
            is_valid: [E, ..., C] or [R], False where a slot is empty or a row is padding.
            position: [E, ..., C] or [R], original position of each token in its sequence.
            is_training: apply dropout; needs the rng "dropout".
            rows: whose each of R rows is; None for buffers.

        Returns:
            Outputs [E, ..., C, O] and confidences [E, ..., C]; or [R, O] and [R], of which
            padding must not be used.

        Raises:
            ValueError: remat is unknown, there are not E buffers or groups, or the experts cannot
                run on rows.
        """
        self._check(x, rows)

        def run(
            expert: nn.Module,
            x: Float[Array, "*B C D"],
            is_valid: Bool[Array, "*B C"],
            position: Int[Array, "*B C"],
        ) -> ExpertOutput:
            if rows is None:
                return expert(x, is_valid, position, is_training)
            return expert(x, is_valid, position, is_training, rows=rows)

        if self.remat != "none":
            policy = None
            if self.remat == "dots":
                policies = jax.checkpoint_policies
                policy = policies.save_from_both_policies(
                    policies.dots_saveable, policies.save_only_these_names(SUMS)
                )
            run = nn.remat(run, policy=policy)
        stacked = nn.vmap(
            run,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": rows is None},
            axis_size=self.num_experts,
            # Rows are all experts' own already: only the parameters are mapped.
            in_axes=0 if rows is None else None,
            out_axes=0 if rows is None else None,
        )
        return stacked(self.expert, x, is_valid, position)

    def _check(self, x: Float[Array, "*E C D"], rows: Rows | None) -> None:
        if self.remat not in ("none", "dots", "full"):
            raise ValueError(f'remat must be "none", "dots" or "full", got {self.remat!r}')
        if rows is None:
            if x.shape[0] != self.num_experts:
                raise ValueError(
                    f"x must have a leading axis of num_experts={self.num_experts}, got {x.shape}"
                )
            return
        if rows.groups.num_groups != self.num_experts:
            raise ValueError(
                f"rows must have num_experts={self.num_experts} groups, "
                f"got {rows.groups.num_groups}"
            )
        kind = type(self.expert)
        if "rows" not in inspect.signature(kind.__call__).parameters:
            raise ValueError(f"expert must take rows, which {kind.__name__} does not")
