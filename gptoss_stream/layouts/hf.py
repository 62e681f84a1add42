"""Hugging Face, unquantised: what transformers, vLLM, PEFT and training code load.

Names, shapes and transpositions: transformers, `models/gpt_oss/modeling_gpt_oss.py` and, for the
experts' matrices out of MXFP4, `integrations/mxfp4.py` (`convert_moe_packed_tensors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import strict_json
from ..dtypes import DType, torch_name
from ..model import ModelConfig
from . import Row

__all__ = ["ROWS", "check", "companions", "hugging_face_config"]

_LAYER, _OUT = "layers.{l}.", "model.layers.{l}."
_EXPERTS, _OUT_EXPERTS = "layers.{l}.mlp.experts.{e}.", "model.layers.{l}.mlp.experts."


def _same(name: str, pattern: str, *, optional: bool = False) -> Row:
    return Row(f"model.{name}", name, pattern, optional=optional)


# fmt: off
ROWS: tuple[Row, ...] = (
    _same("embed_tokens.weight", "v m -> v m"),

    _same(_LAYER + "input_layernorm.weight", "m -> m"),
    _same(_LAYER + "self_attn.q_proj.weight", "q m -> q m"),
    _same(_LAYER + "self_attn.q_proj.bias", "q -> q", optional=True),
    _same(_LAYER + "self_attn.k_proj.weight", "k m -> k m"),
    _same(_LAYER + "self_attn.k_proj.bias", "k -> k", optional=True),
    _same(_LAYER + "self_attn.v_proj.weight", "k m -> k m"),
    _same(_LAYER + "self_attn.v_proj.bias", "k -> k", optional=True),
    _same(_LAYER + "self_attn.o_proj.weight", "m q -> m q"),
    _same(_LAYER + "self_attn.o_proj.bias", "m -> m", optional=True),
    _same(_LAYER + "self_attn.sinks", "n -> n"),

    _same(_LAYER + "post_attention_layernorm.weight", "m -> m"),
    _same(_LAYER + "mlp.router.weight", "e m -> e m"),
    _same(_LAYER + "mlp.router.bias", "e -> e"),
    Row(_OUT_EXPERTS + "gate_up_proj", _EXPERTS + "gate_up_proj", "i m -> m i"),
    Row(_OUT_EXPERTS + "gate_up_proj_bias", _EXPERTS + "gate_up_proj_bias", "i -> i"),
    Row(_OUT_EXPERTS + "down_proj", _EXPERTS + "down_proj", "m i -> i m"),
    Row(_OUT_EXPERTS + "down_proj_bias", _EXPERTS + "down_proj_bias", "m -> m"),

    _same("norm.weight", "m -> m"),
    Row("lm_head.weight", "lm_head.weight", "v m -> v m", optional=True),
)
# fmt: on


def check(model: ModelConfig) -> None:
    """Every model can be carried: the code that loads it reads its configuration."""


def companions(
    model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
) -> dict[str, bytes]:
    """config.json: the source's without its quantisation and with the dtype, or, where the source
    has none in Hugging Face's words, a complete one.

    A part of a model gets none of that name: transformers would take the folder for a whole
    model and fill what is missing at random.
    """
    if config.get("model_type") == "gpt_oss":
        target = {key: value for key, value in config.items() if key != "quantization_config"}
    else:
        target = hugging_face_config(model)
    # "dtype" since transformers 4.56, "torch_dtype" before.
    target["dtype"] = target["torch_dtype"] = torch_name(dtype)
    return {"source_config.json" if partial else "config.json": strict_json.dumps(target)}


def hugging_face_config(model: ModelConfig) -> dict[str, Any]:
    """A Hugging Face config.json for a model, as the released ones have it, but for dtype and
    quantisation."""
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
