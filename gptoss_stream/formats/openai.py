"""OpenAI's own format: the folder `original/` of the released repositories.

q, k and v are one tensor, one after another in this order. Source of names, shapes and settings
that config.json does not have: openai/gpt-oss, `gpt_oss/torch/model.py` and
`gpt_oss/torch/weights.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .._utils import strict_json
from ..checkpoint.metadata import CheckpointInfo
from ..errors import ConfigError
from ..model.config import ModelConfig, alternating_layers, integer, number, yarn_attention_factor
from ..tensors.dtypes import DType
from ._rotary import parse_rope
from ._table import Mxfp4Encoding, Row, Table

__all__ = ["LIBRARY", "LOADING", "TABLE", "check", "detect", "files", "parse_config", "read_model"]

_BLOCK = "block.{l}."
_ATTENTION, _MLP = _BLOCK + "attn.", _BLOCK + "mlp."
_MXFP4 = Mxfp4Encoding(".blocks", ".scales")

# fmt: off
TABLE: Table = (
    Row("embedding.weight", "embed", "v m"),
    Row(_ATTENTION + "norm.scale", "attn_norm", "m"),
    Row(_ATTENTION + "qkv.weight", "q", "(n h) m"),
    Row(_ATTENTION + "qkv.weight", "k", "(k h) m"),
    Row(_ATTENTION + "qkv.weight", "v", "(k h) m"),
    Row(_ATTENTION + "qkv.bias", "q_bias", "(n h)"),
    Row(_ATTENTION + "qkv.bias", "k_bias", "(k h)"),
    Row(_ATTENTION + "qkv.bias", "v_bias", "(k h)"),
    Row(_ATTENTION + "out.weight", "o", "m (n h)"),
    Row(_ATTENTION + "out.bias", "o_bias", "m"),
    Row(_ATTENTION + "sinks", "sinks", "n"),
    Row(_MLP + "norm.scale", "mlp_norm", "m"),
    Row(_MLP + "gate.weight", "router", "e m"),
    Row(_MLP + "gate.bias", "router_bias", "e"),
    Row(_MLP + "mlp1_weight", "gate_up", "e (i t) m", encoding=_MXFP4),
    Row(_MLP + "mlp1_bias", "gate_up_bias", "e (i t)"),
    Row(_MLP + "mlp2_weight", "down", "e m i", encoding=_MXFP4),
    Row(_MLP + "mlp2_bias", "down_bias", "e m"),
    Row("norm.scale", "final_norm", "m"),
    Row("unembedding.weight", "unembed", "v m"),
)
# fmt: on

LIBRARY = "gpt-oss"

LOADING = """from gpt_oss.torch.model import Transformer

model = Transformer.from_checkpoint(folder, device="cuda")"""

_LENGTH = "original_max_position_embeddings"
_ROPE_NAMES = {
    "rope_scaling_factor": "factor",
    "rope_ntk_beta": "beta_fast",
    "rope_ntk_alpha": "beta_slow",
    "initial_context_length": _LENGTH,
}
"""OpenAI's entries for the rotary embedding, and the names of the same in `ModelConfig.rope`."""


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by the fused qkv tensor, and by a config.json without model type."""
    if info.config_name != "config.json" or "model_type" in info.config:
        return None
    ends = (".attn.qkv.weight", ".attn.sinks")
    found = next((n for n in info.tensors if n.startswith("block.") and n.endswith(ends)), None)
    if found is None:
        return None
    return f"config.json has no model_type, and the tensors OpenAI's names ({found})"


def read_model(info: CheckpointInfo) -> ModelConfig:
    """See `Format.read_model`."""
    return parse_config(info.config)


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that OpenAI's config.json describes.

    Raises:
        ConfigError: If it does not describe one.
    """
    num_layers = integer(config, "num_hidden_layers")
    head_dim = integer(config, "head_dim")
    theta, rope = _parse_rope(config, head_dim)
    positions = rope.get(_LENGTH, 131_072) * rope.get("factor", 1.0)
    if positions > 2**53:
        raise ConfigError(
            "config.json: initial_context_length times rope_scaling_factor is too large"
        )
    return ModelConfig(
        num_layers=num_layers,
        num_experts=integer(config, "num_experts"),
        experts_per_token=integer(config, "experts_per_token", 4),
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        intermediate_size=integer(config, "intermediate_size"),
        num_heads=integer(config, "num_attention_heads"),
        num_kv_heads=integer(config, "num_key_value_heads"),
        head_dim=head_dim,
        layer_types=alternating_layers(num_layers),
        sliding_window=integer(config, "sliding_window", 128),
        max_position_embeddings=round(positions),
        rope_theta=theta,
        rope=rope,
        swiglu_limit=number(config, "swiglu_limit", 7.0),
    )


