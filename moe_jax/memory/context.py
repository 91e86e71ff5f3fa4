"""Context vectors: what a position of a text looks like to a token memory."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from moe_jax._types import Array, Float, Integer
from moe_jax.ops import normalize

__all__ = ["ContextVectors", "Projection", "signature"]

_BITS = 32


class Projection(NamedTuple):
    """A centring and a linear map of hidden states, fixed once fitted.

    Attributes:
        mean: [D] what is taken off.
        matrix: [D, W] what the rest is multiplied by.
    """

    mean: Float[Array, "D"]
    matrix: Float[Array, "D W"]


@dataclasses.dataclass(frozen=True)
class ContextVectors:
    """Unit vectors whose cosine says how alike two positions of a text are.

    Two parts side by side. The hidden part is the model's last hidden state, on its principal
    components, partly whitened: alike where the model sees the same situation (the key of kNN-LM,
    Khandelwal et al. 2020, section 2). The exact part is a `signature` of the last tokens: each
    length at which two contexts agree to the letter adds to the cosine, as in the match models of
    context mixing compressors. Both depend on the past alone.

    Attributes:
        hidden_dim: width of the hidden part.
        signature_dim: width of the exact part, a multiple of 32; 0 for none.
        lengths: how many last tokens must agree, one for each step of the exact part.
        hidden_share: the hidden part's share of the cosine, in (0, 1].
        whitening: 0 keeps the variances of the principal components, 1 makes them equal.

    Raises:
        ValueError: a width, the share or a length is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> vectors = ContextVectors(hidden_dim=4, signature_dim=32, lengths=(2,))
        >>> hidden = jax.random.normal(jax.random.key(0), (64, 8))
        >>> projection = jax.jit(vectors.fit)(hidden)
        >>> hidden, tokens = hidden.reshape(4, 16, 8), jnp.zeros((4, 16), int)
        >>> jax.jit(vectors)(projection, hidden, tokens).shape
        (4, 16, 36)
    """

    hidden_dim: int = 64
    signature_dim: int = 192
    lengths: tuple[int, ...] = (4, 6, 8, 12, 16, 24)
    hidden_share: float = 0.7
    whitening: float = 0.5

    def __post_init__(self) -> None:
        if self.hidden_dim < 1:
            raise ValueError(f"hidden_dim must be at least 1, got {self.hidden_dim}")
        if self.signature_dim < 0 or self.signature_dim % _BITS:
            raise ValueError(f"signature_dim must be a multiple of 32, got {self.signature_dim}")
        if not 0 < self.hidden_share <= 1:
            raise ValueError(f"hidden_share must lie in (0, 1], got {self.hidden_share}")
        if any(length < 1 for length in self.lengths) or (self.signature_dim and not self.lengths):
            raise ValueError(f"lengths must be at least one of at least 1, got {self.lengths}")

    @property
    def dim(self) -> int:
        """Width of a context vector."""
        return self.hidden_dim + self.signature_dim

    def fit(self, hidden: Float[Array, "T D"]) -> Projection:
        """Principal components of hidden states, each divided by its deviation ** whitening.

        Args:
            hidden: [T, D] of training text, D at least `hidden_dim`.

        Returns:
            The projection.

        Raises:
            ValueError: `hidden` is narrower than `hidden_dim`.
        """
        if hidden.shape[-1] < self.hidden_dim:
            raise ValueError(
                f"hidden must be at least hidden_dim={self.hidden_dim} wide, got {hidden.shape}"
            )
        hidden = hidden.astype(jnp.float32)
        mean = jnp.mean(hidden, axis=0)
        centred = hidden - mean[None]
        cov = jnp.matmul(centred.T, centred, precision="highest") / max(hidden.shape[0] - 1, 1)
        variance, axes = jnp.linalg.eigh(cov)
        variance, axes = variance[::-1][: self.hidden_dim], axes[:, ::-1][:, : self.hidden_dim]
        deviation = jnp.sqrt(jnp.maximum(variance, 1e-6))
        # Directions in which a small sample does not vary are arbitrary: whitened, they would
        # drown the others on any other text.
        is_fitted = variance > 1e-6 * variance[0]
        return Projection(
            mean, jnp.where(is_fitted[None], axes / (deviation**self.whitening)[None], 0.0)
        )

    def __call__(
        self,
        projection: Projection,
        hidden: Float[Array, "B S D"],
        tokens: Integer[Array, "B S"],
    ) -> Float[Array, "B S W"]:
        """Context vectors of every position; position s depends on tokens up to s.

        Args:
            projection: from `fit`.
            hidden: [B, S, D] the model's last hidden states.
            tokens: [B, S] the model's inputs.

        Returns:
            [B, S, dim] float32 unit vectors.
        """
        centred = hidden.astype(jnp.float32) - projection.mean[None, None]
        mapped = jnp.matmul(centred, projection.matrix, precision="highest")
        inward = normalize(mapped)
        if not self.signature_dim:
            return inward
        exact = signature(tokens, self.lengths, self.signature_dim)
        share = self.hidden_share
        return normalize(jnp.concatenate([share**0.5 * inward, (1 - share) ** 0.5 * exact], -1))


def signature(
    tokens: Integer[Array, "B S"], lengths: tuple[int, ...], dim: int
) -> Float[Array, "B S W"]:
    """A vector whose inner products count at how many lengths two contexts are the same.

    For each length n a vector of signs is drawn by a hash of the last n tokens: the same tokens
    give the same signs, others give signs at random (a random projection of one-hot n-grams,
    Achlioptas 2003). Their mean has an inner product of about the share of lengths that agree,
    give or take 1 / sqrt(dim).

    Args:
        tokens: [B, S], of any integer dtype, at least 0; before the first token stands a symbol of
            its own.
        lengths: numbers of last tokens.
        dim: W, a multiple of 32.

    Returns:
        [B, S, W] float32 of about unit length; position s depends on tokens up to s.

    Example:
        >>> import jax.numpy as jnp
        >>> a = signature(jnp.array([[1, 2, 3, 7, 2, 3]]), (1, 2), 1024)[0]
        >>> bool(a[2] @ a[5] > 0.9), bool(a[2] @ a[4] < 0.5)
        (True, True)
    """
    wanted = {n: i for i, n in enumerate(sorted(set(lengths)))}
    tokens = tokens.astype(jnp.int32)
    code, codes = jnp.zeros(tokens.shape, jnp.uint32), {}
    for back in range(max(lengths)):
        shifted = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)[:, : tokens.shape[1]]
        code = _mix(code ^ (shifted + 2).astype(jnp.uint32))
        if back + 1 in wanted:
            codes[back + 1] = code
    code = jnp.stack([codes[n] for n in lengths], axis=-1)[..., None]
    lane = jnp.arange(dim // _BITS, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    words = _mix(code ^ lane[None, None, None])[..., None]
    bits = (words >> jnp.arange(_BITS, dtype=jnp.uint32)[None, None, None, None]) & 1
    signs = 2.0 * bits.astype(jnp.float32) - 1.0
    # Sums of signs are whole numbers, so their order does not matter.
    total = jnp.sum(signs, axis=2).reshape(*tokens.shape, dim)
    return total / (len(lengths) * dim) ** 0.5


def _mix(code: Array) -> Array:
    """Murmur's finaliser after an addition, which keeps zero from staying zero."""
    code = code + jnp.uint32(0x9E3779B9)
    code = (code ^ (code >> 16)) * jnp.uint32(0x85EBCA6B)
    code = (code ^ (code >> 13)) * jnp.uint32(0xC2B2AE35)
    return code ^ (code >> 16)
