"""Attention within segments for NVIDIA GPUs, reading queries, keys and values where they lie."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from moe_jax._types import Array, Float
from moe_jax.ops._hardware import launch

__all__ = ["backward", "forward"]

BLOCK = 64
_LOW = -1e30
_STEP = 32  # keys, or whatever a loop goes along, that it takes at a time
_AB, _ABT, _ATB = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))  # what a product sums over


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
    inputs = (qkv.reshape(rows, -1), *_flat(blocks))
    out, log_total = _launch(
        _segment_forward_kernel, inputs, outputs, heads=heads, width=width, interpret=interpret
    )
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
    run = functools.partial(_launch, heads=heads, width=width, interpret=interpret)
    qkv_grad = jax.ShapeDtypeStruct((rows, 3 * heads * width), qkv.dtype)
    by_row = qkv.reshape(rows, -1), grad.reshape(rows, -1)
    who = log_total, *_flat(blocks)
    # One gradient at a time: a program with more accumulators would fill its multiprocessor alone.
    # Each kernel writes its columns beside those of the ones before it.
    begun, dots = run(
        _segment_query_gradient_kernel, (*by_row, *who, out.reshape(rows, -1)),
        (qkv_grad, jax.ShapeDtypeStruct((heads, rows), jnp.float32)), num_stages=1,
    )  # fmt: skip
    inputs = (*by_row, *who, dots)
    begun = run(_segment_key_gradient_kernel, (*inputs, begun), qkv_grad, aliases={len(inputs): 0})
    inputs = (*by_row, *who)
    begun = run(
        _segment_value_gradient_kernel, (*inputs, begun), qkv_grad, aliases={len(inputs): 0}
    )
    return begun.reshape(qkv.shape)


def _launch(
    kernel: Callable, inputs: tuple[Array, ...], outputs: Any, *, heads: int, width: int, **how: Any
) -> Any:
    kernel = functools.partial(kernel, heads=heads, width=width)
    how = {"num_warps": 4, "num_stages": 2} | how
    return launch(kernel, (inputs[0].shape[0] // BLOCK, heads), inputs, outputs, **how)


def _flat(blocks: Any) -> tuple[Array, ...]:
    by_row = (a.reshape(-1) for a in jax.tree.leaves(blocks[:3]))
    return *by_row, blocks.first, blocks.last


def _rows(block: Any, size: int = BLOCK) -> Any:
    return pl.ds(block * size, size)


def _columns(head, heads, width):
    """Where a head's queries, keys and values are in a row."""
    return [pl.ds((i * heads + head) * width, width) for i in range(3)]


class _Who:
    """What `_flat` made, as a program reads it."""

    def __init__(self, query_start_ref, key_start_ref, *refs):
        *position_ref, self._first_ref, self._last_ref = refs
        self._query_refs = query_start_ref, *position_ref
        self._key_refs = key_start_ref, *position_ref

    def queries(self, rows):
        """Start and, if it matters, position of rows as queries."""
        return [ref[rows] for ref in self._query_refs]

    def keys(self, rows):
        """Likewise as keys."""
        return [ref[rows] for ref in self._key_refs]

    def sum_up(self, block, add, start):
        """Calls `add(rows, sums)` with all rows that a block touches, some at a time."""
        steps = self._first_ref[block] // _STEP, self._last_ref[block] // _STEP + 1
        return jax.lax.fori_loop(*steps, lambda i, sums: add(_rows(i, _STEP), sums), start)


def _seen(queries, keys):
    """Which keys each query sees, [queries, keys]."""
    is_seen = queries[0][:, None] == keys[0][None, :]
    for own, other in zip(queries[1:], keys[1:], strict=True):
        is_seen &= other[None, :] <= own[:, None]
    return is_seen


def _product(a, b, axes):
    return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)


def _segment_forward_kernel(qkv_ref, *refs, heads, width):
    *who, out_ref, log_total_ref = refs
    who = _Who(*who)
    block, head = pl.program_id(0), pl.program_id(1)
    rows, scale = _rows(block), width**-0.5
    query, key, value = _columns(head, heads, width)
    q, queries = qkv_ref[rows, query], who.queries(rows)

    def add(others, sums):
        top, total, out = sums
        is_seen = _seen(queries, who.keys(others))
        scores = _product(q, qkv_ref[others, key], _ABT) * scale
        higher = jnp.maximum(top, jnp.max(jnp.where(is_seen, scores, _LOW), axis=1))
        share = jnp.where(is_seen, jnp.exp(scores - higher[:, None]), 0.0)
        fade = jnp.exp(top - higher)
        v = qkv_ref[others, value]
        mixed = _product(share.astype(v.dtype), v, _AB)
        return higher, total * fade + jnp.sum(share, axis=1), out * fade[:, None] + mixed

    start = jnp.full((BLOCK,), _LOW), jnp.zeros((BLOCK,)), jnp.zeros((BLOCK, width))
    top, total, out = who.sum_up(block, add, start)
    known = jnp.where(total > 0, total, 1.0)
    out_ref[rows, pl.ds(head * width, width)] = (out / known[:, None]).astype(out_ref.dtype)
    log_total_ref[head, rows] = jnp.where(total > 0, top + jnp.log(known), -_LOW)


