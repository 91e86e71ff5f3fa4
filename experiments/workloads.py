"""The work that `bench.py` and `peers.py` both do: shapes, routing, and what counts as useful.

Imports neither JAX nor PyTorch.
"""

import dataclasses

import numpy as np

FORWARD, BOTH = "forward", "forward+backward"
BALANCED, ZIPF = "balanced", "zipf"


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer of SwiGLU experts, D -> F -> D, without biases, in bfloat16.

    Attributes:
        dim: D.
        hidden: F, width inside an expert.
        experts: E.
        chosen: K.
        tokens: T.
    """

    dim: int
    hidden: int
    experts: int
    chosen: int
    tokens: int

    @property
    def name(self) -> str:
        """As it stands in a case's name."""
        return f"d{self.dim}-f{self.hidden}-e{self.experts}-k{self.chosen}-t{self.tokens}"

    def flops(self, passes: str, kept: float = 1.0) -> float:
        """Operations of the kept choices: three matrices of D * F, two per multiply-add.

        The backward pass takes each product twice more, for both of its factors.
        """
        forward = 2 * 3 * self.dim * self.hidden * self.chosen * self.tokens * kept
        return forward * (3 if passes == BOTH else 1)

    def least_bytes(self, passes: str, used: float) -> float:
        """What must move: tokens in and out, matrices once; backward, their gradients as well.

        Args:
            passes: forward, or both.
            used: experts that any token chose; nobody need read the matrices of others.
        """
        tokens = 2 * self.tokens * self.dim
        matrices = 3 * used * self.dim * self.hidden
        return 2 * (tokens + matrices) * (2 if passes == BOTH else 1)


@dataclasses.dataclass(frozen=True)
class TransformerSizes:
    """The standard expert and how many there are; the defaults are the seed's.

    Attributes:
        dim: D.
        hidden: H.
        output: O.
        experts: E.
        chosen: K.
        heads: of the attention.
    """

    dim: int = 512
    hidden: int = 2048
    output: int = 512
    experts: int = 32
    chosen: int = 3
    heads: int = 8

    def flops_per_token(self, length: int, kept: float) -> float:
        """Operations of one token's forward pass through its kept experts; nothing else counts.

        Two per multiply-add: the matrices of a transformer expert (encoder D*H, attention 4*H*H,
        feed-forward 8*H*H, decoder H*H and H*O), and the scores and mixing of attention over the
        K*S/E tokens that an expert holds of a sequence on average. Empty slots, tokens that did
        not choose the expert, the supervisor, the librarian and the graph are work, too, but not
        counted as useful.
        """
        h = self.hidden
        seen = self.chosen * length / self.experts * kept
        matrices = self.dim * h + 13 * h * h + h * self.output
        return 2 * (matrices + 2 * seen * h) * self.chosen * kept


LAYERS = (
    LayerShape(2048, 768, 128, 8, 16384),
    LayerShape(4096, 14336, 8, 2, 16384),
    LayerShape(4096, 512, 128, 8, 32768),
)
# One token for each sequence, as when text is written.
DECODING = tuple(
    LayerShape(*size, tokens)
    for size in ((2048, 768, 128, 8), (4096, 14336, 8, 2))
    for tokens in (1, 8, 64)
)
SMOKE_LAYER = LayerShape(64, 32, 8, 2, 128)
SMOKE_DECODING = LayerShape(64, 32, 8, 2, 1)


def shares(num_experts: int, skew: str, rng: np.random.Generator) -> np.ndarray:
    """float64 [E], how popular each expert is: alike, or by Zipf's law (1 / rank) in any order."""
    weight = np.ones(num_experts)
    if skew == ZIPF:
        weight = 1.0 / (1 + rng.permutation(num_experts))
    return weight / weight.sum()


def draw_choices(shape: LayerShape, skew: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The K experts of each token, drawn without replacement by their shares, and their weights.

    The largest K of log(share) plus Gumbel noise; the weights are a softmax over those K.

    Returns:
        int32 [T, K] experts, best first, and float32 [T, K] weights.
    """
    rng = np.random.default_rng((seed, shape.experts))
    share = shares(shape.experts, skew, rng)
    logits = np.log(share) + rng.gumbel(size=(shape.tokens, shape.experts))
    expert = np.argsort(-logits, axis=1)[:, : shape.chosen]
    best = np.take_along_axis(logits, expert, axis=1)
    weight = np.exp(best - best[:, :1])
    weight /= weight.sum(axis=1, keepdims=True)
    return expert.astype(np.int32), weight.astype(np.float32)


def draw_group_sizes(num_groups: int, rows: int, skew: str, seed: int) -> np.ndarray:
    """int32 [E] that sums to `rows`: shares of them, the largest remainders rounded up."""
    exact = shares(num_groups, skew, np.random.default_rng((seed, num_groups))) * rows
    sizes = np.floor(exact).astype(np.int32)
    sizes[np.argsort(sizes - exact, kind="stable")[: rows - sizes.sum()]] += 1
    return sizes


def number_used(expert: np.ndarray) -> int:
    """How many experts anybody chose."""
    return len(np.unique(expert))


def max_over_mean(expert: np.ndarray, num_experts: int) -> float:
    """The largest expert's load over the mean load."""
    load = np.bincount(expert.reshape(-1), minlength=num_experts)
    return float(load.max() / load.mean())
