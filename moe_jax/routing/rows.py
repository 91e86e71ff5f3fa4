"""Dropless dispatch: every choice gets a row, and the rows of an expert lie together."""

from typing import NamedTuple

import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.grouped import Groups, make_groups
from moe_jax.routing.dispatch import DispatchIndex, combine, dispatch

# Choices whose ranks are found by comparing all pairs; only the chunks are then summed up in order.
_CHUNK = 128


class RowIndex(NamedTuple):
    """The pairing of choices and rows, and the experts' groups of rows.

    An expert's rows are in order of token, then of choice; R is fixed by the shapes.

    Attributes:
        groups: the layout of the rows; group e is expert e's.
        choice_of_row: [R] int32, t * K + k of the choice in a row; T * K in padding.
        row_of_choice: [T, K] int32; R where the token is padding.
    """

    groups: Groups
    choice_of_row: Int[Array, "R"]
    row_of_choice: Int[Array, "T K"]

    @property
    def token_of_row(self) -> Int[Array, "R"]:
        """[R] int32, the token in a row; T in padding."""
        return self.choice_of_row // self.row_of_choice.shape[1]


def row_index(
    expert: Int[Array, "T K"], num_experts: int, is_valid: Bool[Array, "T"] | None = None
) -> RowIndex:
    """Gives a row to every choice of every token that is not padding: none is dropped.

    Args:
        expert: [T, K] int32 expert ids of each token, all different.
        num_experts: E.
        is_valid: [T], False for padding, which takes no row.

    Returns:
        The pairing.

    Example:
        >>> import jax.numpy as jnp
        >>> index = row_index(jnp.array([[1], [0], [1]]), num_experts=2)
        >>> index.row_of_choice[:, 0].tolist(), index.groups.size.tolist()
        ([64, 0, 65], [1, 2])
    """
    num_tokens, num_choices = expert.shape
    if is_valid is not None:
        expert = jnp.where(is_valid[:, None], expert, num_experts)
    flat = expert.reshape(-1)
    rank, size = _ranks(flat, num_experts)
    groups = make_groups(size, flat.shape[0])
    row = jnp.append(groups.start, 0)[flat] + rank
    row = jnp.where(flat < num_experts, row, groups.num_rows)
    choice = jnp.arange(flat.shape[0], dtype=jnp.int32)
    nothing = jnp.full((groups.num_rows,), flat.shape[0], jnp.int32)
    return RowIndex(
        groups=groups,
        choice_of_row=nothing.at[row].set(choice, mode="drop"),
        row_of_choice=row.reshape(num_tokens, num_choices).astype(jnp.int32),
    )


def dispatch_rows(x: Float[Array, "T D"], index: RowIndex) -> Float[Array, "R D"]:
    """Gathers each row's token; its gradient is a gather, too.

    Args:
        x: [T, D] tokens.
        index: the pairing, from `row_index`.

    Returns:
        [R, D]; zero in padding.

    Example:
        >>> import jax.numpy as jnp
        >>> index = row_index(jnp.array([[1], [0]]), num_experts=2)
        >>> dispatch_rows(jnp.array([[5.0], [7.0]]), index)[jnp.array([0, 1, 64]), 0].tolist()
        [7.0, 0.0, 5.0]
    """
    return dispatch(x[None], _as_slots(index)).x[0, 0]


def combine_rows(
    outputs: Float[Array, "R O"], weight: Float[Array, "T K"], index: RowIndex
) -> Float[Array, "T O"]:
    """Sums each token's rows, weighted; a token that is padding gets zero.

    Args:
        outputs: [R, O], what the experts made of their rows.
        weight: [T, K] float32.
        index: the pairing.

    Returns:
        [T, O] in the outputs' dtype; the sum itself is taken in float32.

    Example:
        >>> import jax.numpy as jnp
        >>> index = row_index(jnp.array([[1, 0]]), num_experts=2)
        >>> rows = dispatch_rows(jnp.array([[3.0]]), index)
        >>> combine_rows(rows, jnp.array([[0.5, 0.25]]), index).tolist()
        [[2.25]]
    """
    return combine(outputs[None, None], weight[None], _as_slots(index))[0]


def _as_slots(index: RowIndex) -> DispatchIndex:
    """The rows as the slots of a single buffer of a single group."""
    return DispatchIndex(
        choice_of_slot=index.choice_of_row[None, None], slot_of_choice=index.row_of_choice[None]
    )


def _ranks(expert: Int[Array, "I"], num_experts: int) -> tuple[Int[Array, "I"], Int[Array, "E"]]:
    """How many earlier choices went to the same expert, and how many went to each in all."""
    num_choices = expert.shape[0]
    expert = jnp.pad(expert, (0, -num_choices % _CHUNK), constant_values=num_experts)
    chunk = expert.reshape(-1, _CHUNK)
    is_earlier = jnp.tril(jnp.ones((_CHUNK, _CHUNK), bool), -1)[None]
    is_same = chunk[:, :, None] == chunk[:, None, :]
    within = jnp.sum(is_same & is_earlier, axis=2, dtype=jnp.int32)
    is_of = chunk[:, :, None] == jnp.arange(num_experts)[None, None]
    count = jnp.sum(is_of, axis=1, dtype=jnp.int32)
    until = jnp.cumsum(count, axis=0)
    before = jnp.pad(until - count, ((0, 0), (0, 1)))
    rank = within + jnp.take_along_axis(before, chunk, axis=1)
    return rank.reshape(-1)[:num_choices], until[-1]
