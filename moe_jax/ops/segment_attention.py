"""Attention among the rows of each segment, where segments of any length follow each other."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops import _segment_attention_gpu as _gpu
from moe_jax.ops._hardware import triton_or_xla

__all__ = ["segment_attention"]

BLOCK = 64
_LOW = -1e30


class _Blocks(NamedTuple):
    """What decides who sees whom, in blocks of 64 rows, and the rows that a block touches.

    A query sees a key of the same start, unless the key's position is the higher one. Rows that
    are not valid start nowhere, as queries elsewhere than as keys. A block of them touches none,
    and its last row is below its first.
    """

    query_start: Int[Array, "I 64"]
    key_start: Int[Array, "I 64"]
    position: Int[Array, "I 64"] | None
    first: Int[Array, "I"]
    last: Int[Array, "I"]


def segment_attention(
    qkv: Float[Array, "R 3 heads d"],
    *,
    segment: Int[Array, "R"],
    is_valid: Bool[Array, "R"],
    position: Int[Array, "R"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "R heads d"]:
    """Scaled dot-product attention within segments, softmax in float32.

    Work grows with the rows times the longest segment, and memory with the rows: scores are made
    64 by 64 and forgotten, and made again for the gradient (Dao et al. 2022, algorithms 1 and 4).

    Args:
        qkv: [R, 3, heads, d], queries, keys and values; 64 divides R.
        segment: [R] int32; rows that follow each other with the same number are a segment.
        is_valid: [R], False for rows that none sees and that see none: their result is zero.
        position: [R] int32; a row then sees only rows of its own or a lower position. None for
            all rows of the segment.
        implementation: "xla", everywhere; "pallas", two kernels for NVIDIA GPUs (d a power of
            two from 16 on); None for the kernels on Hopper with 16 bits and d up to 256, which
            is what they were measured with.

    Returns:
        [R, heads, d] in the dtype of `qkv`.

    Raises:
        ValueError: R is not a multiple of 64, or `implementation` is unknown.

    Example:
        >>> import jax.numpy as jnp
        >>> qkv = jnp.ones((64, 3, 1, 4)).at[:, 2].multiply(jnp.arange(64.0)[:, None, None])
        >>> segment = jnp.arange(64) // 2
        >>> out = segment_attention(qkv, segment=segment, is_valid=jnp.ones(64, bool))
        >>> out[:4, 0, 0].tolist()
        [0.5, 0.5, 2.5, 2.5]
    """
    rows = qkv.shape[0]
    if rows % BLOCK:
        raise ValueError(f"qkv must have a multiple of {BLOCK} rows, got {rows}")
    is_fast_width = qkv.shape[-1] in (16, 32, 64, 128, 256)
    implementation = triton_or_xla(implementation, qkv, fits=is_fast_width)
    return _attend(qkv, _blocks(segment, is_valid, position), implementation)


def _blocks(
    segment: Int[Array, "R"], is_valid: Bool[Array, "R"], position: Int[Array, "R"] | None
) -> _Blocks:
    is_new = segment != jnp.roll(segment, 1)
    row = jnp.arange(segment.shape[0], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(is_new, row, 0))
    stop = jax.lax.cummin(jnp.where(jnp.roll(is_new, -1), row, row.size - 1), reverse=True)

    def by_block(values: Array, otherwise: Array | int) -> Int[Array, "I 64"]:
        return jnp.where(is_valid, values, otherwise).reshape(-1, BLOCK)

    return _Blocks(
        query_start=by_block(start, -1),
        key_start=by_block(start, -2),
        position=None if position is None else position.reshape(-1, BLOCK),
        # Only rows that count: those after the last may be many, and all of one segment.
        first=jnp.min(by_block(start, row.size), axis=1),
        last=jnp.max(by_block(stop, -1), axis=1),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(
    qkv: Float[Array, "R 3 heads d"], blocks: _Blocks, implementation: str
) -> Float[Array, "R heads d"]:
    return _attend_fwd(qkv, blocks, implementation)[0]


def _attend_fwd(qkv, blocks, implementation):
    if implementation == "xla":
        by_block = (qkv[:, i].reshape(-1, BLOCK, *qkv.shape[2:]) for i in range(3))
        out, log_total = _forward(*by_block, blocks)
        out = out.reshape(-1, *out.shape[2:])
    else:
        out, log_total = _gpu.forward(qkv, blocks, interpret=implementation == "interpret")
    return out, (qkv, blocks, out, log_total)


def _attend_bwd(implementation, residuals, grad):
    qkv, blocks, out, log_total = residuals
    if implementation != "xla":
        how = {"interpret": implementation == "interpret"}
        return _gpu.backward(qkv, blocks, out, log_total, grad, **how), None
    rows = (qkv[:, 0], qkv[:, 1], qkv[:, 2], out, grad)
    by_block = (a.reshape(-1, BLOCK, *a.shape[1:]) for a in rows)
    grads = (a.reshape(out.shape) for a in _backward(*by_block, log_total, blocks))
    return jnp.stack(list(grads), axis=1), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _forward(
    query: Float[Array, "I 64 h d"],
    key: Float[Array, "I 64 h d"],
    value: Float[Array, "I 64 h d"],
    blocks: _Blocks,
) -> tuple[Float[Array, "I 64 h d"], Float[Array, "I h 64"]]:
    """Goes along the blocks of keys that each block of queries touches, with a running softmax."""

    def add(other: Array, is_other: Array, sums: tuple) -> tuple:
        top, total, out = sums
        scores, is_seen = _scores(query, key[other], blocks, _of(blocks, other), is_other)
        higher = jnp.maximum(top, jnp.max(jnp.where(is_seen, scores, _LOW), axis=-1))
        share = jnp.where(is_seen, jnp.exp(scores - higher[..., None]), 0.0)
        fade = jnp.exp(top - higher)
        mixed = _product("nhqk,nkhd->nhqd", share.astype(value.dtype), value[other])
        return higher, total * fade + jnp.sum(share, axis=-1), out * fade[..., None] + mixed

    count, rows, heads, width = query.shape
    none = jnp.full((count, heads, rows), _LOW), jnp.zeros((count, heads, rows))
    top, total, out = _along(blocks, add, (*none, jnp.zeros((count, heads, rows, width))))
    out = out / jnp.where(total > 0, total, 1.0)[..., None]
    out = jnp.swapaxes(out, 1, 2).astype(query.dtype)
    # A row that sees nothing has a share of nothing, whatever its scores.
    log_total = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -_LOW)
    return out, log_total


def _backward(
    query: Float[Array, "I 64 h d"],
    key: Float[Array, "I 64 h d"],
    value: Float[Array, "I 64 h d"],
    out: Float[Array, "I 64 h d"],
    grad: Float[Array, "I 64 h d"],
    log_total: Float[Array, "I h 64"],
    blocks: _Blocks,
) -> tuple[Float[Array, "I 64 h d"], ...]:
    """Once along the keys for the queries' gradient, once along the queries for the others'."""
    scale = query.shape[-1] ** -0.5
    dots = _product("nqhd,nqhd->nhq", grad, out)

    def shares(queries: tuple, keys: tuple, is_other: Array) -> tuple[Array, Array]:
        """The softmax's weights, and the gradient of the scores."""
        (q, g, total, dot, own), (k, v, others) = queries, keys
        scores, is_seen = _scores(q, k, own, others, is_other)
        share = jnp.where(is_seen, jnp.exp(scores - total[..., None]), 0.0)
        pull = _product("nqhd,nkhd->nhqk", g, v) - dot[..., None]
        return share, share * pull * scale

    def for_query(other: Array, is_other: Array, total: Array) -> Array:
        keys = key[other], value[other], _of(blocks, other)
        _, pull = shares((query, grad, log_total, dots, blocks), keys, is_other)
        return total + _product("nhqk,nkhd->nqhd", pull.astype(key.dtype), key[other])

    def for_key(other: Array, is_other: Array, totals: tuple) -> tuple:
        q, g = query[other], grad[other]
        queries = q, g, log_total[other], dots[other], _of(blocks, other)
        share, pull = shares(queries, (key, value, blocks), is_other)
        by_key = _product("nhqk,nqhd->nkhd", pull.astype(q.dtype), q)
        by_value = _product("nhqk,nqhd->nkhd", share.astype(g.dtype), g)
        return totals[0] + by_key, totals[1] + by_value

    nothing = jnp.zeros(query.shape)
    grad_query = _along(blocks, for_query, nothing)
    grad_key, grad_value = _along(blocks, for_key, (nothing, nothing))
    return tuple(a.astype(query.dtype) for a in (grad_query, grad_key, grad_value))


