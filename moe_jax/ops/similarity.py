"""Cosine similarity whose value does not depend on how it is computed.

A decision such as "at or above 0.95" must come out the same whether an item is scored alone, in
a batch of a thousand, on a CPU or on a GPU. Ordinary float32 matmuls cannot promise that: the
order of their additions changes with the shape and the hardware. Here every unit vector is split
into three short integers per coordinate (an error-free splitting, after Ozaki, Ogita, Oishi and
Rump, "Error-free transformations of matrix multiplication", 2012). All products and all partial
sums are then integers of at most 2**24, which float32 holds exactly, so the sums are exact in
*any* order and there is no order to fix. The integers have at most nine bits, so reduced-precision
matrix units (TF32, bfloat16) multiply them exactly too.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Float, Int
from moe_jax.ops.blocks import in_blocks

__all__ = [
    "MAX_DIM",
    "dot_rows",
    "exact_cosine",
    "exact_cosine_at",
    "exact_cosine_pairs",
    "limbs",
    "normalize",
]

MAX_DIM = 16384
"""The widest vector that `normalize` takes: wider ones could overflow its integer sums."""

# So many coordinates keep every partial sum within 2**24; see `limbs`.
_BLOCK = 512

# On CPUs so many coordinates are taken at a time: they and their limbs stay in the cache, where
# whole arrays of them would cost more to store than all the arithmetic.
_AT_ONCE = 2**18

_HIGHEST = jax.lax.Precision.HIGHEST

Limbs = tuple[Float[Array, "*N D"], Float[Array, "*N D"], Float[Array, "*N D"]]
_Parts = tuple[Array, ...]


def limbs(x: Float[Array, "*N D"]) -> Limbs:
    """Split numbers in [-1, 1] into three integers: x = a0/2^8 + a1/2^16 + a2/2^24 + rest.

    The rest is at most 2**-25. |a0| <= 256 and |a1|, |a2| <= 128. Every step is exact, because
    scaling by a power of two and subtracting the nearest integer are.

    For unit vectors of D coordinates, ||a0|| <= 256 + sqrt(D)/2 and ||a1||, ||a2|| <= 128 sqrt(D).
    By Cauchy-Schwarz each partial sum of a0.b2 + a1.b1 + a2.b0 is at most
    2 (256 + sqrt(D)/2) 128 sqrt(D) + 128^2 D, 9.9 million at D = 512, and each one of
    a1.b2 + a2.b1 at most 2 128^2 D, which is 2**24 at D = 512.

    Args:
      x: float32 [..., D], each entry in [-1, 1].

    Returns:
      (a0, a1, a2), each float32 [..., D] and holding integers.

    Example:
      >>> [float(a[0]) for a in limbs(jnp.array([0.3]))]
      [77.0, -51.0, -51.0]
    """
    scaled = x * 256.0
    a0 = jnp.round(scaled)
    scaled = (scaled - a0) * 256.0
    a1 = jnp.round(scaled)
    return a0, a1, jnp.round((scaled - a1) * 256.0)


@jax.jit
def normalize(x: ArrayLike) -> Float[Array, "*N D"]:
    """Scale vectors to unit length, with the same bits in every batch shape.

    The squares are summed as integers (of the limbs of the vector scaled by a power of two), so
    no rounding depends on the order of additions, and neither huge nor tiny entries overflow.
    Vectors without a direction (zero, subnormal, or with a NaN or an infinity) become zero.

    Args:
      x: [..., D], any float dtype, D at most `MAX_DIM`.

    Returns:
      float32 [..., D], unit vectors or zeros.

    Raises:
      ValueError: if x has no axis, or a last axis longer than `MAX_DIM`.

    Example:
      >>> normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
      [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    x = jnp.asarray(x, jnp.float32)
    if x.ndim == 0 or x.shape[-1] > MAX_DIM:
        raise ValueError(f"x must be [..., D] with D at most {MAX_DIM}, got shape {x.shape}")
    return _unit(x)


@jax.jit
def exact_cosine(a: Float[Array, "Q D"], b: Float[Array, "N D"]) -> Float[Array, "Q N"]:
    """Cosine of every row of a with every row of b, bit for bit reproducible.

    The value is within about 1e-7 of the true one (at worst sqrt(D) * 2**-24, when all the
    coordinates round the same way), and the same in every shape, order and matmul precision; see
    the top of this file.

    Args:
      a: float32 [Q, D], unit vectors as `normalize` returns them.
      b: float32 [N, D], likewise.

    Returns:
      float32 [Q, N].

    Example:
      >>> unit = normalize(jnp.eye(2))
      >>> exact_cosine(unit, unit).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    def matmul(left: list[Array], right: list[Array]) -> Array:
        left, right = jnp.concatenate(left, -1), jnp.concatenate(right, -1)
        return jax.lax.platform_dependent(
            left, right, cuda=_matmul_of_short_integers, default=dot_rows
        )

    return _by_blocks(a, b, _sums(matmul))


@jax.jit
def exact_cosine_pairs(a: Float[Array, "*N D"], b: Float[Array, "*N D"]) -> Float[Array, "*N"]:
    """Cosine of matching rows of a and b: equals the same entries of `exact_cosine`.

    Args:
      a: float32 [..., D], unit vectors as `normalize` returns them.
      b: float32 of the same shape.

    Returns:
      float32 [...].

    Example:
      >>> unit = normalize(jnp.eye(2))
      >>> exact_cosine_pairs(unit, unit).tolist()
      [1.0, 1.0]
    """
    score = functools.partial(_by_blocks, sums=_sums(_sum_of_products))
    if jax.default_backend() != "cpu":
        return score(a, b)
    lead, dim = a.shape[:-1], a.shape[-1]
    rows = tuple(x.reshape(math.prod(lead), dim) for x in (a, b))
    return in_blocks(score, rows, max(1, _AT_ONCE // max(1, dim))).reshape(lead)


@jax.jit
def exact_cosine_at(
    queries: Float[Array, "Q D"], keys: Float[Array, "N D"], rows: Int[Array, "Q F"]
) -> Float[Array, "Q F"]:
    """Cosine of each query with some of the keys: equals those entries of `exact_cosine`.

    Args:
      queries: float32 [Q, D], unit vectors as `normalize` returns them.
      keys: float32 [N, D], likewise.
      rows: int32 [Q, F], which keys, each below N.

    Returns:
      float32 [Q, F].

    Example:
      >>> unit = normalize(jnp.eye(2))
      >>> exact_cosine_at(unit, unit, jnp.array([[0], [0]])).tolist()
      [[1.0], [0.0]]
    """
    if jax.default_backend() != "cpu":
        chosen = keys[rows]
        queries = jnp.broadcast_to(queries[:, None, :], chosen.shape)
        return _by_blocks(queries, chosen, _sums(_sum_of_products))
    size = max(1, _AT_ONCE // max(1, rows.shape[1] * keys.shape[1]))
    return in_blocks(lambda q, at: _by_blocks(q, keys[at], _sums_at), (queries, rows), size)


def dot_rows(a: Float[Array, "Q D"], b: Float[Array, "N D"]) -> Float[Array, "Q N"]:
    """Dot product of every row of a with every row of b, in float32 on every device."""
    if a.shape[0] == 1 and jax.default_backend() == "cpu":
        # XLA may take one row times a matrix an entry at a time.
        return jnp.matmul(b, a[0], precision=_HIGHEST)[None]
    return jnp.matmul(a, b.T, precision=_HIGHEST)


@jax.custom_jvp
def _unit(x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
    return _unit_and_scale(x)[0]


@_unit.defjvp
def _unit_jvp(primals, tangents):
    """The derivative of x / |x|: rounding to limbs would lose the part along x."""
    unit, scale = _unit_and_scale(*primals)
    (change,) = tangents
    along = jnp.sum(unit * change, axis=-1, keepdims=True)
    return unit, scale * (change - along * unit)


def _unit_and_scale(x: Float[Array, "*N D"]) -> tuple[Float[Array, "*N D"], Float[Array, "*N 1"]]:
    """Returns x / |x| and 1 / |x|, both zero without a direction."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0.0)
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    has_direction = (exponent > 0) & (exponent < 255)
    # Two half steps, because 2**-127 and 2**127 times two are not normal float32 numbers.
    half = (126 - exponent) // 2
    first, second = _power_of_two(half), _power_of_two(126 - exponent - half)
    x = x * first * second
    x = jnp.where(has_direction, x, 0.0)
    a0, a1, a2 = (a.astype(jnp.int32) for a in limbs(x))
    squares = _join(
        _sum_last(a0 * a0),
        _sum_last(2 * a0 * a1),
        _sum_last(2 * a0 * a2 + a1 * a1),
        _sum_last(2 * a1 * a2),
    )
    # Compilers rewrite x / sqrt(s) and x / broadcast(y), each where the shape suits them: the
    # product and the maximum leave nothing to rewrite.
    inverse = 1.0 / jnp.maximum(jnp.sqrt(squares), 0.25)
    return x * inverse, jnp.where(has_direction, first * second * inverse, 0.0)


def _by_blocks(a: Array, b: Array, sums: Callable[[_Parts, _Parts], _Parts]) -> Array:
    """Add up the sums of products of limbs over blocks of coordinates, in a fixed order; join them.

    Args:
      a: [..., D].
      b: [..., D].
      sums: gives a0.b0, a0.b1 + a1.b0, a0.b2 + a1.b1 + a2.b0 and a1.b2 + a2.b1.
    """
    totals = None
    for start in range(0, max(a.shape[-1], 1), _BLOCK):
        part = sums(limbs(a[..., start : start + _BLOCK]), limbs(b[..., start : start + _BLOCK]))
        totals = part if totals is None else tuple(t + p for t, p in zip(totals, part, strict=True))
    cosine = _join(*totals)
    return jnp.where(cosine == 0.0, 0.0, cosine)  # no negative zero: it would sort below zero


def _sums(
    dot: Callable[[list[Array], list[Array]], Array],
) -> Callable[[_Parts, _Parts], _Parts]:
    """The sums that `_by_blocks` wants, by a function that adds up several dot products at once."""

    def sums(a: _Parts, b: _Parts) -> _Parts:
        (a0, a1, a2), (b0, b1, b2) = a, b
        return (
            dot([a0], [b0]),
            dot([a0, a1], [b1, b0]),
            dot([a0, a1, a2], [b2, b1, b0]),
            dot([a1, a2], [b2, b1]),
        )

    return sums


def _sums_at(a: _Parts, b: _Parts) -> _Parts:
    """The same for a of shape [Q, D] and b of shape [Q, F, D], by matrix products.

    XLA on CPUs adds up a plain reduction on one core, an entry at a time.
    """
    a = jnp.stack(a, axis=1)
    dots = [jnp.einsum("qfd,qid->qfi", part, a, precision=_HIGHEST) for part in b]
    (d00, d10, d20), (d01, d11, d21), (d02, d12, _) = (jnp.moveaxis(d, 2, 0) for d in dots)
    return d00, d01 + d10, d02 + d11 + d20, d12 + d21


def _sum_of_products(left: list[Array], right: list[Array]) -> Array:
    # A plain reduction, so that gathers feeding it fuse on GPUs and nothing large is stored.
    return jnp.sum(sum(x * y for x, y in zip(left, right, strict=True)), axis=-1)


def _matmul_of_short_integers(
    left: Float[Array, "Q D"], right: Float[Array, "N D"]
) -> Float[Array, "Q N"]:
    """As `dot_rows`, to the bit: bfloat16 holds integers up to 256 and the sums are float32."""
    left, right = left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)
    return jnp.matmul(left, right.T, preferred_element_type=jnp.float32)


def _join(*sums: Array) -> Array:
    """Weigh the sums; fused multiply-add changes nothing, since the scalings are exact."""
    total = sums[0].astype(jnp.float32) * 2.0**-16
    for i, part in enumerate(sums[1:], start=3):
        total = total + part.astype(jnp.float32) * 2.0 ** (-8 * i)
    return total


def _sum_last(x: Int[Array, "*N D"]) -> Int[Array, "*N 1"]:
    return jnp.sum(x, axis=-1, keepdims=True, dtype=jnp.int32)


def _power_of_two(exponent: Int[Array, "*N"]) -> Float[Array, "*N"]:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
