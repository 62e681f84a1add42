"""TransformerLens 3.9: the state dict of a HookedTransformer.

Names, shapes and axes: transformer_lens 3.9.0, `pretrained/weight_conversions/openai.py`; the
configuration: `loading_from_pretrained.py`, the branch for GptOssForCausalLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .._utils import strict_json
from ..checkpoint.metadata import CheckpointInfo
from ..errors import ConfigError, TensorError
from ..model.config import ModelConfig, integer, number, yarn_attention_factor
from ..tensors.dtypes import KEEP, DType, torch_name
from . import _hugging_face, openai
from ._table import Row, Table

__all__ = ["DEFAULT_DTYPE", "IGNORED", "TABLE", "check", "detect", "files", "read_model"]


_BLOCK = "blocks.{l}."


_ATTENTION, _EXPERT = _BLOCK + "attn.", _BLOCK + "mlp.experts.{e}."


_GATE, _UP = {"t": 0}, {"t": 1}


# fmt: off
TABLE: Table = (
    Row("embed.W_E", "embed", "v m"),

    Row(_BLOCK + "ln1.w", "attn_norm", "m"),
    Row(_ATTENTION + "W_Q", "q", "n m h"),
    Row(_ATTENTION + "_W_K", "k", "k m h"),
    Row(_ATTENTION + "_W_V", "v", "k m h"),
    Row(_ATTENTION + "b_Q", "q_bias", "n h"),
    Row(_ATTENTION + "_b_K", "k_bias", "k h"),
    Row(_ATTENTION + "_b_V", "v_bias", "k h"),
    Row(_ATTENTION + "sinks", "sinks", "n"),
    Row(_ATTENTION + "W_O", "o", "n h m"),
    Row(_ATTENTION + "b_O", "o_bias", "m"),

    Row(_BLOCK + "ln2.w", "mlp_norm", "m"),
    Row(_BLOCK + "mlp.W_gate.weight", "router", "e m"),
    Row(_BLOCK + "mlp.W_gate.bias", "router_bias", "e"),
    Row(_EXPERT + "W_gate.weight", "gate_up", "i m", _GATE),
    Row(_EXPERT + "W_gate.bias", "gate_up_bias", "i", _GATE),
    Row(_EXPERT + "W_in.weight", "gate_up", "i m", _UP),
    Row(_EXPERT + "W_in.bias", "gate_up_bias", "i", _UP),
    Row(_EXPERT + "W_out.weight", "down", "m i"),
    Row(_EXPERT + "W_out.bias", "down_bias", "m"),

    Row("ln_final.w", "final_norm", "m"),
    Row("unembed.W_U", "unembed", "m v"),
    Row("unembed.b_U", "unembed_bias", "v"),
)
# fmt: on


IGNORED = tuple(_ATTENTION + name for name in ("mask", "IGNORE", "rotary_sin", "rotary_cos"))
"""Buffers of `HookedTransformer.state_dict()`, which follow from the configuration."""


DEFAULT_DTYPE = KEEP
"""A state dict that somebody has worked on has the dtype that they want."""


_NOT_COMPARED = ("dtype", "model_name", "original_architecture", "n_ctx")
"""Fields of tl_config.json that may differ from the source's configuration: they say how a model
is loaded, not what it computes."""


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by the tensors' names."""
    if "embed.W_E" not in info.tensors:
        return None
    return "the tensors have TransformerLens's names (embed.W_E)"


def read_model(info: CheckpointInfo) -> ModelConfig:
    """See `Format.read_model`: from source_config.json, or from tl_config.json without one."""
    first = _BLOCK.format(l=0) + "ln1.w"
    if first not in info.tensors and any(name.startswith("blocks.0.") for name in info.tensors):
        raise TensorError(
            f"{info.location}: tensor {first!r} is missing, so the weights were processed (fold_ln), "
            "which cannot be undone; load the HookedTransformer without processing "
            "(from_pretrained_no_processing) and save it again"
        )
    fields = info.configs.get(_FIELDS)
    described = None if fields is None else _parse_fields(fields)
    if not info.config:
        if described is None:
            raise ConfigError("config.json: missing; a checkpoint folder needs it")
        return described
    if info.config.get("model_type", "gpt_oss") != "gpt_oss":
        raise ConfigError(
            f"config.json: a model of type {str(info.config['model_type'])[:40]!r}, beside tensors "
            "of a gpt-oss; take the configuration from the same place as the tensors"
        )
    parse = _hugging_face.parse_config if "model_type" in info.config else openai.parse_config
    model = parse(info.config)
    check(model)
    if described is not None:
        _refuse_contradiction(model, described, info.config_name)
    return model


def _refuse_contradiction(model: ModelConfig, described: ModelConfig, name: str) -> None:
    """Refuse two configurations with which TransformerLens computes different things."""
    wanted, found = (hooked_transformer_config(m, DType.BF16) for m in (model, described))
    for key in {**wanted, **found}:
        if key not in _NOT_COMPARED and wanted.get(key) != found.get(key):
            here, there = (str(config.get(key))[:40] for config in (wanted, found))
            raise ConfigError(
                f"config.json: it calls for {key} = {here}, and {_FIELDS} says {there}; correct "
                f"the one that is wrong, or remove {name}"
            )


