"""Attention within segments for NVIDIA GPUs, reading queries, keys and values where they lie."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Float
from moe_jax.ops._kernel_parts import launch

__all__ = ["backward", "forward"]

BLOCK = 64
_LOW = -1e30
# Keys, or whatever a loop goes along, that it takes at a time; 64 in the gradient would spill.
_FORWARD_STEP, _STEP = 64, 32


def forward(
    qkv: Float[Array, "R 3 h d"], blocks: Any, *, interpret: bool = False
) -> tuple[Float[Array, "R h d"], Float[Array, "h R"]]:
    """Attention, and the logarithm of each row's softmax sum.

    Args:
        qkv: queries, keys and values, [R, 3, heads, d]; d a power of two of at least 16.
        blocks: who sees whom, as `segment_attention` makes it.
        interpret: run as ordinary operations, on any device.

    Returns:
        [R, heads, d] and float32 [heads, R].
    """
    rows, _, heads, width = qkv.shape
    outputs = (
        jax.ShapeDtypeStruct((rows, heads * width), qkv.dtype),
        jax.ShapeDtypeStruct((heads, rows), jnp.float32),
    )
    kernel = functools.partial(_segment_forward_kernel, heads=heads, width=width)
    out, log_total = launch(
        kernel, (rows // BLOCK, heads), (qkv.reshape(rows, -1), *_flat(blocks)), outputs,
        num_warps=8, num_stages=2, interpret=interpret,
    )  # fmt: skip
    return out.reshape(rows, heads, width), log_total


def backward(
    qkv: Float[Array, "R 3 h d"],
    blocks: Any,
    out: Float[Array, "R h d"],
    log_total: Float[Array, "h R"],
    grad: Float[Array, "R h d"],
    *,
    interpret: bool = False,
) -> Float[Array, "R 3 h d"]:
    """The gradient of `qkv`.

    Args:
        qkv: as in `forward`.
        blocks: as in `forward`.
        out: of `forward`.
        log_total: of `forward`.
        grad: of the output.
        interpret: run as ordinary operations, on any device.

    Returns:
        [R, 3, heads, d].
    """
    rows, _, heads, width = qkv.shape
    dots = jnp.einsum("rhd,rhd->hr", grad, out, preferred_element_type=jnp.float32)
    inputs = (qkv.reshape(rows, -1), grad.reshape(rows, -1), log_total, dots, *_flat(blocks))
    outputs = jax.ShapeDtypeStruct((rows, 3 * heads * width), qkv.dtype)
    kernel = functools.partial(_segment_backward_kernel, heads=heads, width=width)
    grads = launch(
        kernel, (rows // BLOCK, heads), inputs, outputs,
        num_warps=8, num_stages=2, interpret=interpret,
    )  # fmt: skip
    return grads.reshape(qkv.shape)


def _flat(blocks: Any) -> tuple[Array, ...]:
    by_row = (a.reshape(-1) for a in (blocks.start, blocks.is_valid, blocks.position))
    return *by_row, blocks.first, blocks.last


def _rows(block: Any, size: int = BLOCK) -> Any:
    return pl.ds(block * size, size)


def _touched(first_ref, last_ref, block, step):
    """The first and one after the last of the steps that a block touches."""
    return first_ref[block] * (BLOCK // step), (last_ref[block] + 1) * (BLOCK // step)


def _seen(who, queries, keys):
    """Which keys each query sees, [queries, keys]."""
    start_ref, valid_ref, position_ref = who
    is_seen = start_ref[queries][:, None] == start_ref[keys][None, :]
    is_seen &= valid_ref[queries][:, None] & valid_ref[keys][None, :]
    return is_seen & (position_ref[keys][None, :] <= position_ref[queries][:, None])


def _product(a, b, axes):
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def _segment_forward_kernel(
    qkv_ref, start_ref, valid_ref, position_ref, first_ref, last_ref, out_ref, log_total_ref,
    *, heads, width,
):  # fmt: skip
    block, head = pl.program_id(0), pl.program_id(1)
    rows, scale = _rows(block), width**-0.5
    query, key, value = (pl.ds((i * heads + head) * width, width) for i in range(3))
    who = start_ref, valid_ref, position_ref
    q = qkv_ref[rows, query]

    def add(other, sums):
        top, total, out = sums
        others = _rows(other, _FORWARD_STEP)
        is_seen = _seen(who, rows, others)
        scores = _product(q, qkv_ref[others, key], ((1,), (1,))) * scale
        higher = jnp.maximum(top, jnp.max(jnp.where(is_seen, scores, _LOW), axis=1))
        share = jnp.where(is_seen, jnp.exp(scores - higher[:, None]), 0.0)
        fade = jnp.exp(top - higher)
        v = qkv_ref[others, value]
        mixed = _product(share.astype(v.dtype), v, ((1,), (0,)))
        return higher, total * fade + jnp.sum(share, axis=1), out * fade[:, None] + mixed

    start = jnp.full((BLOCK,), _LOW), jnp.zeros((BLOCK,)), jnp.zeros((BLOCK, width))
    touched = _touched(first_ref, last_ref, block, _FORWARD_STEP)
    top, total, out = jax.lax.fori_loop(*touched, add, start)
    known = jnp.where(total > 0, total, 1.0)
    out_ref[rows, pl.ds(head * width, width)] = (out / known[:, None]).astype(out_ref.dtype)
    log_total_ref[head, rows] = jnp.where(total > 0, top + jnp.log(known), -_LOW)


def _segment_backward_kernel(
    qkv_ref, grad_ref, log_total_ref, dots_ref, start_ref, valid_ref, position_ref, first_ref,
    last_ref, out_ref, *, heads, width,
):  # fmt: skip
    block, head = pl.program_id(0), pl.program_id(1)
    rows, scale = _rows(block), width**-0.5
    query, key, value = (pl.ds((i * heads + head) * width, width) for i in range(3))
    own_grad = pl.ds(head * width, width)
    who = start_ref, valid_ref, position_ref
    touched = _touched(first_ref, last_ref, block, _STEP)

    def shares(q, queries, k, keys):
        """The softmax's weights, [queries, keys]."""
        scores = _product(q, k, ((1,), (1,))) * scale
        share = jnp.exp(scores - log_total_ref[head, queries][:, None])
        return jnp.where(_seen(who, queries, keys), share, 0.0)

    def pulls(q, g, queries, k, v, keys):
        """The scores' gradient, [queries, keys]."""
        pull = _product(g, v, ((1,), (1,))) - dots_ref[head, queries][:, None]
        return (shares(q, queries, k, keys) * pull * scale).astype(q.dtype)

    def sum_up(add, columns):
        # One accumulator at a time: two would spill registers.
        total = jax.lax.fori_loop(*touched, add, jnp.zeros((BLOCK, width)))
        out_ref[rows, columns] = total.astype(out_ref.dtype)

    q, g = qkv_ref[rows, query], grad_ref[rows, own_grad]

    def for_query(other, total):
        others = _rows(other, _STEP)
        k = qkv_ref[others, key]
        pull = pulls(q, g, rows, k, qkv_ref[others, value], others)
        return total + _product(pull, k, ((1,), (0,)))

    sum_up(for_query, query)

    k, v = qkv_ref[rows, key], qkv_ref[rows, value]

    def for_key(other, total):
        others = _rows(other, _STEP)
        q = qkv_ref[others, query]
        pull = pulls(q, grad_ref[others, own_grad], others, k, v, rows)
        return total + _product(pull, q, ((0,), (0,)))

    sum_up(for_key, key)

    def for_value(other, total):
        others = _rows(other, _STEP)
        share = shares(qkv_ref[others, query], others, k, rows).astype(k.dtype)
        return total + _product(share, grad_ref[others, own_grad], ((0,), (0,)))

    sum_up(for_value, value)
