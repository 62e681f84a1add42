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
from ._table import Mxfp4Encoding, Row, Table

__all__ = ["TABLE", "check", "detect", "files", "parse_config", "read_model"]

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


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by the fused qkv tensor, and by a config.json without model type."""
    if info.config_name != "config.json" or "model_type" in info.config:
        return None
    if _ATTENTION.format(l=0) + "qkv.weight" not in info.tensors:
        return None
    return "config.json has no model_type, and the tensors OpenAI's names (block.0.attn.qkv.weight)"


def read_model(info: CheckpointInfo) -> ModelConfig:
    """See `Format.read_model`."""
    return parse_config(info.config)


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that OpenAI's config.json describes.

    Raises:
        ConfigError: If it does not describe one.
    """
    num_layers = integer(config, "num_hidden_layers")
    context = integer(config, "initial_context_length", 4096)
    factor = number(config, "rope_scaling_factor", 32.0)
    try:
        positions = round(context * factor)
    except OverflowError:
        raise ConfigError(
            "config.json: initial_context_length times rope_scaling_factor is too large"
        ) from None
    return ModelConfig(
        num_layers=num_layers,
        num_experts=integer(config, "num_experts"),
        experts_per_token=integer(config, "experts_per_token", 4),
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        intermediate_size=integer(config, "intermediate_size"),
        num_heads=integer(config, "num_attention_heads"),
        num_kv_heads=integer(config, "num_key_value_heads"),
        head_dim=integer(config, "head_dim"),
        layer_types=alternating_layers(num_layers),
        sliding_window=integer(config, "sliding_window", 128),
        max_position_embeddings=positions,
        rope_theta=number(config, "rope_theta", 150000.0),
        rope={
            "rope_type": "yarn",
            "factor": factor,
            "beta_fast": number(config, "rope_ntk_beta", 32.0),
            "beta_slow": number(config, "rope_ntk_alpha", 1.0),
            "truncate": False,
            "original_max_position_embeddings": context,
        },
        swiglu_limit=number(config, "swiglu_limit", 7.0),
    )


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
        found |= {"rope truncate": bool(rope.get("truncate", True))}
        fixed |= {"rope truncate": False}
        if rope.get("attention_factor") is not None:
            found["rope attention_factor"] = number(rope, "attention_factor")
            fixed["rope attention_factor"] = yarn_attention_factor(rope)
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
    factor, length = number(rope, "factor"), integer(rope, "original_max_position_embeddings")
    if factor == 1:
        return
    betas = number(rope, "beta_fast", 32.0), number(rope, "beta_slow", 1.0)
    if factor > 1 and model.rope_theta > 1 and length > 0 and min(betas) > 0:
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
    is_openai = bool(config) and "model_type" not in config
    target = dict(config) if is_openai else openai_config(model)
    return {"source_config.json" if partial else "config.json": strict_json.dumps(target)}


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
        "initial_context_length": integer(model.rope, "original_max_position_embeddings"),
        "rope_theta": model.rope_theta,
        "rope_scaling_factor": number(model.rope, "factor"),
        "rope_ntk_alpha": number(model.rope, "beta_slow", 1.0),
        "rope_ntk_beta": number(model.rope, "beta_fast", 32.0),
    }
