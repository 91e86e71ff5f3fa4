"""Experts: one file per kind, and the bank that stacks E of a kind."""

from moe_jax.experts.bank import ExpertBank as ExpertBank
from moe_jax.experts.base import ExpertOutput as ExpertOutput
from moe_jax.experts.base import LayerNorm as LayerNorm
from moe_jax.experts.by_row import Rows as Rows
from moe_jax.experts.feed_forward import MLPExpert as MLPExpert
from moe_jax.experts.feed_forward import SwiGLUExpert as SwiGLUExpert
from moe_jax.experts.transformer import SpecializedExpert as SpecializedExpert
from moe_jax.experts.transformer import TransformerExpert as TransformerExpert

EXPERTS = {
    "transformer": TransformerExpert,
    "specialized": SpecializedExpert,
    "mlp": MLPExpert,
    "swiglu": SwiGLUExpert,
}
