"""The leader rule, taken one item at a time, solved for all items in a few rounds."""

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool


@jax.jit  # or a caller that is not compiled itself would compile the loop in each call
def first_independent(is_near: Bool[Array, "R R"], may_lead: Bool[Array, "R"]) -> Bool[Array, "R"]:
    """The lexicographically first maximal independent set, in rounds.

    In a round, every undecided item without an undecided or leading predecessor leads, and every
    item with a leading predecessor is out. The first undecided item is decided in each round, so
    R rounds are enough; random items need about log R (Blelloch et al. 2012).

    Args:
        is_near: [R, R]; [i, j] says that j comes before i and is near it.
        may_lead: [R], the items that take part.

    Returns:
        [R] bool, the items that lead.

    Example:
        >>> import jax.numpy as jnp
        >>> chain = jnp.array([[False] * 3, [True, False, False], [False, True, False]])
        >>> first_independent(chain, jnp.ones(3, bool))
        Array([ True, False,  True], dtype=bool)
    """

    def is_unfinished(state: tuple[Array, Array, Array]) -> Array:
        count, is_open, _ = state
        return jnp.any(is_open) & (count < may_lead.shape[0])

    def decide(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, is_open, leads = state
        leads = leads | (is_open & ~jnp.any(is_near & (is_open | leads)[None, :], axis=1))
        is_out = jnp.any(is_near & leads[None, :], axis=1)
        return count + 1, is_open & ~leads & ~is_out, leads

    # Nothing is decided without a first round; outside the loop, a GPU's host has one condition
    # less to wait for.
    after = decide((jnp.int32(0), may_lead, jnp.zeros_like(may_lead)))
    return jax.lax.while_loop(is_unfinished, decide, after)[2]
