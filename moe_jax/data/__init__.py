"""Data: a byte-level text corpus, its windows, and the baselines a model must beat."""

from moe_jax.data.baselines import ContextModel as ContextModel
from moe_jax.data.baselines import xz_bits_per_byte as xz_bits_per_byte
from moe_jax.data.held_out import Sample as Sample
from moe_jax.data.held_out import held_out_batches as held_out_batches
from moe_jax.data.held_out import held_out_bytes as held_out_bytes
from moe_jax.data.provenance import Manifest as Manifest
from moe_jax.data.provenance import Snippet as Snippet
from moe_jax.data.provenance import corpus_from_manifest as corpus_from_manifest
from moe_jax.data.provenance import load_manifest as load_manifest
from moe_jax.data.provenance import locate as locate
from moe_jax.data.provenance import manifest as manifest
from moe_jax.data.provenance import save_manifest as save_manifest
from moe_jax.data.stream import stream_batches as stream_batches
from moe_jax.data.text import Corpus as Corpus
from moe_jax.data.text import Skipped as Skipped
from moe_jax.data.text import load_corpus as load_corpus
from moe_jax.data.windows import BOS as BOS
from moe_jax.data.windows import VOCAB_SIZE as VOCAB_SIZE
from moe_jax.data.windows import Batch as Batch
from moe_jax.data.windows import TrainBatches as TrainBatches
from moe_jax.data.windows import training_batches as training_batches
