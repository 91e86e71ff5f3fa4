"""Which parameters are the matrices of experts: nearly all there are."""

import jax

# Small, inside an expert, and computed in float32: its confidence and its own router.
_FLOAT32 = {"confidence", "specialist_router"}


def is_expert_matrix(path: tuple) -> bool:
    """Whether a path leads to a matrix that an expert multiplies its tokens by.

    Args:
        path: of a leaf of a tree of parameters, as `jax.tree_util` gives it.

    Returns:
        True for a kernel inside an expert, but those of its float32 heads.
    """
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if names[-1] != "kernel" or "expert" not in names:
        return False
    return _FLOAT32.isdisjoint(names[names.index("expert") :])
