"""Who gets which of too few places: the parts of filling cells that need no graph."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops.first_true import first_true
from moe_jax.ops.spherical_kmeans import nearest_centroids

__all__ = ["once", "seat", "turns"]

# At most so many rows look for a cell at once, and fewer of few, since few of those are left.
_SEEKERS = 4096


def seat(
    keys: Float[Array, "R D"],
    is_waiting: Bool[Array, "R"],
    choices: Int[Array, "R c"],
    fit: Float[Array, "R c"],
    centroids: Float[Array, "L D"],
    room: Int[Array, "L"],
    is_spare: Bool[Array, "V"],
) -> tuple[Int[Array, "R"], Int[Array, "R"], Int[Array, "R"], Float[Array, "L D"]]:
    """Give rows a cell of their choice, else a spare place, else any cell with room.

    Args:
      keys: [R, D].
      is_waiting: bool [R], who wants a place.
      choices: int32 [R, c], cells in order of preference, L for none, and for who does not wait.
      fit: [R, c], cosines with them.
      centroids: float32 [L, D], zero for unused cells.
      room: int32 [L], free places of the cells.
      is_spare: bool [V], which places of the overflow list are free.

    Returns:
      (int32 [R] cells, L where there is none; the row's turn among those that came into it;
      its place in the overflow list, V if none; the centroids after).
    """
    nowhere = is_spare.shape[0]
    cell, turn = bid(choices, fit, room)
    is_left = is_waiting & (cell == room.shape[0])
    free = first_true(is_spare, nowhere)
    spare = free.at[jnp.maximum(jnp.cumsum(is_left, dtype=jnp.int32) - 1, 0)]
    spare = jnp.where(is_left, spare.get(mode="fill", fill_value=nowhere), nowhere)
    is_left &= spare == nowhere
    cell, turn, centroids = seek(keys, is_left, cell, turn, centroids, room, choices.shape[1])
    return cell, turn, spare, centroids


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


def seek(
    keys: Float[Array, "R D"],
    is_left: Bool[Array, "R"],
    cell: Int[Array, "R"],
    turn: Int[Array, "R"],
    centroids: Float[Array, "L D"],
    room: Int[Array, "L"],
    tries: int,
) -> tuple[Int[Array, "R"], Int[Array, "R"], Float[Array, "L D"]]:
    """Give the rows that are left a cell, however far, until nobody is left or nothing is free.

    A chunk of them at a time bids for its `tries` nearest cells among those that have room. Who
    gets none opens an unused cell if there is one: its key becomes the centroid, so that those
    like it follow. No round runs where no row is left.

    Args:
      keys: [R, D].
      is_left: bool [R], who looks for a cell.
      cell: int32 [R], cells that rows have, as from `bid`; L where there is none.
      turn: int32 [R], their turns.
      centroids: float32 [L, D], zero for unused cells.
      room: int32 [L], before those of `cell` came.
      tries: how many cells a row bids for in one round.

    Returns:
      (cell, turn and centroids after).
    """
    rows, num_cells = keys.shape[0], room.shape[0]
    at_once = min(rows, _SEEKERS, max(64, rows // 64))

    def one(state: tuple[Array, ...]) -> tuple[Array, ...]:
        cell, turn, used, centroids, is_left, _ = state
        row = first_true(is_left, at_once)
        key = keys[jnp.minimum(row, rows - 1)]
        has_room, is_used = used < room, jnp.any(centroids != 0.0, axis=1)
        near, fit = nearest_centroids(key, jnp.where(has_room[:, None], centroids, 0.0), tries)
        unused = first_true(has_room & ~is_used, row.shape[0])
        wanted = jnp.concatenate([near, unused[:, None]], axis=1)
        wanted = jnp.where(row[:, None] < rows, wanted, num_cells)
        got, place = bid(wanted, jnp.pad(fit, ((0, 0), (0, 1))), room - used)
        opened = jnp.where(got == unused, got, num_cells)
        return (
            cell.at[row].set(got, mode="drop"),
            turn.at[row].set(place + used.at[got].get(mode="fill", fill_value=0), mode="drop"),
            used.at[got].add(1, mode="drop"),
            centroids.at[opened].set(key, mode="drop"),
            is_left.at[row].set(got == num_cells, mode="drop"),
            jnp.any(got < num_cells),
        )

    used = jnp.zeros_like(room).at[cell].add(1, mode="drop")
    state = (cell, turn, used, centroids, is_left, jnp.bool_(True))
    # Each round places a row or is the last one, so there are at most R + 1.
    cell, turn, _, centroids, _, _ = jax.lax.while_loop(
        lambda state: jnp.any(state[4]) & state[5], one, state
    )
    return cell, turn, centroids


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
