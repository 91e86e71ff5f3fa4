"""The original system's weights, to and from this library's variables.

PyTorch itself is not needed: a state dict is a mapping from names to arrays, or to anything that
`numpy.asarray` takes, such as CPU tensors.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from moe_jax._types import Variables
from moe_jax.config import MoEConfig

# (name in the original, path here). Matrices are transposed: PyTorch's are [out, in].
_EXPERT = (
    ("encoder.0.weight", "encoder/kernel"),
    ("encoder.0.bias", "encoder/bias"),
    ("encoder.1.weight", "encoder_norm/norm/scale"),
    ("encoder.1.bias", "encoder_norm/norm/bias"),
    ("processor.self_attn.in_proj_weight", "attention/qkv/kernel"),
    ("processor.self_attn.in_proj_bias", "attention/qkv/bias"),
    ("processor.self_attn.out_proj.weight", "attention/out/kernel"),
    ("processor.self_attn.out_proj.bias", "attention/out/bias"),
    ("processor.linear1.weight", "feed_forward_up/kernel"),
    ("processor.linear1.bias", "feed_forward_up/bias"),
    ("processor.linear2.weight", "feed_forward_down/kernel"),
    ("processor.linear2.bias", "feed_forward_down/bias"),
    ("processor.norm1.weight", "attention_norm/norm/scale"),
    ("processor.norm1.bias", "attention_norm/norm/bias"),
    ("processor.norm2.weight", "feed_forward_norm/norm/scale"),
    ("processor.norm2.bias", "feed_forward_norm/norm/bias"),
    ("decoder.0.weight", "decoder_hidden/kernel"),
    ("decoder.0.bias", "decoder_hidden/bias"),
    ("decoder.3.weight", "decoder_out/kernel"),
    ("decoder.3.bias", "decoder_out/bias"),
    ("confidence_head.weight", "confidence/read_out/kernel"),
    ("confidence_head.bias", "confidence/read_out/bias"),
)
_SPECIALIST_ROUTER = (
    ("specialist_router.weight", "specialist_router/kernel"),
    ("specialist_router.bias", "specialist_router/bias"),
)
_SUPERVISOR = (
    ("gate.0.weight", "gate_hidden/kernel"),
    ("gate.0.bias", "gate_hidden/bias"),
    ("gate.2.weight", "gate_out/kernel"),
    ("gate.2.bias", "gate_out/bias"),
    ("attention.out_proj.weight", "attention/out/kernel"),
    ("attention.out_proj.bias", "attention/out/bias"),
)
_LIBRARIAN = (
    ("dedup_encoder.0.weight", "encoder_hidden/kernel"),
    ("dedup_encoder.0.bias", "encoder_hidden/bias"),
    ("dedup_encoder.1.weight", "encoder_norm/norm/scale"),
    ("dedup_encoder.1.bias", "encoder_norm/norm/bias"),
    ("dedup_encoder.3.weight", "encoder_out/kernel"),
    ("dedup_encoder.3.bias", "encoder_out/bias"),
)
# Has no counterpart in the computation here; carried along so that nothing is lost on the way
# back.
_INTEGRATOR = (
    ("kg_integrator.0.weight", "integrator_hidden/kernel"),
    ("kg_integrator.0.bias", "integrator_hidden/bias"),
    ("kg_integrator.2.weight", "integrator_out/kernel"),
    ("kg_integrator.2.bias", "integrator_out/bias"),
)

_Table = tuple[tuple[str, str], ...]


def from_state_dict(state_dict: Mapping[str, Any], config: MoEConfig) -> Variables:
    """Turns the original system's state dict into variables of `moe_jax.MoESystem`.

    The original lists its experts and supervisor twice, as ``experts.*`` and as
    ``constellation.experts.*``; either or both may be there, and both must agree.

    Args:
        state_dict: names to arrays or CPU tensors.
        config: of the system; `moe_jax.config.original` with the right sizes computes what the
            original computes.

    Returns:
        ``{"params": ...}``, float32 numpy arrays, to pass to ``MoESystem(config).apply``.

    Raises:
        ValueError: a name is missing or unknown, the two copies differ, or a shape disagrees
            with the config.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax import MoESystem
        >>> from moe_jax.config import tiny
        >>> system = MoESystem(tiny())
        >>> variables = jax.jit(system.init)(jax.random.key(0), jnp.ones((2, 16, 32)))
        >>> back = from_state_dict(to_state_dict(variables), tiny())
        >>> bool((back["params"]["constellation"]["expert_embeddings"]
        ...       == variables["params"]["constellation"]["expert_embeddings"]).all())
        True
    """
    names = _merge_copies(state_dict)
    num_experts = len({n.split(".")[1] for n in names if n.startswith("experts.")})
    if num_experts != config.num_experts:
        raise ValueError(
            f"state_dict has {num_experts} experts, but config.num_experts={config.num_experts}"
        )
    experts = [expert_params(_take(names, f"experts.{e}.")) for e in range(num_experts)]
    flat = [flatten_dict(expert, sep="/") for expert in experts]
    stacked = {path: np.stack([expert[path] for expert in flat]) for path in flat[0]}
    librarian = _take(names, "librarian.")
    params = {
        "constellation": {
            "expert_embeddings": _pop(names, "expert_embeddings"),
            "supervisor": supervisor_params(_take(names, "supervisor.")),
            "bank": {"expert": unflatten_dict(stacked, sep="/")},
        },
    }
    if librarian:
        params["librarian"] = librarian_params(librarian)
    if names:
        raise ValueError(f"state_dict has unknown names: {', '.join(sorted(names))}")
    _check_widths(params, config)
    return {"params": params}


def to_state_dict(variables: Variables) -> dict[str, np.ndarray]:
    """Turns variables of a `moe_jax.MoESystem` into the original's state dict.

    The inverse of `from_state_dict`; experts and supervisor appear twice, as in the original.

    Args:
        variables: ``{"params": ...}`` of a system with "transformer" or "specialized" experts.

    Returns:
        Names to float32 numpy arrays.

    Raises:
        ValueError: the system has parameters that the original cannot hold.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from moe_jax import MoESystem
        >>> from moe_jax.config import tiny
        >>> variables = jax.jit(MoESystem(tiny()).init)(jax.random.key(0), jnp.ones((2, 16, 32)))
        >>> to_state_dict(variables)["experts.3.confidence_head.weight"].shape
        (1, 64)
    """
    params = {name: dict(part) for name, part in variables["params"].items()}
    constellation = params.pop("constellation")
    bank = flatten_dict(constellation["bank"]["expert"], sep="/")
    shared: dict[str, np.ndarray] = {}
    for e in range(len(next(iter(bank.values())))):
        one = {path: np.asarray(value[e]) for path, value in bank.items()}
        shared |= _prefixed(f"experts.{e}.", _expert_names(one))
    supervisor = flatten_dict(constellation["supervisor"], sep="/")
    shared |= _prefixed("supervisor.", _supervisor_names(supervisor))
    result = dict(shared)
    result["constellation.expert_embeddings"] = np.asarray(constellation["expert_embeddings"])
    result |= _prefixed("constellation.", shared)
    if "librarian" in params:
        librarian = flatten_dict(params.pop("librarian"), sep="/")
        result |= _prefixed("librarian.", _names(librarian, _LIBRARIAN + _INTEGRATOR))
        _refuse_rest(librarian)
    _refuse_rest(params)
    return result


def expert_params(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of one `TransformerExpert` or `SpecializedExpert`.

    Args:
        state_dict: names such as ``encoder.0.weight``; with ``specialists.*`` for a specialised
            expert.

    Returns:
        A tree to pass as ``{"params": tree}``.

    Raises:
        ValueError: a name is missing or unknown.

    Example:
        >>> expert_params({"encoder.0.weight": [[1.0]]})
        Traceback (most recent call last):
        ...
        ValueError: state_dict lacks 'encoder.0.bias'
    """
    names = dict(state_dict)
    flat = _paths(names, _EXPERT)
    count = len({n.split(".")[1] for n in names if n.startswith("specialists.")})
    if count:
        weights = [_pop(names, f"specialists.{i}.0.weight") for i in range(count)]
        flat["specialists/kernel"] = np.stack(weights).transpose(2, 0, 1)
        biases = [_pop(names, f"specialists.{i}.0.bias") for i in range(count)]
        flat["specialists/bias"] = np.stack(biases)
        flat |= _paths(names, _SPECIALIST_ROUTER)
    return _finished(flat, names)