def _parse_rope(config: Mapping[str, Any], head_dim: int) -> tuple[float, dict[str, Any]]:
    """Return the base and the settings of the rotary embedding (see `parse_rope`).

    Some programs replace OpenAI's entries by Hugging Face's `rope_parameters` or `rope_scaling`
    (huggingface/transformers#42007). If the configuration has both kinds, they must agree.
    """
    settings = {
        "rope_type": "yarn",
        "factor": number(config, "rope_scaling_factor", 32.0),
        "beta_fast": number(config, "rope_ntk_beta", 32.0),
        "beta_slow": number(config, "rope_ntk_alpha", 1.0),
        "truncate": False,
        _LENGTH: integer(config, "initial_context_length", integer(config, _LENGTH, 4096)),
    }
    own = parse_rope({**config, "rope_scaling": settings, "rope_parameters": None}, head_dim)
    for name, key in _ROPE_NAMES.items():
        if own[1][key] != settings[key]:
            raise ConfigError(
                f"config.json: {name} is {settings[key]:g}, which is 0 or contradicts "
                f"{key} {own[1][key]:g}; correct it"
            )
    if not config.get("rope_scaling") and config.get("rope_parameters") is None:
        return own
    theta, rope = parse_rope(config, head_dim)
    found = config.get("rope_scaling") or config["rope_parameters"]
    if rope["rope_type"] not in ("yarn", "default"):
        raise ConfigError(
            f"config.json: rotary embeddings of the type {rope['rope_type']!r}, which a "
            "configuration with OpenAI's entries cannot have"
        )
    if rope["rope_type"] == "yarn" and _LENGTH not in {**config, **found}:
        raise ConfigError(f"config.json: the rotary settings have no {_LENGTH}; add it")
    for name, key in _ROPE_NAMES.items():
        if name in config and rope.get(key) != own[1][key]:
            raise ConfigError(
                f"config.json: {name} is {own[1][key]:g}, and the rotary settings beside it have "
                f"{key} {rope.get(key)}; remove the ones that are wrong"
            )
    is_own = any(name in config for name in _ROPE_NAMES if name.startswith("rope_"))
    if is_own and (
        rope["truncate"] or yarn_attention_factor(rope) != yarn_attention_factor(own[1])
    ):
        raise ConfigError(
            "config.json: the rotary settings have truncate (the default) or an attention factor, "
            'which contradicts the rope_* entries beside them; add "truncate": false, or remove '
            "what is wrong"
        )
    if "rope_theta" in config and theta != own[0]:
        raise ConfigError(
            f"config.json: rope_theta is {own[0]:g}, and the one in the rotary settings {theta:g}; "
            "remove the wrong one"
        )
    return theta, rope


def check(model: ModelConfig) -> None:
    """See `Format.check`: OpenAI's code has fixed values for these settings."""
    rope = model.rope
    found = {
        "layer_types": list(model.layer_types),
        "sliding_window": model.sliding_window is not None,
        "rms_norm_eps": model.rms_norm_eps,
        "swiglu_alpha": model.swiglu_alpha,
        "hidden_act": model.hidden_act,
        "rope_type": model.rope_type,
    }
    fixed: dict[str, Any] = {
        "layer_types": list(alternating_layers(model.num_layers)),
        "sliding_window": True,
        "rms_norm_eps": 1e-5,
        "swiglu_alpha": 1.702,
        "hidden_act": "silu",
        "rope_type": "yarn",
    }
    if model.rope_type == "yarn":
        found |= {
            "rope truncate": rope["truncate"],
            "rope attention_factor": yarn_attention_factor(rope),
        }
        fixed |= {
            "rope truncate": False,
            "rope attention_factor": yarn_attention_factor({"factor": rope["factor"]}),
        }
    for name, value in fixed.items():
        if found[name] != value:
            raise ConfigError(
                f"config.json: {name} is {_as_text(found[name])}, and OpenAI's code always "
                f"computes gpt-oss with {_as_text(value)}: its results would be wrong; choose "
                "another format"
            )
    _refuse_frequencies(model)


def _refuse_frequencies(model: ModelConfig) -> None:
    """Refuse YaRN settings for which OpenAI's code (`RotaryEmbedding`) fails or scales nothing.

    With a factor up to 1 it scales nothing, which is right for 1 only. With a larger one it
    interpolates between two dimensions and asserts 0 < low < high < head_dim / 2 - 1.
    """
    rope, half = model.rope, model.head_dim / 2
    factor, length = rope["factor"], rope[_LENGTH]
    if factor == 1:
        return
    betas = rope["beta_fast"], rope["beta_slow"]
    if factor > 1 and model.rope_theta > 1:
        low, high = (
            half * math.log(length / (beta * 2 * math.pi)) / math.log(model.rope_theta)
            for beta in betas
        )
        if 0 < low < high < half - 1:
            return
    raise ConfigError(
        f"config.json: YaRN with factor {factor:g}, {length} original positions and heads of "
        f"{model.head_dim} elements is what OpenAI's code cannot compute; choose another format"
    )


def _as_text(value: Any) -> str:
    """Return a setting as it is in JSON, shortened."""
    return str(value).lower() if isinstance(value, bool) else str(value)[:60]


def files(
    model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
) -> dict[str, bytes]:
    """See `Format.files`: OpenAI's config.json, named source_config.json for a partial model."""
    target = strict_json.dumps(openai_config(model))
    return {"source_config.json" if partial else "config.json": target}


def openai_config(model: ModelConfig) -> dict[str, Any]:
    """Return OpenAI's config.json for a model that `check` accepts."""
    return {
        "num_hidden_layers": model.num_layers,
        "num_experts": model.num_experts,
        "experts_per_token": model.experts_per_token,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "swiglu_limit": model.swiglu_limit,
        "head_dim": model.head_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "sliding_window": model.sliding_window,
        "initial_context_length": model.rope[_LENGTH],
        "rope_theta": model.rope_theta,
        "rope_scaling_factor": model.rope["factor"],
        "rope_ntk_alpha": model.rope["beta_slow"],
        "rope_ntk_beta": model.rope["beta_fast"],
    }
