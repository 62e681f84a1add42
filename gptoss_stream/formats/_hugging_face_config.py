"""Hugging Face's config.json of a gpt-oss model.

Source of entries and defaults: transformers 5.24, `models/gpt_oss/configuration_gpt_oss.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._utils import strict_json
from ..errors import ConfigError
from ..model.config import LAYER_KINDS, ModelConfig, alternating_layers, integer, number
from ..tensors.dtypes import DType, torch_name
from ._rotary import parse_rope, rope_config

__all__ = [
    "config_files",
    "config_notes",
    "hugging_face_config",
    "parse_config",
    "pruned_config",
    "stale_entries",
]

_NOT_NULL = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "num_key_value_heads",
    "rms_norm_eps",
    "swiglu_alpha",
    "swiglu_limit",
    "tie_word_embeddings",
)
"""Entries that have a default if they are absent, and that transformers 5 refuses if null."""

_ALIASES = {"num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"}
"""Other spellings of entries. transformers 5 reads the first one and ignores the second."""

_NOT_WRITTEN = {
    "quantization_config",
    "quantization",
    "compression_config",
    "auto_map",
    "transformers_weights",
    "block_configs",
    "num_experts",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "_name_or_path",
    "_attn_implementation_autoset",
}
"""Entries of a source that would mislead those who read the output: they are about its files, or
`rope_config` says the same."""


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that Hugging Face's config.json describes.

    Raises:
        ConfigError: If it does not describe one.
    """
    _refuse_nulls(config)
    num_layers = integer(config, "num_hidden_layers")
    head_dim = integer(config, "head_dim", 64)
    theta, rope = parse_rope(config, head_dim)
    sliding_window = config.get("sliding_window", 128)
    for flag in ("attention_bias", "tie_word_embeddings"):
        if not isinstance(config.get(flag, True), bool):
            raise ConfigError(f"config.json: {flag} is neither true nor false")
    hidden_act = config.get("hidden_act", "silu")
    if not isinstance(hidden_act, str):
        raise ConfigError("config.json: hidden_act is not a name")
    return ModelConfig(
        num_layers=num_layers,
        num_experts=_count(config, "num_local_experts"),
        experts_per_token=_count(config, "num_experts_per_tok", 4),
        vocab_size=integer(config, "vocab_size"),
        hidden_size=integer(config, "hidden_size"),
        intermediate_size=integer(config, "intermediate_size"),
        num_heads=integer(config, "num_attention_heads"),
        num_kv_heads=integer(config, "num_key_value_heads", 8),
        head_dim=head_dim,
        layer_types=_layer_types(config, num_layers),
        sliding_window=None if sliding_window is None else integer(config, "sliding_window", 128),
        max_position_embeddings=integer(config, "max_position_embeddings", 131_072),
        rope_theta=theta,
        rope=rope,
        rms_norm_eps=number(config, "rms_norm_eps", 1e-5),
        swiglu_limit=number(config, "swiglu_limit", 7.0),
        swiglu_alpha=number(config, "swiglu_alpha", 1.702),
        hidden_act=hidden_act,
        attention_bias=config.get("attention_bias", True),
        tied_embeddings=config.get("tie_word_embeddings", False),
    )


def _refuse_nulls(config: Mapping[str, Any]) -> None:
    """Refuse null for entries that must have a value, and settings that differ between layers."""
    for key in _NOT_NULL:
        if config.get(key, 0) is None:
            raise ConfigError(
                f"config.json: {key} is null, which transformers refuses too; give its value, or "
                "remove it for the default"
            )
    if config.get("per_layer_config") not in (None, {}):
        raise ConfigError(
            "config.json: per_layer_config has settings that differ between layers, which no "
            "format here can hold"
        )


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a count that has two spellings, which must agree."""
    alias = _ALIASES[key]
    values = {name: integer(config, name) for name in (key, alias) if name in config}
    if len(set(values.values())) > 1:
        raise ConfigError(
            f"config.json: {key} is {values[key]} and {alias} is {values[alias]}; they mean the "
            "same: remove the wrong one"
        )
    return next(iter(values.values())) if values else integer(config, key, default)


def _layer_types(config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    layer_types = config.get("layer_types")
    if layer_types is None:
        return alternating_layers(num_layers)
    if not isinstance(layer_types, list) or not all(kind in LAYER_KINDS for kind in layer_types):
        raise ConfigError(f"config.json: layer_types must be a list of {' and '.join(LAYER_KINDS)}")
    return tuple(layer_types)


def config_notes(config: Mapping[str, Any]) -> list[str]:
    """Return what users should know about how the configuration was read."""
    notes = []
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if scaling and parameters and _without_theta(scaling) != _without_theta(parameters):
        notes.append(
            "config.json has rope_scaling and rope_parameters that differ; rope_scaling counts, as "
            "in transformers"
        )
    if config.get("experts_per_token", 4) != 4 and "num_experts_per_tok" not in config:
        notes.append(
            f"config.json has experts_per_token {config['experts_per_token']}, which transformers "
            "ignores (it would take 4); the output has it as num_experts_per_tok too"
        )
    return notes


def _without_theta(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings without their base, which older programs write beside them."""
    return {key: value for key, value in rope.items() if key != "rope_theta"}


