"""Experts' matrices in 8 bits for inference: stored small, multiplied out where they are read."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float, Variables

__all__ = ["dequantize", "quantize"]

Name = Literal["int8", "float8"]

# By default qwix lets the last step reach 127.5, and no largest weight would come back as it was.
_HOW = {"int8": (jnp.int8, f"absmax,{127.5 / 127}"), "float8": (jnp.float8_e4m3fn, "absmax")}

# Small, inside an expert, and decisive: its confidence and its own router.
_KEPT = ("confidence", "specialist_router")


def quantize(variables: Variables, dtype: str) -> Variables:
    """Quantises the experts' matrices, which then take a quarter of the memory.

    Each matrix [E, I, J] becomes 8-bit values and one float32 scale per expert and output
    channel, which maps the largest weight of that column to the largest value (Jacob et al. 2018,
    "Quantization and training of neural networks for integer-arithmetic-only inference",
    equation 1, with zero point 0). No weight is off by more than 1/254 of the column's largest for
    "int8"; for "float8" by more than 1/16 of itself, or, where it is tiny, 3e-6 of the largest.
    Everything else stays as it is: biases, norms, confidence, routers, and what is no expert's.

    The result goes wherever `variables` went: `apply` and what is built on it, jitted or not,
    under either dispatch, and checkpoints. It is for inference: the arithmetic is that of
    the experts' compute dtype, and 8-bit values have no gradient. Experts of your own must be
    made of `moe_jax.experts.base.Dense`.

    Args:
        variables: of a system, of a language model or of an `ExpertBank`, or only their
            parameters.
        dtype: "int8", or "float8", whose values are float8_e4m3fn.

    Returns:
        The same tree, with a `qwix.QArray` for each of the experts' matrices.

    Raises:
        ValueError: the name is unknown, or the tree is quantised already or has no expert.
        ImportError: qwix is not installed.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax import MoESystem
        >>> from moe_jax.config import tiny
        >>> system, x = MoESystem(tiny()), jnp.ones((2, 16, 32))
        >>> variables = jax.jit(system.init)(jax.random.key(0), x)
        >>> quantized = quantize(variables, "int8")
        >>> up = quantized["params"]["constellation"]["bank"]["expert"]["feed_forward_up"]
        >>> up["kernel"].qvalue.dtype.name, up["kernel"].qvalue.shape, up["kernel"].scale.shape
        ('int8', (4, 64, 256), (4, 1, 256))
        >>> out = jax.jit(system.apply)(quantized, x).output
        >>> exact = jax.jit(system.apply)(variables, x).output
        >>> bool(jnp.linalg.norm(out - exact) < 0.02 * jnp.linalg.norm(exact))
        True
    """
    if dtype not in _HOW:
        raise ValueError(f"dtype must be one of {list(get_args(Name))}, got {dtype!r}")
    if any(map(_is_quantized, jax.tree.leaves(variables, is_leaf=_is_quantized))):
        raise ValueError("variables must not be quantised already")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    if not any(map(_is_matrix, paths)):
        raise ValueError("variables must hold the matrices of experts, and there are none")

    def convert(path: Any, leaf: Any) -> Any:
        return _quantized(leaf, dtype) if _is_matrix(path) else leaf

    return jax.tree_util.tree_map_with_path(convert, variables)


def dequantize(kernel: Any) -> Float[Array, "*J"]:
    """Multiplies a quantised matrix out.

    Args:
        kernel: a `qwix.QArray` of any shape, or an array, which is given back as it is.

    Returns:
        The values times their scales, float32.

    Example:
        >>> import jax.numpy as jnp
        >>> dequantize(jnp.ones(2)).tolist()
        [1.0, 1.0]
    """
    return _import_qwix().dequantize(kernel) if _is_quantized(kernel) else kernel


def _quantized(matrix: Float[Array, "E I *J"], dtype: str) -> Any:
    qtype, calibration = _HOW[dtype]
    return _import_qwix().quantize(
        jnp.asarray(matrix, jnp.float32),  # the scales get this dtype
        qtype,
        channelwise_axes=[axis for axis in range(matrix.ndim) if axis != 1],
        calibration_method=calibration,
    )


def _is_quantized(leaf: Any) -> bool:
    # Asked of every matrix, quantised or not, so qwix need not be there.
    return hasattr(leaf, "qvalue")


def _is_matrix(path: Any) -> bool:
    """Whether a path leads to a matrix that an expert multiplies its tokens by."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    if names[-1] != "kernel" or "expert" not in names:
        return False
    return not any(name in _KEPT for name in names[names.index("expert") :])


def _import_qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("qwix is not installed: pip install 'moe-jax[quantize]'") from error
    return qwix
