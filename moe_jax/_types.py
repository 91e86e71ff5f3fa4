"""The one alphabet of axis names, as jaxtyping aliases.

B batch, S sequence, T tokens (B*S), D input width, H hidden width, O output width, E experts,
K chosen experts, C capacity, G routing groups, N node slots, M edge slots per node, Q queries,
R results or reports, V vocabulary.
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, Integer, Key, UInt32

__all__ = ["Array", "Bool", "Dtype", "Float", "Int", "Integer", "PRNGKey", "UInt32", "Variables"]

PRNGKey = Key[Array, ""] | UInt32[Array, "2"]
Dtype = Any
Variables = Any
