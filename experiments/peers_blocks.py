"""Cases of `peers.py`: sparse blocks of transformers, and the PyTorch parts that peers share."""

import argparse
import contextlib
import dataclasses
from typing import Any

import numpy as np
import torch
from measuring import NUM_INPUTS, Row, figures, time_calls
from torch import nn
from workloads import (
    BALANCED,
    BOTH,
    DECODING,
    FORWARD,
    LAYERS,
    SMOKE_DECODING,
    SMOKE_LAYER,
    ZIPF,
    LayerShape,
    draw_choices,
    max_over_mean,
    number_used,
)


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(_: Any) -> None:
    """Waits for all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int | None:
    """Most memory in use."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Random bfloat16 numbers."""
    return torch.randn(shape, device=device(), dtype=torch.bfloat16) * scale


def sparse_block(shape: LayerShape) -> nn.Module:
    """Mixtral's block where experts are few, Qwen3-MoE's where they are many; by grouped_mm."""
    options = {
        "hidden_size": shape.dim,
        "num_experts_per_tok": shape.chosen,
        "experts_implementation": "grouped_mm",
    }
    if shape.experts <= 8:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        make = MixtralSparseMoeBlock
        config = MixtralConfig(
            intermediate_size=shape.hidden, num_local_experts=shape.experts, **options
        )
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        make = Qwen3MoeSparseMoeBlock
        config = Qwen3MoeConfig(
            moe_intermediate_size=shape.hidden,
            num_experts=shape.experts,
            norm_topk_prob=True,
            **options,
        )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with device():
        block = make(config)
    torch.set_default_dtype(default)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return block


@contextlib.contextmanager
def counted_grouped_mm():
    """Gives a list that grows with every call of PyTorch's grouped_mm."""
    calls, owner, name = [], torch, "_grouped_mm"
    if hasattr(nn.functional, "grouped_mm"):
        owner, name = nn.functional, "grouped_mm"
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A sparse block of transformers, or its experts alone.

    Attributes:
        part: "experts", which are given choices, or "block", which chooses itself.
        shape: sizes.
        passes: "forward", or "forward+backward".
        skew: of the given choices.
        flags: none.
    """

    part: str
    shape: LayerShape
    passes: str
    skew: str
    flags: str = ""

    @property
    def name(self) -> str:
        """What `--only` selects by."""
        skew = f"/{self.skew}" if self.part == "experts" else ""
        return f"{self.part}/swiglu-{self.shape.name}/{self.passes}{skew}"

    @property
    def beside(self) -> str:
        """The case of `bench.py` that does the same."""
        return f"layer/swiglu-{self.shape.name}/{self.passes}/{self.skew}"

    def measure(self, options: argparse.Namespace) -> list[Row]:
        """Runs the case and takes its figures."""
        shape = self.shape
        block = sparse_block(shape)
        size, leaf = (shape.tokens, shape.dim), self.passes == BOTH
        x = [normal(*size).requires_grad_(leaf) for _ in range(NUM_INPUTS)]
        dy = [normal(*size) for _ in range(NUM_INPUTS)]
        choices = [self._choices(block, x[i], i) for i in range(NUM_INPUTS)]

        def forward(i: int) -> torch.Tensor:
            if self.part == "block":
                return block(x[i][None])[0]
            return block.experts(x[i], *choices[i])

        with counted_grouped_mm() as calls, torch.no_grad():
            forward(0)
        if len(calls) != 2:
            raise RuntimeError(f"grouped_mm ran {len(calls)} times in a layer of two products")

        def call(i: int) -> torch.Tensor:
            i %= NUM_INPUTS
            if self.passes == FORWARD:
                with torch.no_grad():
                    return forward(i)
            for leaf in (*block.parameters(), x[i], choices[i][1]):
                leaf.grad = None
            y = forward(i)
            y.backward(dy[i])
            return y.detach()

        times, y = time_calls(call, wait, options.repeats)
        if not bool(torch.isfinite(y).all()):
            raise FloatingPointError("there are numbers that are not finite")
        experts = [expert.cpu().numpy() for expert, _ in choices]
        load = [max_over_mean(expert, shape.experts) for expert in experts]
        used = float(np.mean([number_used(expert) for expert in experts]))
        row = figures(
            self.name,
            times,
            flops=shape.flops(self.passes),
            least_bytes=shape.least_bytes(self.passes, used),
            peak_bytes=peak_bytes(),
            load=float(np.mean(load)),
            dropped=0.0,
        )
        return [row | {"beside": self.beside}]

    def _choices(self, block: nn.Module, x: torch.Tensor, seed: int) -> tuple:
        """The given choices, or those of the block's own router."""
        with torch.no_grad():
            _, own_weight, own = block.gate(x)
        if self.part == "block":
            return own, own_weight
        expert, weight = draw_choices(self.shape, self.skew, seed)
        weight = torch.from_numpy(weight).to(own_weight)
        return torch.from_numpy(expert).to(own), weight.requires_grad_(self.passes == BOTH)


def cases(smoke: bool) -> list[LayerCase]:
    """The shapes of `bench.py`, or two tiny ones for both kinds of block."""
    shapes = LAYERS if not smoke else (SMOKE_LAYER, dataclasses.replace(SMOKE_LAYER, experts=16))
    return [
        LayerCase(part, shape, passes, skew)
        for shape in shapes
        for passes in (FORWARD, BOTH)
        for part, skew in (("experts", BALANCED), ("experts", ZIPF), ("block", BALANCED))
    ] + [
        LayerCase(part, shape, FORWARD, BALANCED)
        for shape in ([SMOKE_DECODING] if smoke else DECODING)
        for part in ("experts", "block")
    ]
