"""The work of `bench.py` through PyTorch: `python experiments/peers.py --beside bench.json`.

- `experts/...`: the experts of transformers' Mixtral and Qwen3-MoE blocks, `grouped_mm`, given the
  very choices of `layer/swiglu-...` in `bench.py`, in the weights' dtype that the block's router
  gives. `block/...`: the whole sparse block with its own router, whose weights are random.
- `loop/...`: the standard transformer expert in plain PyTorch, in a loop over experts that runs
  each chosen one on every token and masks, as the original system does, at the seed defaults. It
  has no supervisor, librarian or graph, as `system/...` and `training/...` of `bench.py` have.
  "float32" is float32 parameters under bfloat16 autocast, "bfloat16" bfloat16 throughout, AdamW's
  moments included. GELU is exact and dropout 0.1, as in the original.

Columns, timing and counts are those of `bench.py`, the ceilings are measured through PyTorch, and
peaks are those of its allocator. `--beside` takes what `bench.py --json` wrote on the same machine
in the same run: the last column is moe_jax's useful TFLOP/s over this row's. PyTorch and
transformers are not needed by anything else here; without them this says so and exits with 2.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import measuring
from measuring import Case, Row, time_calls

NEEDED = "torch", "transformers"


def ceilings(options: argparse.Namespace) -> Row:
    """One large bfloat16 product, one large copy, as in `bench.py`, through PyTorch."""
    import torch
    import transformers
    from peers_blocks import device, normal, wait

    size, length = (8192, 2**30) if torch.cuda.is_available() else (1024, 2**24)
    a, b = normal(size, size), normal(size, size)
    large = torch.randn(length, device=device())
    copy = torch.empty_like(large)

    def seconds(function: Callable) -> float:
        return time_calls(lambda i: function(), wait, options.repeats)[0].row

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matmul_tflops": 2 * size**3 / seconds(lambda: a @ b) / 1e12,
        "copy_tb_per_s": 8 * length / seconds(lambda: torch.neg(large, out=copy)) / 1e12,
    }


def cases(smoke: bool) -> list[Case]:
    """All cases, at the sizes of one large GPU or at tiny ones."""
    import peers_blocks
    import peers_loop

    return [*peers_blocks.cases(smoke), *peers_loop.cases(smoke)]


def comparison(beside: Path | None) -> Callable[[Row], Row]:
    """Adds to a row what moe_jax reached in the same work, from a file of `bench.py`."""
    rows = json.loads(beside.read_text())["cases"] if beside else []
    ours = {row["case"]: row["useful_tflops"] for row in rows if "useful_tflops" in row}

    def compared(row: Row) -> Row:
        mine = ours.get(row.get("beside"))
        return row | {"ratio": mine / row["useful_tflops"]} if mine else row

    return compared


def main() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"peers.py needs {' and '.join(missing)}, not installed here", file=sys.stderr)
        raise SystemExit(2)
    parser = measuring.parser(__doc__.split("\n")[0])
    parser.add_argument("--beside", type=Path, help="a file that bench.py wrote, to compare with")
    options = parser.parse_args()
    measuring.run(options, cases(options.smoke), ceilings, comparison(options.beside))


if __name__ == "__main__":
    main()
