"""16-bit copies of the experts' matrices, kept from one step to the next.

Mixed precision keeps float32 parameters and multiplies in 16 bits. Cast in the forward pass, each
matrix is read and written once more than need be; the optimizer's update, which has just made its
new value, writes a copy almost for free.
"""

import jax

from moe_jax._matrices import is_expert_matrix
from moe_jax._types import Array, Dtype, Variables

__all__ = ["matrix_copies", "with_copies"]


def matrix_copies(params: Variables, dtype: Dtype) -> dict[str, Array]:
    """Casts the experts' matrices, which are nearly all of a model's parameters.

    Args:
        params: of a system or a language model.
        dtype: that its experts compute in.

    Returns:
        The copies by the parameter's path; none if the parameters have that dtype already.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"expert": {"up": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones(4)}}}
        >>> {path: copy.dtype for path, copy in matrix_copies(params, jnp.bfloat16).items()}
        {"['expert']['up']['kernel']": dtype(bfloat16)}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        jax.tree_util.keystr(path): leaf.astype(dtype)
        for path, leaf in leaves
        if is_expert_matrix(path) and leaf.dtype != dtype
    }


def with_copies(params: Variables, copies: dict[str, Array]) -> Variables:
    """The parameters with copies in the place of what they were made of.

    Args:
        params: as `matrix_copies` takes them.
        copies: from `matrix_copies`.

    Returns:
        A tree of the same structure.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"expert": {"kernel": jnp.ones((2, 3, 4))}, "table": jnp.ones(2)}
        >>> both = with_copies(params, matrix_copies(params, jnp.bfloat16))
        >>> both["expert"]["kernel"].dtype, both["table"].dtype
        (dtype(bfloat16), dtype('float32'))
    """

    def own(path: tuple, leaf: Array) -> Array:
        return copies.get(jax.tree_util.keystr(path), leaf)

    return jax.tree_util.tree_map_with_path(own, params)
