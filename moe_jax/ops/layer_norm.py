"""Layer normalisation."""

import functools

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Dtype, Float

__all__ = ["EPS", "layer_norm", "moments", "pull_back"]

EPS = 1e-5


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
    x: Float[Array, "*B D"],
    scale: Float[Array, "*#B D"],
    bias: Float[Array, "*#B D"],
    dtype: Dtype,
) -> Float[Array, "*B D"]:
    """Normalises the last axis, with statistics in float32 (Ba et al. 2016, equation 4).

    Args:
        x: [..., D].
        scale: [..., D], with as many axes as `x`, each of its size or 1.
        bias: like `scale`.
        dtype: of the result.

    Returns:
        [..., D].

    Example:
        >>> import jax.numpy as jnp
        >>> one = jnp.ones((1, 2))
        >>> layer_norm(jnp.array([[1.0, 3.0]]), one, one, jnp.float32).round(3).tolist()
        [[0.0, 2.0]]
    """
    return _forward(x, scale, bias, dtype)[0]


def _forward(x, scale, bias, dtype):
    mean, inverse = moments(x)
    out = (x.astype(jnp.float32) - mean) * (inverse * scale) + bias
    return out.astype(dtype), (x, scale, bias, mean, inverse)


def _backward(dtype, residuals, grad):
    del dtype
    # With the moments at hand everything but two sums along a row is elementwise, so that what
    # sums the gradients of scale and bias over rows fuses with what makes them.
    x, scale, bias, mean, inverse = residuals
    mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    grad = grad.astype(jnp.float32)
    unit = (x.astype(jnp.float32) - mean) * inverse
    grad_x = pull_back(unit, inverse, grad * scale)
    return grad_x.astype(x.dtype), _unbroadcast(grad * unit, scale), _unbroadcast(grad, bias)


layer_norm.defvjp(_forward, _backward)


def moments(x: Float[Array, "*B D"]) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"]]:
    """Mean and inverse standard deviation along the last axis, float32."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(variance + EPS)


def pull_back(
    unit: Float[Array, "*B D"], inverse: Float[Array, "*B 1"], grad: Float[Array, "*B D"]
) -> Float[Array, "*B D"]:
    """The gradient of what was normalised, from that of `unit`, the result before its scale."""
    along = jnp.mean(grad * unit, axis=-1, keepdims=True)
    return inverse * (grad - jnp.mean(grad, axis=-1, keepdims=True) - unit * along)


def _unbroadcast(grad: Float[Array, "*B D"], like: Float[Array, "*#B D"]) -> Float[Array, "*#B D"]:
    """Sums a gradient over the axes along which `like` was repeated."""
    repeated = tuple(i for i, size in enumerate(like.shape[:-1]) if size != grad.shape[i])
    return jnp.sum(grad, axis=repeated, keepdims=True).astype(like.dtype)
