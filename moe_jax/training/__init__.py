"""Training: state and optimizer, jitted steps, the loop, metrics."""

from moe_jax.training.copies import matrix_copies as matrix_copies
from moe_jax.training.copies import with_copies as with_copies
from moe_jax.training.loop import Evaluator as Evaluator
from moe_jax.training.loop import TrainResult as TrainResult
from moe_jax.training.loop import train as train
from moe_jax.training.metrics import JsonLines as JsonLines
from moe_jax.training.metrics import as_record as as_record
from moe_jax.training.metrics import health_record as health_record
from moe_jax.training.metrics import read_metrics as read_metrics
from moe_jax.training.metrics import summarise_eval as summarise_eval
from moe_jax.training.state import TrainState as TrainState
from moe_jax.training.state import create_graph as create_graph
from moe_jax.training.state import create_state as create_state
from moe_jax.training.state import make_optimizer as make_optimizer
from moe_jax.training.step import EvalSums as EvalSums
from moe_jax.training.step import Metrics as Metrics
from moe_jax.training.step import make_eval_step as make_eval_step
from moe_jax.training.step import make_train_step as make_train_step
from moe_jax.training.step import write_before_update as write_before_update
from moe_jax.training.stream import StreamSums as StreamSums
from moe_jax.training.stream import TokenReader as TokenReader
from moe_jax.training.stream import fit_interpolation as fit_interpolation
from moe_jax.training.stream import make_stream_step as make_stream_step
from moe_jax.training.stream_eval import evaluate_token_memory as evaluate_token_memory
from moe_jax.training.stream_reader import Reading as Reading
from moe_jax.training.stream_reader import StreamReader as StreamReader
