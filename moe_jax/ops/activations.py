"""Activations by name, the same in XLA and in kernels."""

import functools
import math

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Float

__all__ = ["ACTIVATIONS", "activate", "gelu_tanh", "gelu_tanh_slope", "pull_back", "sigmoid"]

_SCALE, _CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)) by two special functions of a GPU, where a division takes many more.

    Args:
        x: float32.

    Returns:
        Like `x`.
    """
    root = jax.lax.rsqrt(1 + jax.lax.exp2(x * -math.log2(math.e)))
    return root * root


def gelu_tanh(x: Array) -> Array:
    """The tanh form of GELU, 0.5 x (1 + tanh(u)), as x sigmoid(2 u), which takes less.

    Hendrycks and Gimpel (2016), section 2.

    Args:
        x: float32.

    Returns:
        Like `x`.
    """
    return x * sigmoid(_SCALE * x * (1 + _CUBIC * x * x))


def gelu_tanh_slope(x: Array) -> Array:
    """The derivative of `gelu_tanh`.

    Args:
        x: float32.

    Returns:
        Like `x`.
    """
    square = x * x
    share = sigmoid(_SCALE * x * (1 + _CUBIC * square))
    return share + _SCALE * x * share * (1 - share) * (1 + 3 * _CUBIC * square)


def activate(x: Float[Array, "*B J"], activation: str | None) -> Float[Array, "*B _"]:
    """Applies an activation by its name.

    Args:
        x: [..., J].
        activation: "gelu", "gelu_tanh", "swiglu" (gates first), or None for none.

    Returns:
        [..., J], or half as wide for "swiglu". For the gradient nothing but `x` is kept.
    """
    return _activate(x, activation) if activation else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _activate(x: Float[Array, "*B J"], activation: str) -> Float[Array, "*B _"]:
    return ACTIVATIONS[activation](x)


def _forward(x, activation):
    return ACTIVATIONS[activation](x), x


def pull_back(
    x: Float[Array, "*B J"], grad: Float[Array, "*B _"], activation: str
) -> Float[Array, "*B J"]:
    """The gradient of `x`, from that of `activate(x, activation)`.

    Args:
        x: [..., J].
        grad: [..., J], or half as wide for "swiglu".
        activation: as `activate` takes it, but not None.

    Returns:
        [..., J].
    """
    # Held apart, or the compiler would rather store what both passes compute.
    x = jax.lax.optimization_barrier(x)
    if activation == "gelu_tanh":
        return (grad * gelu_tanh_slope(_wide(x))).astype(x.dtype)
    return jax.vjp(ACTIVATIONS[activation], x)[1](grad)[0]


_activate.defvjp(_forward, lambda activation, x, grad: (pull_back(x, grad, activation),))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _swiglu(x: Float[Array, "*B J"]) -> Float[Array, "*B H"]:
    """silu(gate) * up, of which x holds first all gates (Shazeer 2020, equation 5)."""
    gate, up = jnp.split(_wide(x), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(x.dtype)


ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": lambda x: gelu_tanh(_wide(x)).astype(x.dtype),
    "swiglu": _swiglu,
}
