"""TransformerLens 3.9's configuration of a gpt-oss model, tl_config.json.

Source: transformer_lens 3.9.0, `loading_from_pretrained.py`, the branch for GptOssForCausalLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..model.config import ModelConfig, integer, number, yarn_attention_factor
from ..tensors.dtypes import DType, torch_name
from ._rotary import refuse_frequencies

__all__ = [
    "CONFIG_NAME",
    "check",
    "hooked_transformer_config",
    "parse_fields",
    "refuse_contradiction",
]

CONFIG_NAME = "tl_config.json"

_NOT_COMPARED = ("dtype", "model_name", "original_architecture", "n_ctx")
"""Fields that may contradict the source's configuration: they do not change what is computed."""

_REQUIRED: Mapping[str, tuple[Any, Any]] = {
    "positional_embedding_type": ("rotary", "standard"),
    "normalization_type": ("RMS", "LN"),
    "gated_mlp": (True, False),
    "use_attention_sinks": (True, False),
    "use_attn_scale": (True, True),
    "attention_dir": ("causal", "causal"),
    "attn_only": (False, False),
    "parallel_attn_mlp": (False, False),
    "post_embedding_ln": (False, False),
    "use_normalization_before_and_after": (False, False),
    "use_qk_norm": (False, False),
    "rotary_adjacent_pairs": (False, False),
    "rotary_base_local": (None, None),
    "yarn_global_attn_only": (False, False),
    "use_NTK_by_parts_rope": (False, False),
    "clip_qkv": (None, None),
    "attn_scores_soft_cap": (-1.0, -1.0),
    "output_logits_soft_cap": (-1.0, -1.0),
    "scale_attn_by_inverse_layer_idx": (False, False),
}
"""Fields that change what a HookedTransformer computes: the value for gpt-oss, and the default of
TransformerLens 3.9's `HookedTransformerConfig`."""

_LAYER_KINDS = {"local": "sliding_attention", "global": "full_attention"}


def parse_fields(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the model that the fields of a HookedTransformerConfig describe.

    Raises:
        ConfigError: If it is not a gpt-oss model.
    """
    try:
        model = _parse_model(fields)
        check(model)
        return model
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.json", CONFIG_NAME, 1)) from None


def _parse_model(fields: Mapping[str, Any]) -> ModelConfig:
    head_dim, num_layers = integer(fields, "d_head"), integer(fields, "n_layers")
    vocabulary = integer(fields, "d_vocab")
    _check_fields(fields, head_dim, vocabulary)
    is_windowed = bool(fields.get("use_local_attn")) and fields.get("window_size") is not None
    return ModelConfig(
        num_layers=num_layers,
        num_experts=integer(fields, "num_experts"),
        experts_per_token=integer(fields, "experts_per_token"),
        vocab_size=vocabulary,
        hidden_size=integer(fields, "d_model"),
        intermediate_size=integer(fields, "d_mlp"),
        num_heads=integer(fields, "n_heads"),
        num_kv_heads=integer(fields, "n_key_value_heads"),
        head_dim=head_dim,
        layer_types=_layer_types(fields, num_layers),
        sliding_window=integer(fields, "window_size") if is_windowed else None,
        max_position_embeddings=integer(fields, "n_ctx"),
        rope_theta=number(fields, "rotary_base", 10_000.0),
        rope=_parse_rope(fields) if fields.get("use_yarn_rope") else {"rope_type": "default"},
        rms_norm_eps=number(fields, "eps", 1e-5),
        hidden_act=str(fields.get("act_fn", "silu")),
    )


def _check_fields(fields: Mapping[str, Any], head_dim: int, vocabulary: int) -> None:
    """Check the fields that cannot be chosen for a gpt-oss model."""
    required = {
        **_REQUIRED,
        "rotary_dim": (head_dim, None),
        "d_vocab_out": (vocabulary, vocabulary),
    }
    unset = {"d_vocab_out": (None, -1)}
    for key, (value, default) in required.items():
        found = fields.get(key, default)
        if found != value and found not in unset.get(key, ()):
            raise ConfigError(f"config.json: {key} is {str(found)[:40]!r}; gpt-oss has {value!r}")
    scale, expected = number(fields, "attn_scale", -1.0), math.sqrt(head_dim)
    if scale != -1.0 and not math.isclose(scale, expected, rel_tol=1e-6):
        raise ConfigError(f"config.json: attn_scale is {scale}; gpt-oss has {expected}")


def _layer_types(fields: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    kinds = fields.get("attn_types")
    if kinds is None and not fields.get("use_local_attn"):
        kinds = ["global"] * min(num_layers, 10_000)
    if not isinstance(kinds, list) or not all(kind in _LAYER_KINDS for kind in kinds):
        raise ConfigError("config.json: attn_types must be a list of local and global")
    return tuple(_LAYER_KINDS[kind] for kind in kinds)


def _parse_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of YaRN, named as in `ModelConfig.rope`."""
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": number(fields, "yarn_factor", 1.0),
        "beta_fast": number(fields, "yarn_beta_fast", 32.0),
        "beta_slow": number(fields, "yarn_beta_slow", 1.0),
        "truncate": bool(fields.get("yarn_truncate", True)),
        "original_max_position_embeddings": integer(
            fields, "yarn_original_max_position_embeddings", 4096
        ),
    }
    refuse_frequencies(rope, number(fields, "rotary_base", 10_000.0))
    factor = number(fields, "yarn_attention_factor", 1.0)
    is_default = factor == yarn_attention_factor(rope)
    return rope if is_default else {**rope, "attention_factor": factor}


