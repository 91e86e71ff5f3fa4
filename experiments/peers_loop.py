"""Cases of `peers.py`: a plain loop over transformer experts, each on every token, then masked."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import NUM_INPUTS, Row, figures, time_calls
from peers_blocks import device, normal, peak_bytes, wait
from torch import nn
from workloads import BALANCED, LayerShape, TransformerSizes, draw_choices, max_over_mean

DROPOUT = 0.1
LEARNING_RATE = 1e-4


class Expert(nn.Module):
    """The original's expert; parameters are named as in its state dict.

    Args:
        sizes: D, H, O and heads.
    """

    def __init__(self, sizes: TransformerSizes) -> None:
        super().__init__()
        h = sizes.hidden
        self.encoder = nn.Sequential(
            nn.Linear(sizes.dim, h), nn.LayerNorm(h), nn.GELU(), nn.Dropout(DROPOUT)
        )
        self.processor = nn.TransformerEncoderLayer(
            h, sizes.heads, 4 * h, DROPOUT, activation="gelu", batch_first=True, norm_first=True
        )
        self.decoder = nn.Sequential(
            nn.Linear(h, h), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(h, sizes.output)
        )
        self.confidence_head = nn.Linear(h, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, S, D] -> output [B, S, O] and confidence [B, S]."""
        hidden = self.processor(self.encoder(x))
        return self.decoder(hidden), torch.sigmoid(self.confidence_head(hidden))[..., 0]


def loop_over_experts(
    experts: nn.ModuleList, x: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Runs every expert that some token chose on all of x [B, S, D], and masks.

    Args:
        experts: E of them.
        x: [B, S, D].
        chosen: [B, S, K] expert ids.
        weight: [B, S, K].
    """
    total = 0
    for e, expert in enumerate(experts):
        is_chosen = chosen == e
        if is_chosen.any():
            share = (weight * is_chosen).sum(dim=-1, keepdim=True)
            total = total + share * expert(x)[0]
    return total


@dataclasses.dataclass(frozen=True)
class LoopCase:
    """The original's way with its experts.

    Attributes:
        step: "forward" or "training".
        batch: B.
        length: S.
        params: "float32" (under autocast) or "bfloat16".
        sizes: of the experts.
        flags: none.
    """

    step: str
    batch: int
    length: int
    params: str
    sizes: TransformerSizes
    flags: str = ""

    @property
    def name(self) -> str:
        """What `--only` selects by."""
        return f"loop/{self.step}/{self.batch}x{self.length}/{self.params}"

    @property
    def beside(self) -> str:
        """The case of `bench.py` that does the same; it trains in float32 alone."""
        if self.step == "training":
            return f"training/step/{self.batch}x{self.length}/float32"
        return f"system/forward/{self.batch}x{self.length}/{self.params}"

    def measure(self, options: argparse.Namespace) -> list[Row]:
        """Runs the case and takes its figures."""
        sizes, trains = self.sizes, self.step == "training"
        dtype = getattr(torch, self.params)
        with device():
            experts = nn.ModuleList(Expert(sizes) for _ in range(sizes.experts)).to(dtype)
        experts.train(trains)
        shape = LayerShape(0, 0, sizes.experts, sizes.chosen, self.batch * self.length)
        drawn = [draw_choices(shape, BALANCED, seed) for seed in range(NUM_INPUTS)]
        tokens = self.batch, self.length
        x = [normal(*tokens, sizes.dim).to(dtype) for _ in drawn]
        routed = [
            [torch.from_numpy(a).to(device()).reshape(*tokens, -1) for a in each] for each in drawn
        ]
        amp = torch.autocast(device().type, torch.bfloat16, enabled=self.params == "float32")
        step = self._training(experts, x, routed, amp) if trains else None

        def call(i: int) -> torch.Tensor:
            i %= NUM_INPUTS
            if step is not None:
                return step(i)
            with torch.no_grad(), amp:
                return loop_over_experts(experts, x[i], *routed[i])

        times, result = time_calls(call, wait, options.repeats)
        if not bool(torch.isfinite(result).all()):
            raise FloatingPointError("there are numbers that are not finite")
        params = sum(p.numel() * p.element_size() for p in experts.parameters())
        out = self.batch * self.length * (4 * sizes.dim + 2 * sizes.output)
        flops = sizes.flops_per_token(self.length, 1.0) * self.batch * self.length
        row = figures(
            self.name,
            times,
            flops=flops * (3 if trains else 1),
            least_bytes=float(params * (6 if trains else 1) + out),
            peak_bytes=peak_bytes(),
            samples=self.batch,
            load=float(np.mean([max_over_mean(e, sizes.experts) for e, _ in drawn])),
            dropped=0.0,
        )
        return [row | {"beside": self.beside}]

    def _training(self, experts: nn.ModuleList, x: list, routed: list, amp: Any) -> Callable:
        """A step of AdamW on squared error to random targets."""
        optimizer = torch.optim.AdamW(experts.parameters(), lr=LEARNING_RATE)

        def step(i: int) -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with amp:
                y = loop_over_experts(experts, x[i], *routed[i])
            loss = (y.float() - torch.randn(y.shape, device=y.device)).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step


def cases(smoke: bool) -> list[LoopCase]:
    """The seed defaults at two sizes of batch, or tiny ones."""
    sizes = TransformerSizes(32, 64, 32, 4, 2) if smoke else TransformerSizes()
    return [
        LoopCase(step, batch, length, params, sizes)
        for batch, length in (((2, 16),) if smoke else ((8, 128), (32, 512)))
        for step in ("forward", "training")
        for params in ("float32", "bfloat16")
    ]