def _along(blocks: _Blocks, add: Callable, start: tuple | Array) -> tuple | Array:
    """Calls `add(other, is_other, sums)` with the j-th block that each block touches, for all j.

    Who touches whom is mutual, so that this serves queries and keys.
    """
    first, last = blocks.first // BLOCK, blocks.last // BLOCK

    def one(j: Array, sums: tuple | Array) -> tuple | Array:
        other = first + j
        return add(jnp.minimum(other, last), other <= last, sums)

    return jax.lax.fori_loop(0, jnp.max(last - first) + 1, one, start)


def _of(blocks: _Blocks, other: Int[Array, "I"]) -> _Blocks:
    return jax.tree.map(lambda a: a[other], blocks)


def _scores(
    query: Array, key: Array, own: _Blocks, other: _Blocks, is_other: Array
) -> tuple[Float[Array, "I h 64 64"], Bool[Array, "I h 64 64"]]:
    """Scaled products of queries and keys, and which of them count."""
    scores = _product("nqhd,nkhd->nhqk", query, key) * query.shape[-1] ** -0.5
    is_seen = own.query_start[:, :, None] == other.key_start[:, None, :]
    if own.position is not None:
        is_seen &= other.position[:, None, :] <= own.position[:, :, None]
    is_seen &= is_other[:, None, None]
    return scores, jnp.broadcast_to(is_seen[:, None], scores.shape)


def _product(how: str, a: Array, b: Array) -> Array:
    return jnp.einsum(how, a, b, preferred_element_type=jnp.float32)
