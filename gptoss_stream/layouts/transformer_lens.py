"""TransformerLens 3.9: the state dict of a HookedTransformer.

Names, shapes and patterns: transformer_lens 3.9.0, `pretrained/weight_conversions/openai.py`; the
configuration: `loading_from_pretrained.py`, the branch for GptOssForCausalLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import strict_json
from ..dtypes import DType, torch_name
from ..errors import ConfigError
from ..model import ModelConfig, number
from . import Row, ZeroRow

__all__ = ["ROWS", "check", "companions"]

# A gate_up_proj matrix alternates the rows of two projections.
_GATE, _UP = (0, 2), (1, 2)

_BLOCK, _LAYER = "blocks.{l}.", "layers.{l}."
_ATTN, _SELF_ATTN = "blocks.{l}.attn.", "layers.{l}.self_attn."
_EXPERT, _EXPERTS = "blocks.{l}.mlp.experts.{e}.", "layers.{l}.mlp.experts.{e}."

# fmt: off
ROWS: tuple[Row | ZeroRow, ...] = (
    Row("embed.W_E", "embed_tokens.weight", "v m -> v m"),

    Row(_BLOCK + "ln1.w", _LAYER + "input_layernorm.weight", "m -> m"),
    Row(_ATTN + "W_Q", _SELF_ATTN + "q_proj.weight", "(n h) m -> n m h", {"n": "nh"}),
    Row(_ATTN + "_W_K", _SELF_ATTN + "k_proj.weight", "(n h) m -> n m h", {"n": "nk"}),
    Row(_ATTN + "_W_V", _SELF_ATTN + "v_proj.weight", "(n h) m -> n m h", {"n": "nk"}),
    Row(_ATTN + "b_Q", _SELF_ATTN + "q_proj.bias", "(n h) -> n h", {"n": "nh"}),
    Row(_ATTN + "_b_K", _SELF_ATTN + "k_proj.bias", "(n h) -> n h", {"n": "nk"}),
    Row(_ATTN + "_b_V", _SELF_ATTN + "v_proj.bias", "(n h) -> n h", {"n": "nk"}),
    Row(_ATTN + "sinks", _SELF_ATTN + "sinks", "n -> n"),
    Row(_ATTN + "W_O", _SELF_ATTN + "o_proj.weight", "m (n h) -> n h m", {"n": "nh"}),
    Row(_ATTN + "b_O", _SELF_ATTN + "o_proj.bias", "m -> m"),

    Row(_BLOCK + "ln2.w", _LAYER + "post_attention_layernorm.weight", "m -> m"),
    Row(_BLOCK + "mlp.W_gate.weight", _LAYER + "mlp.router.weight", "e m -> e m"),
    Row(_BLOCK + "mlp.W_gate.bias", _LAYER + "mlp.router.bias", "e -> e"),
    Row(_EXPERT + "W_gate.weight", _EXPERTS + "gate_up_proj", "i m -> i m", rows=_GATE),
    Row(_EXPERT + "W_gate.bias", _EXPERTS + "gate_up_proj_bias", "i -> i", rows=_GATE),
    Row(_EXPERT + "W_in.weight", _EXPERTS + "gate_up_proj", "i m -> i m", rows=_UP),
    Row(_EXPERT + "W_in.bias", _EXPERTS + "gate_up_proj_bias", "i -> i", rows=_UP),
    Row(_EXPERT + "W_out.weight", _EXPERTS + "down_proj", "m i -> m i"),
    Row(_EXPERT + "W_out.bias", _EXPERTS + "down_proj_bias", "m -> m"),

    Row("ln_final.w", "norm.weight", "m -> m"),
    Row("unembed.W_U", "lm_head.weight", "v m -> m v"),
    ZeroRow("unembed.b_U", "V", "lm_head.weight"),
)
# fmt: on


def check(model: ModelConfig) -> None:
    """Refuse what TransformerLens would compute wrongly: it fixes these for gpt-oss."""
    fixed = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "hidden_act": "silu"}
    for name, value in fixed.items():
        found = getattr(model, name)
        if found != value:
            raise ConfigError(
                f"config.json: {name} is {found}, and TransformerLens always computes gpt-oss "
                f"with {value}: its results would be wrong"
            )
    if _rope_type(model) not in ("yarn", "default"):
        raise ConfigError(
            f"config.json: rotary embeddings of the type {_rope_type(model)!r}, which "
            "TransformerLens does not compute for gpt-oss; its results would be wrong"
        )
    if _rope_type(model) == "yarn":
        _yarn(model.rope)
    if "sliding_attention" in model.layer_types and model.sliding_window is None:
        raise ConfigError("config.json: layers with sliding_attention, but no sliding_window")


def _rope_type(model: ModelConfig) -> Any:
    return model.rope.get("rope_type", model.rope.get("type", "default"))


def companions(
    model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
) -> dict[str, bytes]:
    """tl_config.json, the fields of a HookedTransformerConfig (its dtype by name), and the
    source's configuration as source_config.json: under its own name, AutoModel would take the
    folder for a Hugging Face checkpoint and fill the model with random weights."""
    return {
        "tl_config.json": strict_json.dumps(hooked_transformer_config(model, dtype)),
        "source_config.json": strict_json.dumps(config),
    }


def hooked_transformer_config(model: ModelConfig, dtype: DType) -> dict[str, Any]:
    """The fields of TransformerLens 3.9's HookedTransformerConfig for a model."""
    fields = {
        "model_name": "gpt-oss",
        "original_architecture": "GptOssForCausalLM",
        "dtype": torch_name(dtype),
        "d_model": model.hidden_size,
        "d_head": model.head_dim,
        "n_heads": model.num_heads,
        "n_key_value_heads": model.num_kv_heads,
        "d_mlp": model.intermediate_size,
        "n_layers": model.num_layers,
        "n_ctx": model.max_position_embeddings,
        "d_vocab": model.vocab_size,
        "d_vocab_out": model.vocab_size,
        "act_fn": model.hidden_act,
        "gated_mlp": True,
        "num_experts": model.num_experts,
        "experts_per_token": model.experts_per_token,
        "normalization_type": "RMS",
        "final_rms": True,
        "eps": model.rms_norm_eps,
        "positional_embedding_type": "rotary",
        "rotary_base": model.rope_theta,
        "rotary_dim": model.head_dim,
        "use_attention_sinks": True,
        "use_local_attn": model.sliding_window is not None,
        "window_size": model.sliding_window,
        "attn_types": [
            "local" if kind == "sliding_attention" else "global" for kind in model.layer_types
        ],
    }
    if _rope_type(model) == "yarn":
        fields.update(_yarn(model.rope))
    return fields


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    factor = number(rope, "factor", 0.0)
    original = rope.get("original_max_position_embeddings")
    if type(original) is not int or factor < 1:
        raise ConfigError(
            "config.json: YaRN needs factor (1 or more) and original_max_position_embeddings"
        )
    # transformers' default: get_mscale(factor)
    attention_factor = number(rope, "attention_factor", 0.1 * math.log(factor) + 1.0)
    return {
        "use_yarn_rope": True,
        "yarn_factor": factor,
        "yarn_attention_factor": attention_factor,
        "yarn_beta_fast": number(rope, "beta_fast", 32.0),
        "yarn_beta_slow": number(rope, "beta_slow", 1.0),
        "yarn_original_max_position_embeddings": original,
        "yarn_truncate": bool(rope.get("truncate", True)),
    }