_FIELDS = "tl_config.json"


# What gpt-oss needs of the fields that change what a HookedTransformer computes, and what these
# are where a configuration does not say: TransformerLens 3.9, `HookedTransformerConfig`.
_NEEDED: Mapping[str, tuple[Any, Any]] = {
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


def _parse_fields(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the model that the fields of a HookedTransformerConfig describe."""
    try:
        model = _model_of(fields)
        check(model)
        return model
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.json", _FIELDS, 1)) from None


def _model_of(fields: Mapping[str, Any]) -> ModelConfig:
    head, num_layers = integer(fields, "d_head"), integer(fields, "n_layers")
    vocabulary = integer(fields, "d_vocab")
    needed = {
        **_NEEDED,
        "rotary_dim": (head, None),
        "d_vocab_out": (vocabulary, vocabulary),
    }
    unset = {"d_vocab_out": (None, -1)}
    for key, (value, default) in needed.items():
        found = fields.get(key, default)
        if found != value and found not in unset.get(key, ()):
            raise ConfigError(f"config.json: {key} is {str(found)[:40]!r}; gpt-oss has {value!r}")
    scale = number(fields, "attn_scale", -1.0)
    if scale != -1.0 and not math.isclose(scale, math.sqrt(head), rel_tol=1e-6):
        raise ConfigError(f"config.json: attn_scale is {scale}; gpt-oss has {math.sqrt(head)}")
    is_windowed = bool(fields.get("use_local_attn")) and fields.get("window_size") is not None
    kinds = fields.get("attn_types")
    if kinds is None and not fields.get("use_local_attn"):
        kinds = ["global"] * min(num_layers, 10_000)
    names = {"local": "sliding_attention", "global": "full_attention"}
    if not isinstance(kinds, list) or not all(kind in names for kind in kinds):
        raise ConfigError("config.json: attn_types must be a list of local and global")
    return ModelConfig(
        num_layers=num_layers,
        num_experts=integer(fields, "num_experts"),
        experts_per_token=integer(fields, "experts_per_token"),
        vocab_size=vocabulary,
        hidden_size=integer(fields, "d_model"),
        intermediate_size=integer(fields, "d_mlp"),
        num_heads=integer(fields, "n_heads"),
        num_kv_heads=integer(fields, "n_key_value_heads"),
        head_dim=head,
        layer_types=tuple(names[kind] for kind in kinds),
        sliding_window=integer(fields, "window_size") if is_windowed else None,
        max_position_embeddings=integer(fields, "n_ctx"),
        rope_theta=number(fields, "rotary_base", 10_000.0),
        rope=_rope(fields) if fields.get("use_yarn_rope") else {"rope_type": "default"},
        rms_norm_eps=number(fields, "eps", 1e-5),
        hidden_act=str(fields.get("act_fn", "silu")),
    )


def _rope(fields: Mapping[str, Any]) -> dict[str, Any]:
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
    factor = number(fields, "yarn_attention_factor", 1.0)
    is_default = factor == yarn_attention_factor(rope)
    return rope if is_default else {**rope, "attention_factor": factor}


def check(model: ModelConfig) -> None:
    """See `Format.check`: TransformerLens fixes these for gpt-oss."""
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
        _yarn(model.rope)
    if "sliding_attention" in model.layer_types and model.sliding_window is None:
        raise ConfigError("config.json: layers with sliding_attention, but no sliding_window")


def files(
    model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
) -> dict[str, bytes]:
    """See `Format.files`: tl_config.json, the fields of a HookedTransformerConfig (its dtype by
    name), and the source's configuration as source_config.json: under its own name, AutoModel would
    take the folder for a Hugging Face checkpoint and fill the model with random weights."""
    found = {"tl_config.json": strict_json.dumps(hooked_transformer_config(model, dtype))}
    if config:
        found["source_config.json"] = strict_json.dumps(config)
    return found


def hooked_transformer_config(model: ModelConfig, dtype: DType) -> dict[str, Any]:
    """Return the fields of TransformerLens 3.9's HookedTransformerConfig for a model."""
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
        fields.update(_yarn(model.rope))
    return fields


def _yarn(rope: Mapping[str, Any]) -> dict[str, Any]:
    factor = number(rope, "factor", 0.0)
    original = rope.get("original_max_position_embeddings")
    if type(original) is not int or factor < 1:
        raise ConfigError(
            "config.json: YaRN needs factor (1 or more) and original_max_position_embeddings"
        )
    attention_factor = number(rope, "attention_factor", yarn_attention_factor(rope))
    return {
        "use_yarn_rope": True,
        "yarn_factor": factor,
        "yarn_attention_factor": attention_factor,
        "yarn_beta_fast": number(rope, "beta_fast", 32.0),
        "yarn_beta_slow": number(rope, "beta_slow", 1.0),
        "yarn_original_max_position_embeddings": original,
        "yarn_truncate": bool(rope.get("truncate", True)),
    }