def config_files(
    model: ModelConfig,
    config: Mapping[str, Any],
    dtype: DType,
    *,
    partial: bool,
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return the configuration file to write (see `Format.files`).

    It has the entries of the source's config.json that the model does not decide, such as token
    ids. For some of the tensors only, it is written as source_config.json: with a config.json,
    transformers would load the folder as a whole model, with random values for missing tensors.

    Args:
        model: The model as it is written.
        config: The source's configuration.
        dtype: The dtype of most dense elements.
        partial: Whether only some of the model's tensors are written.
        quantization: The quantization_config; None for unquantized tensors.
    """
    target = hugging_face_config(model)
    if config.get("model_type") == "gpt_oss":
        target = {**_kept(config), **_decided_by_model(model)}
    if quantization is not None:
        target["quantization_config"] = dict(quantization)
    # "dtype" since transformers 4.56, "torch_dtype" before.
    target["dtype"] = target["torch_dtype"] = torch_name(dtype)
    return {"source_config.json" if partial else "config.json": strict_json.dumps(target)}


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a configuration that do not mislead those who read the output."""
    return {
        key: value
        for key, value in config.items()
        if key not in _NOT_WRITTEN and not key.startswith("unsloth")
    }


def pruned_config(config: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Return a source's configuration as that of a smaller model made of it.

    Args:
        config: The source's, Hugging Face's or OpenAI's; empty without one.
        model: The smaller model.

    Returns:
        The same entries without `stale_entries`. In place of OpenAI's it is Hugging Face's, since
        OpenAI's cannot say what kind each layer is. Empty without a source's.
    """
    if config.get("model_type") != "gpt_oss":
        return hugging_face_config(model) if config else {}
    stale = stale_entries(config, model)
    kept = {key: value for key, value in _kept(config).items() if key not in stale}
    return {**kept, **_decided_by_model(model)}


def stale_entries(config: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """Return the entries of Hugging Face's that may be about single layers or experts.

    Args:
        config: The source's configuration.
        model: The model; the entries that it decides are left out.
    """
    if config.get("model_type") != "gpt_oss":
        return []
    counts = [config.get(name) for name in ("num_hidden_layers", "num_local_experts")]
    counts.append(config.get("num_experts"))
    decided = _decided_by_model(model).keys()
    return [
        key
        for key, value in _kept(config).items()
        if key not in decided and _is_stale(key, value, counts)
    ]


def _is_stale(key: str, value: Any, counts: Sequence[Any]) -> bool:
    """Return whether an entry may be about single layers or experts.

    Args:
        key: Its key.
        value: Its value.
        counts: The numbers of layers and experts, which lists about each of them have as length.
    """
    if "layer" in key or "expert" in key:
        return True
    if isinstance(value, dict):
        return key != "id2label" and any(
            name.isdigit() or _is_stale(name, inner, counts) for name, inner in value.items()
        )
    return isinstance(value, list) and len(value) in counts and "token_id" not in key


def hugging_face_config(model: ModelConfig) -> dict[str, Any]:
    """Return a complete config.json, without dtype and quantization.

    Its keys are those of the released models.
    """
    # <|return|> and <|endoftext|> of the released vocabulary; of others nothing is known.
    tokens = {"eos_token_id": 200_002, "pad_token_id": 199_999}
    return {
        "attention_dropout": 0.0,
        **(tokens if model.vocab_size == 201_088 else {}),
        "initializer_range": 0.02,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.9,
        "use_cache": True,
        **_decided_by_model(model),
    }


def _decided_by_model(model: ModelConfig) -> dict[str, Any]:
    """Return the entries that follow from the model."""
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": model.attention_bias,
        "experts_per_token": model.experts_per_token,
        "head_dim": model.head_dim,
        "hidden_act": model.hidden_act,
        "hidden_size": model.hidden_size,
        "initial_context_length": model.rope.get("original_max_position_embeddings", 4096),
        "intermediate_size": model.intermediate_size,
        "layer_types": list(model.layer_types),
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": "gpt_oss",
        "num_attention_heads": model.num_heads,
        "num_experts_per_tok": model.experts_per_token,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "num_local_experts": model.num_experts,
        "rms_norm_eps": model.rms_norm_eps,
        **rope_config(model),
        "sliding_window": model.sliding_window,
        "swiglu_alpha": model.swiglu_alpha,
        "swiglu_limit": model.swiglu_limit,
        "tie_word_embeddings": model.tied_embeddings,
        "vocab_size": model.vocab_size,
    }
