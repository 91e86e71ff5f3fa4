"""Experts' matrices in 8 bits for inference: stored small, multiplied out where they are read."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._matrices import is_expert_matrix
from moe_jax._types import Array, Float, Variables

__all__ = ["WithInputs", "dequantize", "product", "quantize"]

# By default qwix lets the last step reach 127.5, and no largest weight would come back as it was.
_HOW = {"int8": (jnp.int8, f"absmax,{127.5 / 127}"), "float8": (jnp.float8_e4m3fn, "absmax")}


class WithInputs(NamedTuple):
    """A quantised matrix whose inputs are to be quantised as well.

    Attributes:
        matrix: `qwix.QArray`.
    """

    matrix: Any


def quantize(variables: Variables, dtype: str, *, inputs: bool = False) -> Variables:
    """Quantises the experts' matrices, which then take a quarter of the memory.

    Each matrix [E, I, J] becomes 8-bit values and one float32 scale per expert and output
    channel, which maps the largest weight of that column to the largest value (Jacob et al. 2018,
    "Quantization and training of neural networks for integer-arithmetic-only inference",
    equation 1, with zero point 0). No weight is off by more than 1/254 of the column's largest for
    "int8"; for "float8" by more than 1/16 of itself, or, where it is tiny, 3e-6 of the largest.
    Everything else stays as it is: biases, norms, confidence, routers, and what is no expert's.

    The result goes wherever `variables` went: `apply` and what is built on it, jitted or not,
    under either dispatch, and checkpoints. It is for inference: 8-bit values have no gradient.
    The arithmetic is that of the experts' compute dtype, unless `inputs` are quantised too.
    Experts of your own must be made of `moe_jax.experts.base.Dense`.

    Args:
        variables: of a system, of a language model or of an `ExpertBank`, or only their
            parameters.
        dtype: "int8", or "float8", whose values are float8_e4m3fn.
        inputs: quantise what the matrices are multiplied by too, each token with a scale of its
            own when it comes. Buffers are then multiplied in 8 bits and summed in 32, by what the
            device has for it. Rows (`dispatch="dropless"`), and the sub-specialists of
            `SpecializedExpert`, are rounded alike and multiplied in the compute dtype.

    Returns:
        The same tree, with a `qwix.QArray` for each of the experts' matrices, inside a
        `WithInputs` if `inputs`.

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
        raise ValueError(f"dtype must be one of {list(_HOW)}, got {dtype!r}")
    if any(map(_is_quantized, jax.tree.leaves(variables, is_leaf=_is_quantized))):
        raise ValueError("variables must not be quantised already")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    if not any(map(is_expert_matrix, paths)):
        raise ValueError("variables must hold the matrices of experts, and there are none")

    def convert(path: Any, leaf: Any) -> Any:
        if not is_expert_matrix(path):
            return leaf
        matrix = _quantized(leaf, dtype, along=1)
        return WithInputs(matrix) if inputs else matrix

    return jax.tree_util.tree_map_with_path(convert, variables)


def dequantize(x: Float[Array, "*B I"], kernel: Any) -> tuple[Float[Array, "*B I"], Any]:
    """What a matmul of the usual kind takes in place of a quantised one.

    Args:
        x: [..., I].
        kernel: [I, ...], quantised or not.

    Returns:
        x, rounded to 8 bits if the kernel says so; and the matrix, float32 if it was quantised.

    Example:
        >>> import jax.numpy as jnp
        >>> [a.shape for a in dequantize(jnp.ones((5, 2)), jnp.ones((2, 3)))]
        [(5, 2), (2, 3)]
    """
    if isinstance(kernel, WithInputs):
        kernel = kernel.matrix
        x = _import_qwix().dequantize(_quantized_like(x, kernel)).astype(x.dtype)
    if _is_quantized(kernel):
        kernel = _import_qwix().dequantize(kernel)
    return x, kernel


def product(x: Float[Array, "*B I"], kernel: WithInputs) -> Float[Array, "*B J"]:
    """Quantises x, multiplies 8 bits by 8 bits, and scales the sums.

    Args:
        x: [..., I].
        kernel: [I, J].

    Returns:
        [..., J] float32.
    """
    contracted = (((x.ndim - 1,), (0,)), ((), ()))
    x = _quantized_like(x, kernel.matrix)
    return _import_qwix().dot_general(x, kernel.matrix, contracted)


def _quantized_like(x: Float[Array, "*B I"], matrix: Any) -> Any:
    name = next(name for name, (qtype, _) in _HOW.items() if matrix.qvalue.dtype == qtype)
    return _quantized(x, name, along=x.ndim - 1)


def _quantized(a: Float[Array, "..."], dtype: str, along: int) -> Any:
    """A `qwix.QArray`, each scale being that of the values along one axis."""
    qtype, calibration = _HOW[dtype]
    return _import_qwix().quantize(
        jnp.asarray(a, jnp.float32),  # the scales get this dtype
        qtype,
        channelwise_axes=[axis for axis in range(a.ndim) if axis != along],
        calibration_method=calibration,
    )


def _is_quantized(leaf: Any) -> bool:
    # Asked of every matrix, quantised or not, so qwix need not be there.
    return hasattr(leaf, "qvalue")


def _import_qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("qwix is not installed: pip install 'moe-jax[quantize]'") from error
    return qwix