def supervisor_params(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a `Supervisor`.

    Args:
        state_dict: names such as ``gate.0.weight`` and ``attention.in_proj_weight``.

    Returns:
        A tree to pass as ``{"params": tree}``.

    Raises:
        ValueError: a name is missing or unknown.

    Example:
        >>> supervisor_params({})
        Traceback (most recent call last):
        ...
        ValueError: state_dict lacks 'gate.0.weight'
    """
    names = dict(state_dict)
    flat = _paths(names, _SUPERVISOR)
    weight, bias = (_pop(names, f"attention.in_proj_{part}") for part in ("weight", "bias"))
    width = weight.shape[1]
    flat["attention/query/kernel"], flat["attention/query/bias"] = weight[:width].T, bias[:width]
    flat["attention/key_value/kernel"] = weight[width:].T
    flat["attention/key_value/bias"] = bias[width:]
    return _finished(flat, names)


def librarian_params(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a `Librarian`, and the original's graph integrator carried along.

    Args:
        state_dict: names such as ``dedup_encoder.0.weight`` and ``kg_integrator.0.weight``.

    Returns:
        A tree to pass as ``{"params": tree}``.

    Raises:
        ValueError: a name is missing or unknown.

    Example:
        >>> librarian_params({})
        Traceback (most recent call last):
        ...
        ValueError: state_dict lacks 'dedup_encoder.0.weight'
    """
    names = dict(state_dict)
    flat = _paths(names, _LIBRARIAN)
    if any(name.startswith("kg_integrator.") for name in names):
        flat |= _paths(names, _INTEGRATOR)
    return _finished(flat, names)


def _merge_copies(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """One copy of each array, without the prefix ``constellation.``."""
    merged: dict[str, Any] = {}
    for name, value in state_dict.items():
        short = name.removeprefix("constellation.")
        if short in merged and not np.array_equal(_array(merged[short]), _array(value)):
            raise ValueError(f"state_dict holds two different arrays for {short!r}")
        merged[short] = value
    return merged


def _expert_names(flat: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    result = _names(flat, _EXPERT)
    if "specialists/kernel" in flat:
        kernel, bias = flat.pop("specialists/kernel"), flat.pop("specialists/bias")
        for i in range(len(bias)):
            result[f"specialists.{i}.0.weight"] = kernel[:, i].T
            result[f"specialists.{i}.0.bias"] = bias[i]
        result |= _names(flat, _SPECIALIST_ROUTER)
    _refuse_rest(flat)
    return result


def _supervisor_names(flat: dict[str, Any]) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(value) for path, value in flat.items()}
    result = _names(flat, _SUPERVISOR)
    for part, join in (("kernel", lambda a: np.concatenate(a, axis=1).T), ("bias", np.concatenate)):
        pair = [flat.pop(f"attention/query/{part}"), flat.pop(f"attention/key_value/{part}")]
        result[f"attention.in_proj_{'weight' if part == 'kernel' else 'bias'}"] = join(pair)
    _refuse_rest(flat)
    return result


def _paths(names: dict[str, Any], table: _Table) -> dict[str, np.ndarray]:
    arrays = ((path, _pop(names, name)) for name, path in table)
    return {path: array.T if array.ndim == 2 else array for path, array in arrays}


def _names(flat: dict[str, Any], table: _Table) -> dict[str, np.ndarray]:
    found = ((name, flat.pop(path)) for name, path in table if path in flat)
    return {name: np.asarray(value).T for name, value in found}


def _take(names: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): names.pop(n) for n in list(names) if n.startswith(prefix)}


def _pop(names: dict[str, Any], name: str) -> np.ndarray:
    if name not in names:
        raise ValueError(f"state_dict lacks {name!r}")
    return _array(names.pop(name))


def _array(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32)


def _finished(flat: dict[str, np.ndarray], names: dict[str, Any]) -> dict[str, Any]:
    if names:
        raise ValueError(f"state_dict has unknown names: {', '.join(sorted(names))}")
    return unflatten_dict(flat, sep="/")


def _prefixed(prefix: str, names: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: value for name, value in names.items()}


def _refuse_rest(rest: Mapping[str, Any]) -> None:
    if rest:
        raise ValueError(f"the original has no place for the parameters {', '.join(sorted(rest))}")


def _check_widths(params: dict[str, Any], config: MoEConfig) -> None:
    expert = params["constellation"]["bank"]["expert"]
    widths = {
        "input_dim": expert["encoder"]["kernel"].shape[1],
        "hidden_dim": expert["encoder"]["kernel"].shape[2],
        "output_dim": expert["decoder_out"]["kernel"].shape[2],
    }
    for name, width in widths.items():
        if width != getattr(config, name):
            raise ValueError(
                f"state_dict has {name} {width}, but config.{name}={getattr(config, name)}"
            )
