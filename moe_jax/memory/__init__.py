"""Reading the knowledge graph back: attention over values, and interpolation with next symbols."""

from moe_jax.memory.context import ContextVectors as ContextVectors
from moe_jax.memory.context import Projection as Projection
from moe_jax.memory.context import signature as signature
from moe_jax.memory.interpolation import Evidence as Evidence
from moe_jax.memory.interpolation import MemoryInterpolation as MemoryInterpolation
from moe_jax.memory.interpolation import gather_evidence as gather_evidence
from moe_jax.memory.interpolation import memory_distribution as memory_distribution
from moe_jax.memory.interpolation import memory_weights as memory_weights
from moe_jax.memory.reader import MemoryReader as MemoryReader
from moe_jax.memory.reader import Reads as Reads
from moe_jax.memory.reader import note_reads as note_reads
from moe_jax.memory.tokens import read_tokens as read_tokens
from moe_jax.memory.tokens import shuffle_symbols as shuffle_symbols
from moe_jax.memory.tokens import write_tokens as write_tokens
