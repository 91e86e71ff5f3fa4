"""K-means of unit vectors by cosine, in fixed memory and with the same result every time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from moe_jax._types import Array, Bool, Float, Int, PRNGKey
from moe_jax.ops.similarity import normalize
from moe_jax.ops.top_k import top_k

__all__ = ["Clusters", "nearest_centroids", "spherical_kmeans"]

# Scores of so many (row, cluster) pairs are held at once: 64 MiB of float32.
_PAIRS_AT_ONCE = 2**24


class Clusters(NamedTuple):
    """L clusters of N rows.

    Attributes:
      centroids: float32 [L, D], unit vectors; zero for a cluster that no row could start.
      assignment: int32 [N], the cluster of each row, L where the row is masked.
      scores: float32 [N], cosine of each row with its centroid, 0 where the row is masked.
      sizes: int32 [L], how many rows each cluster has.
    """

    centroids: Float[Array, "L D"]
    assignment: Int[Array, "N"]
    scores: Float[Array, "N"]
    sizes: Int[Array, "L"]


def spherical_kmeans(
    x: Float[Array, "N D"],
    num_clusters: int,
    *,
    key: PRNGKey,
    iterations: int = 10,
    is_valid: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    init: str | Array = "random",
    sample: int | None = None,
    balance: float | None = None,
    num_used: ArrayLike | None = None,
) -> Clusters:
    """Spherical k-means (Dhillon and Modha 2001, section 3): a row joins its most similar centroid.

    A centroid is the normalised weighted sum of its rows. Clusters without rows start again at the
    rows that fit worst. Rows are taken in chunks, so rows x clusters never exists whole, and sums
    are one-hot matmuls in the order of the chunks, so nothing depends on the order of threads.
    Ties go to the lower cluster.

    Args:
      x: float32 [N, D], unit vectors; rows of zeros are left out.
      num_clusters: L, at least 1. It may exceed the number of rows.
      key: for seeding.
      iterations: rounds of assigning and averaging, at least 0.
      is_valid: bool [N], rows that take part, all by default.
      weight: float32 [N], positive, what each row counts for in the averages, 1 by default.
      init: "random" (rows drawn without replacement), "k-means++" (Arthur and Vassilvitskii 2007,
        section 2.2, with 1 - cosine as the squared distance: L passes over the rows), or
        float32 [L, D] centroids to start from.
      sample: learn from at most so many rows, drawn at random, and then assign all of them.
      balance: split clusters that weigh more than so many times the mean, at the cost of those
        below a quarter of it, in all rounds but the last two. Never by default.
      num_used: int32 scalar, which may be traced: only the first so many clusters take part, and
        the others stay zero. All by default.

    Returns:
      `Clusters`.

    Raises:
      ValueError: if a size, a shape or init is not one of these.

    Example:
      >>> x = normalize(jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]))
      >>> found = spherical_kmeans(x, 2, key=jax.random.key(0), init="k-means++")
      >>> int(found.assignment[0]) == int(found.assignment[1]), sorted(found.sizes.tolist())
      (True, [1, 2])
    """
    rows, dim = x.shape
    for name, value, least in (
        ("num_clusters", num_clusters, 1),
        ("iterations", iterations, 0),
        ("sample", rows if sample is None else sample, min(rows, 1)),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if isinstance(init, str):
        if init not in ("random", "k-means++"):
            raise ValueError(f"init must be 'random', 'k-means++' or centroids, got {init!r}")
    elif init.shape != (num_clusters, dim):
        raise ValueError(f"init must have shape {(num_clusters, dim)}, got {init.shape}")
    if balance is not None and not balance > 1.0:
        raise ValueError(f"balance must be above 1, got {balance}")
    weight = jnp.ones(rows, jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
    is_valid = jnp.ones(rows, bool) if is_valid is None else jnp.asarray(is_valid)
    for name, value in (("is_valid", is_valid), ("weight", weight)):
        if value.shape != (rows,):
            raise ValueError(f"{name} must have shape {(rows,)}, got {value.shape}")
    weight = jnp.where(is_valid, weight, 0.0)
    seeds, start = (init, None) if isinstance(init, str) else ("given", init)
    is_used = jnp.arange(num_clusters) < (num_clusters if num_used is None else num_used)
    return _kmeans(x, weight, key, start, is_used, iterations, seeds, sample, balance)


@functools.partial(jax.jit, static_argnums=(2,))
def nearest_centroids(
    x: Float[Array, "N D"], centroids: Float[Array, "L D"], k: int
) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
    """The k most similar centroids of every row, best first, ties to the lower one, in chunks.

    Args:
      x: float32 [N, D], unit vectors or zeros.
      centroids: float32 [L, D], likewise; those of zeros are never chosen.
      k: how many, between 1 and L.

    Returns:
      (int32 [N, k], L where there are fewer or the row is zero, and float32 [N, k] cosines, -inf
      there).

    Example:
      >>> ids, _ = nearest_centroids(jnp.eye(2), jnp.array([[0.0, 1.0], [0.0, 0.0]]), 2)
      >>> ids.tolist()
      [[0, 2], [0, 2]]
    """
    rows, num_clusters = x.shape[0], centroids.shape[0]
    if not 1 <= k <= num_clusters:
        raise ValueError(f"k must be between 1 and {num_clusters} (centroids), got {k}")
    size, num_chunks = _chunks(rows, num_clusters)

    def one(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        start = jnp.minimum(i * size, rows - size)
        score = _scores(jax.lax.dynamic_slice_in_dim(x, start, size), centroids)
        best, index = top_k(score, k)
        index = jnp.where(best > -jnp.inf, index, num_clusters)
        write = jax.lax.dynamic_update_slice_in_dim
        return write(found[0], index, start, 0), write(found[1], best, start, 0)

    empty = (jnp.full((rows, k), num_clusters, jnp.int32), jnp.full((rows, k), -jnp.inf))
    return _repeat(num_chunks, one, empty)


@functools.partial(jax.jit, static_argnums=(5, 6, 7))
def _kmeans(
    x: Array,
    weight: Array,
    key: PRNGKey,
    start: Array | None,
    is_used: Bool[Array, "L"],
    iterations: int,
    init: str,
    sample: int | None,
    balance: ArrayLike | None,
) -> Clusters:
    num_clusters = is_used.shape[0]
    x = jax.lax.stop_gradient(x)
    weight = jnp.where(jnp.any(x != 0.0, axis=1), weight, 0.0)
    draw, seed, rounds = jax.random.split(key, 3)
    order = _shuffled(draw, weight)
    if sample is None or sample >= x.shape[0]:
        rows, row_weight = x, weight
    else:
        rows, row_weight = x[order[:sample]], weight[order[:sample]]
    if init == "random":
        centroids = _first(x, weight, order, num_clusters)
    elif init == "k-means++":
        centroids = _plus_plus(rows, row_weight, seed, num_clusters)
    else:
        centroids = start
    centroids = jnp.where(is_used[:, None], centroids, 0.0)

    def step(i: Array, centroids: Array) -> Array:
        own, score, sums, mass = _average(rows, row_weight, centroids)
        mean = normalize(sums)
        # Opposite rows may cancel, and a centroid without a direction would attract none.
        mean = jnp.where(jnp.any(mean != 0.0, axis=1, keepdims=True), mean, centroids)
        ratio = None if balance is None else jnp.where(i < iterations - 2, balance, jnp.inf)
        fit = jnp.where(row_weight > 0, score, jnp.inf)
        key = jax.random.fold_in(rounds, i)
        return _reseed(rows, mean, own, fit, mass, is_used, ratio, key)

    if x.shape[0]:
        centroids = jax.lax.fori_loop(0, iterations, step, centroids)
    own, score = (found[:, 0] for found in nearest_centroids(x, centroids, 1))
    own = jnp.where(weight > 0, own, num_clusters)
    sizes = jnp.zeros(num_clusters, jnp.int32).at[own].add(1, mode="drop")
    return Clusters(centroids, own, jnp.where(own < num_clusters, score, 0.0), sizes)


def _shuffled(key: PRNGKey, weight: Float[Array, "N"]) -> Int[Array, "N"]:
    """Rows in random order, those without weight last."""
    lot = jnp.where(weight > 0, jax.random.uniform(key, weight.shape), 2.0)
    return jnp.argsort(lot).astype(jnp.int32)


def _first(x: Array, weight: Array, order: Int[Array, "N"], count: int) -> Float[Array, "L D"]:
    """The first rows of an order, zeros where there are no more rows with weight."""
    order = order[:count]
    found = jnp.where((weight[order] > 0)[:, None], x[order], 0.0)
    return jnp.pad(found, ((0, count - found.shape[0]), (0, 0)))


def _plus_plus(x: Array, weight: Array, key: PRNGKey, count: int) -> Float[Array, "L D"]:
    """Each seed a row drawn by weight times its distance from the seeds before it."""
    centroids = jnp.zeros((count, x.shape[1]), jnp.float32)
    if not x.shape[0]:
        return centroids

    def draw(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        centroids, distance = state
        luck = jax.random.gumbel(jax.random.fold_in(key, i), distance.shape)
        row = jnp.argmax(jnp.log(weight * distance) + luck)
        chosen = jnp.where(weight[row] * distance[row] > 0, x[row], 0.0)
        cosine = jnp.matmul(x, chosen, precision=jax.lax.Precision.HIGHEST)
        # A row chosen before is at distance 0 up to rounding, and must not be drawn again.
        apart = jnp.where(1.0 - cosine > 1e-6, 1.0 - cosine, 0.0)
        return centroids.at[i].set(chosen), jnp.minimum(distance, apart)

    return jax.lax.fori_loop(0, count, draw, (centroids, jnp.full(x.shape[0], 2.0)))[0]


def _average(
    x: Array, weight: Array, centroids: Array
) -> tuple[Int[Array, "N"], Float[Array, "N"], Float[Array, "L D"], Float[Array, "L"]]:
    """One pass over the rows: their clusters and fits, and the clusters' sums and weights."""
    rows, num_clusters = x.shape[0], centroids.shape[0]
    size, num_chunks = _chunks(rows, num_clusters)

    def one(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        own, fit, sums, mass = state
        start = jnp.minimum(i * size, rows - size)
        part = jax.lax.dynamic_slice_in_dim(x, start, size)
        score = _scores(part, centroids)
        best, index = jnp.max(score, axis=1), jnp.argmax(score, axis=1).astype(jnp.int32)
        own = jax.lax.dynamic_update_slice_in_dim(own, index, start, 0)
        fit = jax.lax.dynamic_update_slice_in_dim(fit, best, start, 0)
        # The last chunk reaches back over rows that were counted before.
        is_new = (start + jnp.arange(size) >= i * size) & (best > -jnp.inf)
        share = jnp.where(is_new, jax.lax.dynamic_slice_in_dim(weight, start, size), 0.0)
        member = jnp.where(index[:, None] == jnp.arange(num_clusters)[None], share[:, None], 0.0)
        sums += jnp.matmul(member.T, part, precision=jax.lax.Precision.HIGHEST)
        return own, fit, sums, mass + jnp.sum(member, axis=0)

    empty = (
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros_like(centroids),
        jnp.zeros(num_clusters, jnp.float32),
    )
    return _repeat(num_chunks, one, empty)


def _reseed(
    x: Array,
    centroids: Array,
    own: Int[Array, "N"],
    fit: Float[Array, "N"],
    mass: Float[Array, "L"],
    is_used: Bool[Array, "L"],
    ratio: Float[Array, ""] | None,
    key: PRNGKey,
) -> Float[Array, "L D"]:
    """Move the lightest clusters to rows that need one; `fit` is inf where a row is masked."""
    count = min(x.shape[0], centroids.shape[0])
    num_moved, need = jnp.sum(is_used & (mass <= 0)), -fit
    if ratio is not None:
        mean = jnp.sum(mass) / jnp.sum(is_used)
        limit = ratio * mean
        # Rows of clusters that are too heavy come first, whatever their fit (need <= 1 for others).
        is_heavy = (mass > limit)[own] & (fit < jnp.inf)
        need = jnp.where(is_heavy, 2.0 + jax.random.uniform(key, fit.shape), need)
        wanted = jnp.sum(jnp.where(mass > limit, jnp.ceil(mass / limit) - 1.0, 0.0))
        num_light = jnp.sum(is_used & (mass < mean / 4))
        num_moved = jnp.maximum(num_moved, jnp.minimum(num_light, wanted.astype(jnp.int32)))
    need, row = jax.lax.top_k(need, count)
    turn = jnp.arange(count)
    is_moved = (turn < num_moved) & (need > -jnp.inf)
    lightest = jnp.argsort(jnp.where(is_used, mass, jnp.inf))[:count]
    at = jnp.where(is_moved, lightest, centroids.shape[0])
    return centroids.at[at].set(x[row], mode="drop")


def _scores(x: Float[Array, "C D"], centroids: Float[Array, "L D"]) -> Float[Array, "C L"]:
    score = jnp.matmul(x, centroids.T, precision=jax.lax.Precision.HIGHEST)
    is_used = jnp.any(centroids != 0.0, axis=1)[None] & jnp.any(x != 0.0, axis=1)[:, None]
    return jnp.where(is_used, score, -jnp.inf)


def _chunks(rows: int, num_clusters: int) -> tuple[int, int]:
    """(rows in a chunk, chunks)."""
    size = max(1, min(rows, _PAIRS_AT_ONCE // num_clusters))
    return size, -(-rows // size)


def _repeat(times, body, state):
    """A loop that is not compiled as one where it runs once or never."""
    if times <= 1:
        return body(jnp.int32(0), state) if times else state
    return jax.lax.fori_loop(0, times, body, state)
