"""Speed and memory of moe_jax on one device: `python experiments/bench.py --json bench.json`.

Every case runs in its own process, so that the allocator's peak is that case's alone; it includes
what building its parameters took. `--only` chooses groups by how names begin:

- `layer/swiglu-...`: one layer of SwiGLU experts whose choices are given, so that gathering by
  plan, the experts and the weighted combine are timed, not a router. `balanced` draws choices
  uniformly, `zipf` by Zipf's law over experts. `layer/grouped-...`: the grouped matmul by itself.
- `system/...` and `training/...`: `moe_jax.config.h100()`, the seed defaults in bfloat16 with tanh
  GELU, on random tokens. Training is squared error to random targets plus the auxiliary losses,
  AdamW in float32, state donated. A write reaches a graph that is half full, and since inputs
  rotate, most of what it writes after the warm-up merges.
- `memory/...`: search, insert and write of that graph by themselves, each call with new vectors.

Times are medians after a warm-up; "ms" waits for each call, "ms in a row" for the last of ten, or
of up to fifty short ones, and rates go by the latter. Inputs are random and rotate. Useful TFLOP/s
count what the K chosen experts must compute for the choices that were kept, never padding or empty
slots, and three times that for a step with a backward pass. "Of the matmul" is that over the rate
of a large bfloat16 product, "of the copy" what the case must read and write at least over the rate
of a large copy, both measured first in the same run. A case that fails says why, and the others go
on.

`--router balanced` first trains the balance of the router alone, by loss-free balancing on other
random tokens (see `bench_system.balance`), and training goes on balancing as the library's does.
"""

import argparse

import bench_grouped
import bench_layers
import bench_memory
import bench_system
import jax
import jax.numpy as jnp
import measuring
from measuring import Case, Row, time_calls


def cases(smoke: bool) -> list[Case]:
    """All cases, at the sizes of one large GPU or at tiny ones."""
    rooms = bench_layers, bench_grouped, bench_system, bench_memory
    return [case for room in rooms for case in room.cases(smoke)]


def ceilings(options: argparse.Namespace) -> Row:
    """What the machine gives at best: one large bfloat16 product, one large copy."""
    size, length = (1024, 2**24) if jax.default_backend() == "cpu" else (8192, 2**30)
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    large = jax.random.normal(jax.random.key(1), (length,))
    matmul, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)

    def seconds(function, *args):
        return time_calls(lambda i: function(*args), jax.block_until_ready, options.repeats)[0].row

    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflops": 2 * size**3 / seconds(matmul, a, b) / 1e12,
        "copy_tb_per_s": 2 * large.nbytes / seconds(copy, large) / 1e12,
    }


def main() -> None:
    parser = measuring.parser(__doc__.split("\n")[0])
    parser.add_argument(
        "--dispatch",
        choices=bench_layers.DISPATCHES,
        default="capacity",
        help="of layer and system",
    )
    parser.add_argument(
        "--capacity-factor", type=float, help="default: 1 for a layer, the preset's for a system"
    )
    parser.add_argument("--router", choices=("initial", "balanced"), default="initial")
    options = parser.parse_args()
    measuring.run(options, cases(options.smoke), ceilings)


if __name__ == "__main__":
    main()
