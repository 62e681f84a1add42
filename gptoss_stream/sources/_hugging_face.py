"""What Hugging Face's formats of gpt-oss share: config.json, and all tensors but the experts'.

Not a format itself. Names and shapes: transformers, `models/gpt_oss/modeling_gpt_oss.py` and
`configuration_gpt_oss.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..model import LAYER_KINDS, ModelConfig, alternating_layers, integer, number
from ..storage import Stored, StoredTable

__all__ = ["EXPERTS", "SHARED_TENSORS", "read_config"]

_LAYER = "model.layers.{l}."
EXPERTS = _LAYER + "mlp.experts."
"""What the experts' raw names begin with."""

SHARED_TENSORS: StoredTable = {
    "embed_tokens.weight": Stored("model.embed_tokens.weight"),
    "layers.{l}.input_layernorm.weight": Stored(_LAYER + "input_layernorm.weight"),
    "layers.{l}.self_attn.q_proj.weight": Stored(_LAYER + "self_attn.q_proj.weight"),
    "layers.{l}.self_attn.q_proj.bias": Stored(_LAYER + "self_attn.q_proj.bias"),
    "layers.{l}.self_attn.k_proj.weight": Stored(_LAYER + "self_attn.k_proj.weight"),
    "layers.{l}.self_attn.k_proj.bias": Stored(_LAYER + "self_attn.k_proj.bias"),
    "layers.{l}.self_attn.v_proj.weight": Stored(_LAYER + "self_attn.v_proj.weight"),
    "layers.{l}.self_attn.v_proj.bias": Stored(_LAYER + "self_attn.v_proj.bias"),
    "layers.{l}.self_attn.o_proj.weight": Stored(_LAYER + "self_attn.o_proj.weight"),
    "layers.{l}.self_attn.o_proj.bias": Stored(_LAYER + "self_attn.o_proj.bias"),
    "layers.{l}.self_attn.sinks": Stored(_LAYER + "self_attn.sinks"),
    "layers.{l}.post_attention_layernorm.weight": Stored(
        _LAYER + "post_attention_layernorm.weight"
    ),
    "layers.{l}.mlp.router.weight": Stored(_LAYER + "mlp.router.weight"),
    "layers.{l}.mlp.router.bias": Stored(_LAYER + "mlp.router.bias"),
    "layers.{l}.mlp.experts.{e}.gate_up_proj_bias": Stored(EXPERTS + "gate_up_proj_bias"),
    "layers.{l}.mlp.experts.{e}.down_proj_bias": Stored(EXPERTS + "down_proj_bias"),
    "norm.weight": Stored("model.norm.weight"),
    "lm_head.weight": Stored("lm_head.weight"),
}
"""All but the expert matrices, as every Hugging Face checkpoint of gpt-oss has them."""

_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""What transformers' GptOssConfig assumes where config.json is silent."""


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model's numbers from a Hugging Face config.json; raises `ConfigError`."""
    num_layers = integer(config, "num_hidden_layers")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or _DEFAULT_ROPE
    if not isinstance(rope, dict):
        raise ConfigError("config.json: rope_parameters is not an object")
    sliding_window = config.get("sliding_window", 128)
    for flag in ("attention_bias", "tie_word_embeddings"):
        if not isinstance(config.get(flag, True), bool):
            raise ConfigError(f"config.json: {flag} is neither true nor false")
    return ModelConfig(
        num_layers=num_layers,
        num_experts=integer(config, "num_local_experts"),
        experts_per_token=integer(config, "num_experts_per_tok"),
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        intermediate_size=integer(config, "intermediate_size"),
        num_heads=integer(config, "num_attention_heads"),
        num_kv_heads=integer(config, "num_key_value_heads"),
        head_dim=integer(config, "head_dim"),
        layer_types=_layer_types(config, num_layers),
        sliding_window=None if sliding_window is None else integer(config, "sliding_window", 128),
        max_position_embeddings=integer(config, "max_position_embeddings", 131072),
        rope_theta=number(rope if "rope_theta" in rope else config, "rope_theta", 150000.0),
        rope={key: value for key, value in rope.items() if key != "rope_theta"},
        rms_norm_eps=number(config, "rms_norm_eps", 1e-5),
        swiglu_limit=number(config, "swiglu_limit", 7.0),
        swiglu_alpha=number(config, "swiglu_alpha", 1.702),
        hidden_act=str(config.get("hidden_act", "silu")),
        attention_bias=config.get("attention_bias", True),
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def _layer_types(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    layer_types = config.get("layer_types")
    if layer_types is None:
        return alternating_layers(num_layers)
    if not isinstance(layer_types, list) or not all(kind in LAYER_KINDS for kind in layer_types):
        raise ConfigError(f"config.json: layer_types must be a list of {' and '.join(LAYER_KINDS)}")
    return tuple(layer_types)
