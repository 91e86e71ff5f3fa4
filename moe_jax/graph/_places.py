"""Who gets which of too few places: the parts of filling cells that need no graph."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float, Int

__all__ = ["bid", "once", "turns"]


def bid(
    choices: Int[Array, "R c"], fit: Float[Array, "R c"], room: Int[Array, "L"]
) -> tuple[Int[Array, "R"], Int[Array, "R"]]:
    """Give each row a cell with room: all try their first choice, who found none the second, ...

    Returns the cell, L where there is none, and the row's turn among those that came into it.
    """
    num_cells = room.shape[0]
    used = jnp.zeros_like(room)
    found = jnp.full(choices.shape[0], num_cells, jnp.int32)
    turn = jnp.zeros_like(found)
    for i in range(choices.shape[1]):
        wanted = jnp.where(found == num_cells, choices[:, i], num_cells)
        own = turns(wanted, fit[:, i]) + used.at[wanted].get(mode="fill", fill_value=0)
        gets = own < room.at[wanted].get(mode="fill", fill_value=0)
        found, turn = jnp.where(gets, wanted, found), jnp.where(gets, own, turn)
        used = used.at[jnp.where(gets, wanted, num_cells)].add(1, mode="drop")
    return found, turn


def turns(cell: Int[Array, "R"], fit: Float[Array, "R"]) -> Int[Array, "R"]:
    """How many rows of the same cell fit it better, or as well and come earlier."""
    position = jnp.arange(cell.shape[0], dtype=jnp.int32)
    ordered, _, row = jax.lax.sort((cell, -fit, position), num_keys=2, is_stable=True)
    is_first = ordered != jnp.roll(ordered, 1)
    first = jax.lax.cummax(jnp.where(is_first, position, 0))
    return jnp.zeros_like(position).at[row].set(position - first)


def once(node_id: Int[Array, "R"], nodes: int) -> Int[Array, "R"]:
    """The ids in ascending order, N for those out of range and for copies."""
    node_id = jnp.sort(jnp.where((node_id >= 0) & (node_id < nodes), node_id, nodes))
    is_copy = jnp.concatenate([jnp.zeros(1, bool), node_id[1:] == node_id[:-1]])
    return jnp.where(is_copy[: node_id.shape[0]], nodes, node_id)
