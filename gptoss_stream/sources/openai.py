"""OpenAI's own format: the folder `original/` of the released repositories.

q, k and v are fused, in this order, with no row permuted. Names, shapes and the settings that its
config.json leaves out: openai/gpt-oss, `gpt_oss/torch/model.py` and `gpt_oss/torch/weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint import CheckpointInfo
from ..errors import ConfigError
from ..model import ModelConfig, alternating_layers, integer, number
from ..storage import Stored, StoredMxfp4, StoredRows, StoredTable

__all__ = ["NAME", "TENSORS", "read_config", "recognise"]

NAME = "openai"

_BLOCK, _LAYER = "block.{l}.", "layers.{l}."
_QKV = ("nh*hd", "nk*hd", "nk*hd")  # rows of each
_MLP1, _MLP2 = "block.{l}.mlp.mlp1_", "block.{l}.mlp.mlp2_"
_EXPERTS = "layers.{l}.mlp.experts.{e}."

# fmt: off
TENSORS: StoredTable = {
    "embed_tokens.weight": Stored("embedding.weight"),
    _LAYER + "input_layernorm.weight": Stored(_BLOCK + "attn.norm.scale"),
    _LAYER + "self_attn.q_proj.weight": StoredRows(_BLOCK + "attn.qkv.weight", _QKV, 0),
    _LAYER + "self_attn.q_proj.bias": StoredRows(_BLOCK + "attn.qkv.bias", _QKV, 0),
    _LAYER + "self_attn.k_proj.weight": StoredRows(_BLOCK + "attn.qkv.weight", _QKV, 1),
    _LAYER + "self_attn.k_proj.bias": StoredRows(_BLOCK + "attn.qkv.bias", _QKV, 1),
    _LAYER + "self_attn.v_proj.weight": StoredRows(_BLOCK + "attn.qkv.weight", _QKV, 2),
    _LAYER + "self_attn.v_proj.bias": StoredRows(_BLOCK + "attn.qkv.bias", _QKV, 2),
    _LAYER + "self_attn.o_proj.weight": Stored(_BLOCK + "attn.out.weight"),
    _LAYER + "self_attn.o_proj.bias": Stored(_BLOCK + "attn.out.bias"),
    _LAYER + "self_attn.sinks": Stored(_BLOCK + "attn.sinks"),
    _LAYER + "post_attention_layernorm.weight": Stored(_BLOCK + "mlp.norm.scale"),
    _LAYER + "mlp.router.weight": Stored(_BLOCK + "mlp.gate.weight"),
    _LAYER + "mlp.router.bias": Stored(_BLOCK + "mlp.gate.bias"),
    _EXPERTS + "gate_up_proj": StoredMxfp4(_MLP1 + "weight.blocks", _MLP1 + "weight.scales"),
    _EXPERTS + "gate_up_proj_bias": Stored(_MLP1 + "bias"),
    _EXPERTS + "down_proj": StoredMxfp4(_MLP2 + "weight.blocks", _MLP2 + "weight.scales"),
    _EXPERTS + "down_proj_bias": Stored(_MLP2 + "bias"),
    "norm.weight": Stored("norm.scale"),
    "lm_head.weight": Stored("unembedding.weight"),
}
# fmt: on


def recognise(info: CheckpointInfo) -> str | None:
    """By the first block's fused tensor, and by config.json, which names no model type."""
    if "model_type" in info.config or _BLOCK.format(l=0) + "attn.qkv.weight" not in info.tensors:
        return None
    return "config.json has no model_type, and the tensors OpenAI's names (block.0.attn.qkv.weight)"


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model's numbers from OpenAI's config.json; raises `ConfigError`."""
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
