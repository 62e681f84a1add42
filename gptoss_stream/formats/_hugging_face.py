"""What the formats of Hugging Face share: config.json, and all tensors except those of the experts.

Source of names, shapes and defaults: transformers, `models/gpt_oss/modeling_gpt_oss.py` and
`configuration_gpt_oss.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._utils import strict_json
from ..checkpoint.metadata import CheckpointInfo
from ..errors import ConfigError
from ..model.config import LAYER_KINDS, ModelConfig, alternating_layers, integer, number
from ..tensors.dtypes import DType, torch_name
from ._table import Row, Table

__all__ = [
    "EXPERTS",
    "EXPERT_BIASES",
    "FIRST",
    "LAST",
    "LAYER",
    "ROUTER",
    "config_files",
    "hugging_face_config",
    "is_unquantized",
    "parse_config",
    "read_model",
]

LAYER = "model.layers.{l}."
_ATTENTION = LAYER + "self_attn."
EXPERTS = LAYER + "mlp.experts."

# fmt: off
FIRST: Table = (
    Row("model.embed_tokens.weight", "embed", "v m"),
    Row(LAYER + "input_layernorm.weight", "attn_norm", "m"),
    Row(_ATTENTION + "q_proj.weight", "q", "(n h) m"),
    Row(_ATTENTION + "q_proj.bias", "q_bias", "(n h)", optional=True),
    Row(_ATTENTION + "k_proj.weight", "k", "(k h) m"),
    Row(_ATTENTION + "k_proj.bias", "k_bias", "(k h)", optional=True),
    Row(_ATTENTION + "v_proj.weight", "v", "(k h) m"),
    Row(_ATTENTION + "v_proj.bias", "v_bias", "(k h)", optional=True),
    Row(_ATTENTION + "o_proj.weight", "o", "m (n h)"),
    Row(_ATTENTION + "o_proj.bias", "o_bias", "m", optional=True),
    Row(_ATTENTION + "sinks", "sinks", "n"),
    Row(LAYER + "post_attention_layernorm.weight", "mlp_norm", "m"),
)
"""The rows before the router."""

ROUTER: Table = (
    Row(LAYER + "mlp.router.weight", "router", "e m"),
    Row(LAYER + "mlp.router.bias", "router_bias", "e"),
)

EXPERT_BIASES: Table = (
    Row(EXPERTS + "gate_up_proj_bias", "gate_up_bias", "e (i t)"),
    Row(EXPERTS + "down_proj_bias", "down_bias", "e m"),
)
"""The biases of the experts of a layer, stacked in one tensor for gate and up and one for down."""

LAST: Table = (
    Row("model.norm.weight", "final_norm", "m"),
    Row("lm_head.weight", "unembed", "v m", optional=True),
)
"""The rows after the experts."""
# fmt: on

_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The defaults of transformers' `GptOssConfig`."""


def is_unquantized(info: CheckpointInfo) -> bool:
    """Return whether a checkpoint is of an unquantized gpt-oss.

    By config.json, and because no expert of layer 0 is in MXFP4.
    """
    return (
        info.config.get("model_type") == "gpt_oss"
        and info.config_name == "config.json"
        and info.config.get("quantization_config") is None
        and EXPERTS.format(l=0) + "gate_up_proj_blocks" not in info.tensors
    )


def read_model(info: CheckpointInfo) -> ModelConfig:
    """See `Format.read_model`."""
    return parse_config(info.config)


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that Hugging Face's config.json describes.

    Raises:
        ConfigError: If it does not describe one.
    """
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


def config_files(
    model: ModelConfig,
    config: Mapping[str, Any],
    dtype: DType,
    *,
    partial: bool,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return the configuration file to write (see `Format.files`).

    It is the source's config.json with another dtype and quantization. If the source's is not
    Hugging Face's, it is a complete new one. For some of the tensors only, it is written as
    source_config.json: with a config.json, transformers would load the folder as a whole model,
    with random values for missing tensors.

    Args:
        model: The model as it is written.
        config: The source's configuration.
        dtype: The dtype of most dense elements.
        partial: Whether only some of the model's tensors are written.
        quantization: The quantization_config; None for unquantized tensors.
    """
    if config.get("model_type") == "gpt_oss":
        target = {key: value for key, value in config.items() if key != "quantization_config"}
        # The model says what is stored, whatever the configuration says (`read_table`).
        if config.get("tie_word_embeddings", False) != model.tied_embeddings:
            target["tie_word_embeddings"] = model.tied_embeddings
        if config.get("attention_bias", True) != model.attention_bias:
            target["attention_bias"] = model.attention_bias
    else:
        target = hugging_face_config(model)
    if quantization is not None:
        target["quantization_config"] = dict(quantization)
    # "dtype" since transformers 4.56, "torch_dtype" before.
    target["dtype"] = target["torch_dtype"] = torch_name(dtype)
    return {"source_config.json" if partial else "config.json": strict_json.dumps(target)}


def hugging_face_config(model: ModelConfig) -> dict[str, Any]:
    """Return a complete config.json, without dtype and quantization.

    Its keys are those of the released models.
    """
    released = model.vocab_size == 201_088
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        # <|return|> and <|endoftext|> of the released vocabulary
        "eos_token_id": 200_002 if released else model.vocab_size - 1,
        "pad_token_id": 199_999 if released else model.vocab_size - 1,
        "experts_per_token": model.experts_per_token,
        "head_dim": model.head_dim,
        "hidden_act": model.hidden_act,
        "hidden_size": model.hidden_size,
        "initial_context_length": model.rope.get("original_max_position_embeddings", 4096),
        "initializer_range": 0.02,
        "intermediate_size": model.intermediate_size,
        "layer_types": list(model.layer_types),
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": "gpt_oss",
        "num_attention_heads": model.num_heads,
        "num_experts_per_tok": model.experts_per_token,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "num_local_experts": model.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_scaling": dict(model.rope),
        "rope_theta": model.rope_theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": model.sliding_window,
        "swiglu_limit": model.swiglu_limit,
        "tie_word_embeddings": model.tied_embeddings,
        "use_cache": True,
        "vocab_size": model.vocab_size,
    }
