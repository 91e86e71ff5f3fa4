"""Nearest neighbours by cosine among masked rows."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int
from moe_jax.ops._hardware import runs_triton
from moe_jax.ops.blocks import in_blocks
from moe_jax.ops.first_true import first_true
from moe_jax.ops.search import _codes_gpu, _codes_xla, _matmul
from moe_jax.ops.search.code import Code
from moe_jax.ops.similarity import exact_cosine_at, normalize

__all__ = ["SCORES_AT_ONCE", "Hits", "nearest"]

SCORES_AT_ONCE = 2**28
"""So many scores (or bounds) of queries with keys exist at a time: 1 GiB of them."""

_PART = 8  # of all queries, at most, are searched for once more by themselves

# (ids [Q, F], N where there are fewer; bound [Q] on the cosine of the candidates left out)
_Pick = tuple[Array, Array]


class Hits(NamedTuple):
    """What a search found, best first.

    Attributes:
      ids: int32 [Q, k], rows or node ids, N where there is no hit.
      scores: float32 [Q, k], cosines, 0 where there is no hit.
      is_valid: bool [Q, k].
    """

    ids: Int[Array, "Q k"]
    scores: Float[Array, "Q k"]
    is_valid: Bool[Array, "Q k"]


@functools.partial(jax.jit, static_argnames=("k", "is_unit", "precision", "implementation"))
def nearest(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    is_candidate: Bool[Array, "#Q N"] | Bool[Array, "N"],
    k: int,
    floor: ArrayLike = -1.0,
    *,
    code: Code | None = None,
    is_query: Bool[Array, "Q"] | None = None,
    is_unit: bool = True,
    precision: str = "exact",
    implementation: str | None = None,
) -> Hits:
    """The k keys with the largest exact cosine to each query, ties to the lower index.

    A first pass picks some more than k keys: by eight-bit codes on NVIDIA's A100, Hopper and later,
    for small k, in two fused kernels, and on CPUs among many keys, for a few queries or if "quick";
    elsewhere by a float32 matmul. Only those are scored exactly. The pass also bounds the cosine of
    every key left out. Should that bound reach the k-th score (near-ties that the pass cannot tell
    apart), more keys are picked or a finer pass is made, for those queries alone if they are few,
    and in the end every key is scored exactly, so that the answer never depends on the pick.
    Queries are multiplied by keys in blocks of 2**28 scores.

    Args:
      queries: float32 [Q, D]; one without a direction has no hits.
      keys: float32 [N, D], unit vectors (or zeros) from `moe_jax.ops.similarity.normalize`.
      is_candidate: bool [N], the keys that may be chosen; or [Q, N], by query.
      k: how many, between 1 and N.
      floor: scores below it need not be told apart; a scalar.
      code: `encode(keys)`, kept beside them; without it the keys themselves are read.
      is_query: bool [Q], the queries that matter, all by default; the others may get any answer.
      is_unit: whether the queries are unit vectors (or zeros), too; if not, they are normalised.
      precision: "exact" as above. "scored" takes the first pass's pick for good, so that keys
        within the pass's rounding of the k-th (about 1e-3 by code, 1e-6 by matmul) may be missed;
        scores are exact. "quick" also takes plain float32 sums as scores.
      implementation: of the first pass, "matmul" or "code", the latter by kernels on NVIDIA GPUs
        and in plain XLA elsewhere; by default the faster one that can take the sizes. "interpret"
        runs the kernels as ordinary operations, to test them.

    Returns:
      `Hits` of shape [Q, k], without any where there are fewer than k candidates.

    Raises:
      ValueError: k is out of range, precision or implementation is unknown, or codes cannot be
        used.

    Example:
      >>> keys = jnp.eye(3)
      >>> hits = nearest(keys[:1], keys, jnp.ones(3, bool), 2)
      >>> hits.ids.tolist(), hits.scores.tolist()
      ([[0, 1]], [[1.0, 0.0]])
    """
    if precision not in ("exact", "scored", "quick"):
        raise ValueError(f"precision must be 'exact', 'scored' or 'quick', got {precision!r}")
    num_keys = keys.shape[0]
    if not 1 <= k <= num_keys:
        raise ValueError(f"k must be between 1 and {num_keys} (keys), got {k}")
    unit = queries if is_unit else normalize(queries)
    has_direction = jnp.any(unit != 0.0, axis=-1)
    is_query = has_direction if is_query is None else has_direction & is_query
    floor = jnp.asarray(floor, jnp.float32)
    among = _Among(keys, jnp.atleast_2d(is_candidate), k, floor, precision)
    how = _resolve(implementation, queries.shape[0], among, code)

    def by_code() -> Hits:
        find = functools.partial(_by_code, among=among, code=code, how=how)
        per_query = num_keys if how == "xla" else _codes_gpu.num_bounds(num_keys)
        most = max(1, SCORES_AT_ONCE // per_query)
        if how == "xla" and precision != "quick":
            most = min(most, _codes_xla.MAX_QUERIES)
        return in_blocks(find, (queries, unit, is_query), most)

    def by_matmul() -> Hits:
        return _by_matmul(unit, is_query, among)

    if how == "matmul":
        return by_matmul()
    if how == "kernels" and implementation is None:
        return jax.lax.platform_dependent(cuda=by_code, default=by_matmul)
    return by_code()


class _Among(NamedTuple):
    """What is searched, for how many, and how: arguments of `nearest`."""

    keys: Float[Array, "N D"]
    mask: Bool[Array, "#Q N"]
    k: int
    floor: Float[Array, ""]
    precision: str


def _resolve(implementation: str | None, num_queries: int, among: _Among, code: Code | None) -> str:
    """What makes the first pass: "matmul", or codes by "kernels", in "xla", or by "interpret"."""
    backend, shape = jax.default_backend(), among.keys.shape
    of_codes = "kernels" if backend == "gpu" else "xla"
    names = {"matmul": "matmul", "code": of_codes, "interpret": "interpret"}
    if implementation is not None and implementation not in names:
        raise ValueError(
            f"implementation must be 'code', 'matmul', 'interpret' or None, got {implementation!r}"
        )
    how = names[implementation or "code"]
    if how == "matmul":
        return how
    fits = code is not None and among.mask.shape[0] == 1
    fits = fits and (how == "xla" or _codes_gpu.is_supported(*shape, among.k))
    if implementation is None:
        if how == "kernels":
            return how if fits and runs_triton() else "matmul"
        fits = fits and backend == "cpu" and shape[0] >= _codes_xla.MIN_ROWS
        fits = fits and (num_queries <= _codes_xla.MAX_QUERIES or among.precision == "quick")
        return how if fits and _codes_xla.is_fast() else "matmul"
    if not fits:
        raise ValueError(
            f"implementation={implementation!r} needs code, one is_candidate for all queries and, "
            f"for kernels, {_codes_gpu.NEEDS}, got keys {shape} and k={among.k}"
        )
    return how


def _by_matmul(unit: Float[Array, "Q D"], is_query: Bool[Array, "Q"], among: _Among) -> Hits:
    """Takes queries in blocks, so that queries x keys never has to fit in memory."""
    is_shared = among.mask.shape[0] == 1

    def find(unit: Array, is_query: Array, *mask: Array) -> Hits:
        return _block_by_matmul(
            unit, is_query, among if is_shared else among._replace(mask=mask[0])
        )

    inputs = (unit, is_query) if is_shared else (unit, is_query, among.mask)
    num_scores = _matmul.keys_at_once(among.keys.shape[0])
    return in_blocks(find, inputs, max(1, SCORES_AT_ONCE // num_scores))


def _block_by_matmul(unit: Float[Array, "Q D"], is_query: Bool[Array, "Q"], among: _Among) -> Hits:
    keys, mask, k, _, precision = among
    if precision == "quick" and jax.default_backend() == "gpu":
        picked, _ = _matmul.pick(unit, keys, mask, k)
        return _hits(unit, *_best_of_picked(unit, keys, picked, k, _cosine_at), among)
    if precision == "quick":
        scores, ids = _matmul.roughly_best(unit, keys, mask, k)
        return _hits(unit, ids, scores, among)

    def score_all(found: Hits, is_close: Array) -> Hits:
        del found, is_close
        scores, ids = _matmul.best_of_all(unit, keys, mask, k)
        return _hits(unit, ids, scores, among)

    picked = _matmul.pick(unit, keys, mask, k)
    return _best_of(picked, unit, is_query, among, score_all)


def _by_code(
    queries: Float[Array, "Q D"],
    unit: Float[Array, "Q D"],
    is_query: Bool[Array, "Q"],
    among: _Among,
    code: Code,
    how: str,
) -> Hits:
    keys, mask, k, _, precision = among
    by_matmul = functools.partial(_by_matmul, among=among)
    again = functools.partial(_again, unit=unit, search=by_matmul, search_few=by_matmul)
    is_certain = precision == "exact"
    if how == "xla" and precision == "quick":
        scores, ids = _codes_xla.best_of_groups(unit, keys, code, mask[0], k)
        return _hits(unit, ids, scores, among)
    if how == "xla":
        num_picked = _codes_xla.num_to_pick(k, keys.shape[0], is_certain=is_certain)
        picked = _codes_xla.pick(unit, code, mask[0], num_picked, is_certain=is_certain)
        return _best_of(picked, unit, is_query, among, again)
    num_picked = _codes_gpu.num_to_pick(k, queries.shape[0], keys.shape[0], is_certain=is_certain)
    options = {"num_picked": num_picked, "interpret": how == "interpret"}
    if precision == "quick":
        found = _codes_gpu.find(queries, keys, code, mask[0], k=k, **options)
        return Hits(found.ids, found.scores, found.is_found)
    if _codes_gpu.has_parts(keys.shape[0]):
        closer = functools.partial(_by_parts, among=among, code=code, how=how)
        again = functools.partial(again, search_few=closer)
    picked = _codes_gpu.pick(unit, code, mask[0], is_certain=is_certain, **options)
    return _best_of(picked, unit, is_query, among, again)


def _by_parts(
    unit: Float[Array, "Q D"], is_query: Bool[Array, "Q"], among: _Among, code: Code, how: str
) -> Hits:
    """Picks several times as many keys by code, which seldom leaves anything open."""

    def score_all(found: Hits, is_close: Array) -> Hits:
        own = _by_matmul(unit, is_close, among)
        return _chosen(is_close, own, found)

    is_interpreted = how == "interpret"
    picked = _codes_gpu.pick_in_parts(unit, code, among.mask[0], among.k, interpret=is_interpreted)
    return _best_of(picked, unit, is_query, among, score_all)


def _best_of(
    pick: _Pick,
    unit: Float[Array, "Q D"],
    is_query: Bool[Array, "Q"],
    among: _Among,
    otherwise: Callable[[Hits, Array], Hits],
) -> Hits:
    """The best of the picked; `otherwise(these, is_close)` if others may be better for a query."""
    picked, unseen = pick
    ids, scores = _best_of_picked(unit, among.keys, picked, among.k)
    found = _hits(unit, ids, scores, among)
    if among.precision != "exact" or picked.shape[1] == among.keys.shape[0]:
        return found
    is_close = unseen >= jnp.maximum(scores[:, -1], among.floor)
    is_close = is_close & (unseen > -jnp.inf) & is_query
    return jax.lax.cond(jnp.any(is_close), lambda: otherwise(found, is_close), lambda: found)


def _hits(unit: Array, ids: Array, scores: Array, among: _Among) -> Hits:
    is_valid = (scores > -jnp.inf) & jnp.any(unit != 0.0, axis=-1, keepdims=True)
    ids = jnp.where(is_valid, ids, among.keys.shape[0])
    return Hits(ids, jnp.where(is_valid, scores, 0.0), is_valid)


def _again(
    found: Hits,
    is_close: Bool[Array, "Q"],
    unit: Float[Array, "Q D"],
    search: Callable[[Array, Array], Hits],
    search_few: Callable[[Array, Array], Hits],
) -> Hits:
    """Replaces what was found for some queries by `search(queries, is_query)`, or `search_few`."""
    num_queries = unit.shape[0]
    most = num_queries // _PART
    if not most:
        return _chosen(is_close, search_few(unit, is_close), found)

    def for_few() -> Hits:
        at = first_true(is_close, most)
        own = search_few(unit.at[at].get(mode="fill", fill_value=0.0), at < num_queries)
        return jax.tree.map(lambda old, new: old.at[at].set(new, mode="drop"), found, own)

    def for_all() -> Hits:
        return _chosen(is_close, search(unit, is_close), found)

    return jax.lax.cond(jnp.sum(is_close) <= most, for_few, for_all)


def _chosen(is_new: Bool[Array, "Q"], new: Hits, old: Hits) -> Hits:
    return jax.tree.map(lambda new, old: jnp.where(is_new[:, None], new, old), new, old)


def _best_of_picked(
    queries: Float[Array, "Q D"],
    keys: Float[Array, "N D"],
    picked: Int[Array, "Q F"],
    k: int,
    cosine: Callable[[Array, Array, Array], Array] = exact_cosine_at,
) -> tuple[Int[Array, "Q k"], Float[Array, "Q k"]]:
    """Score the picked keys and sort them by (score descending, index ascending)."""
    num_keys = keys.shape[0]
    score = cosine(queries, keys, jnp.minimum(picked, num_keys - 1))
    negated = jnp.where(picked < num_keys, -score, jnp.inf)
    negated, index = jax.lax.sort((negated, picked), dimension=-1, num_keys=2)
    return index[:, :k], -negated[:, :k]


def _cosine_at(
    queries: Float[Array, "Q D"], keys: Float[Array, "N D"], rows: Int[Array, "Q F"]
) -> Float[Array, "Q F"]:
    return jnp.sum(queries[:, None, :] * keys[rows], axis=-1)