def check(model: ModelConfig) -> None:
    """See `Format.check`: TransformerLens has fixed values for these settings."""
    fixed = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "hidden_act": "silu"}
    for name, value in fixed.items():
        found = getattr(model, name)
        if found != value:
            raise ConfigError(
                f"config.json: {name} is {found}, and TransformerLens always computes gpt-oss "
                f"with {value}: its results would be wrong"
            )
    if model.rope_type not in ("yarn", "default"):
        raise ConfigError(
            f"config.json: rotary embeddings of the type {model.rope_type!r}, which "
            "TransformerLens does not compute for gpt-oss; its results would be wrong"
        )
    if model.rope_type == "yarn":
        _yarn_fields(model.rope)
    if "sliding_attention" in model.layer_types and model.sliding_window is None:
        raise ConfigError("config.json: layers with sliding_attention, but no sliding_window")


def refuse_contradiction(model: ModelConfig, described: ModelConfig, name: str) -> None:
    """Refuse two configurations with which TransformerLens computes different results.

    Args:
        model: The model that the source's configuration describes.
        described: The model that tl_config.json describes.
        name: The file name of the source's configuration.

    Raises:
        ConfigError: Naming a field that differs.
    """
    expected, found = (hooked_transformer_config(m, DType.BF16) for m in (model, described))
    for key in {**expected, **found}:
        if key not in _NOT_COMPARED and expected.get(key) != found.get(key):
            ours, theirs = (str(config.get(key))[:40] for config in (expected, found))
            raise ConfigError(
                f"config.json: it calls for {key} = {ours}, and {CONFIG_NAME} says {theirs}; "
                f"correct the one that is wrong, or remove {name}"
            )


def hooked_transformer_config(model: ModelConfig, dtype: DType) -> dict[str, Any]:
    """Return the fields of a HookedTransformerConfig for a model, as JSON types.

    Args:
        model: A model that `check` accepts.
        dtype: The dtype of the weights, which is given by its torch name.
    """
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
    if model.rope_type == "yarn":
        fields.update(_yarn_fields(model.rope))
    return fields


def _yarn_fields(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of YaRN."""
    return {
        "use_yarn_rope": True,
        "yarn_factor": rope["factor"],
        "yarn_attention_factor": yarn_attention_factor(rope),
        "yarn_beta_fast": rope["beta_fast"],
        "yarn_beta_slow": rope["beta_slow"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_truncate": rope["truncate"],
    }