class _Head:
    """What the gradients' programs read of one head, and what they all compute."""

    def __init__(self, qkv_ref, grad_ref, log_total_ref, *who, heads, width):
        self.who = _Who(*who)
        self._qkv_ref, self._grad_ref, self._log_total_ref = qkv_ref, grad_ref, log_total_ref
        self._block, self.head = pl.program_id(0), pl.program_id(1)
        self.rows, self._scale, self._width = _rows(self._block), width**-0.5, width
        columns = _columns(self.head, heads, width)
        self.columns = dict(zip(("query", "key", "value"), columns, strict=True))
        self.own = pl.ds(self.head * width, width)

    def load(self, name, rows):
        """[rows, width] of the queries, keys or values."""
        return self._qkv_ref[rows, self.columns[name]]

    def load_grad(self, rows):
        """[rows, width] of the result's gradient."""
        return self._grad_ref[rows, self.own]

    def load_total(self, rows):
        """[rows], the logarithm of the softmax's sum."""
        return self._log_total_ref[self.head, rows]

    def shares(self, q, k, total, is_seen):
        """The softmax's weights, [queries, keys]."""
        scores = _product(q, k, _ABT) * self._scale
        return jnp.where(is_seen, jnp.exp(scores - total[:, None]), 0.0)

    def pulls(self, share, g, v, dots):
        """The scores' gradient, [queries, keys]."""
        return (share * (_product(g, v, _ABT) - dots[:, None]) * self._scale).astype(v.dtype)

    def sum(self, of):
        """The sum of `of(rows)` over the rows that the program's block touches."""
        start = jnp.zeros((BLOCK, self._width))
        return self.who.sum_up(self._block, lambda rows, total: total + of(rows), start)


def _segment_query_gradient_kernel(*refs, heads, width):
    *known, attended_ref, out_ref, dots_ref = refs
    head = _Head(*known, heads=heads, width=width)
    rows = head.rows
    q, g, total = head.load("query", rows), head.load_grad(rows), head.load_total(rows)
    queries = head.who.queries(rows)
    attended = attended_ref[rows, head.own].astype(jnp.float32)
    dots = jnp.sum(g.astype(jnp.float32) * attended, axis=1)
    dots_ref[head.head, rows] = dots

    def of(others):
        k = head.load("key", others)
        share = head.shares(q, k, total, _seen(queries, head.who.keys(others)))
        return _product(head.pulls(share, g, head.load("value", others), dots), k, _AB)

    out_ref[rows, head.columns["query"]] = head.sum(of).astype(out_ref.dtype)


def _segment_key_gradient_kernel(*refs, heads, width):
    *known, dots_ref, _, out_ref = refs
    head = _Head(*known, heads=heads, width=width)
    rows = head.rows
    k, v, keys = head.load("key", rows), head.load("value", rows), head.who.keys(rows)

    def of(others):
        q, dots = head.load("query", others), dots_ref[head.head, others]
        is_seen = _seen(head.who.queries(others), keys)
        share = head.shares(q, k, head.load_total(others), is_seen)
        return _product(head.pulls(share, head.load_grad(others), v, dots), q, _ATB)

    out_ref[rows, head.columns["key"]] = head.sum(of).astype(out_ref.dtype)


def _segment_value_gradient_kernel(*refs, heads, width):
    *known, _, out_ref = refs
    head = _Head(*known, heads=heads, width=width)
    rows = head.rows
    k, keys = head.load("key", rows), head.who.keys(rows)

    def of(others):
        is_seen = _seen(head.who.queries(others), keys)
        share = head.shares(head.load("query", others), k, head.load_total(others), is_seen)
        return _product(share.astype(k.dtype), head.load_grad(others), _ATB)

    out_ref[rows, head.columns["value"]] = head.sum(of).astype(out_ref.dtype)
