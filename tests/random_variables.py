"""Random parameters for a module, without compiling its initialisation."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(init, *arguments, seed=0):
    """Variables of the shapes that `init` gives, none of them zero, gates and biases included."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        scale = leaf.shape[-2] ** -0.5 if "kernel" in str(path[-1]) else 0.3
        return jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)

    shapes = jax.eval_shape(init, jax.random.key(0), *arguments)
    return jax.tree_util.tree_map_with_path(fill, shapes)
