"""TransformerLens 3.9: the state dict of a HookedTransformer.

Source of names, shapes and axes: transformer_lens 3.9.0,
`pretrained/weight_conversions/openai.py`. The configuration is in `_transformer_lens_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._utils import strict_json
from ..checkpoint.metadata import CheckpointInfo
from ..errors import ConfigError, TensorError
from ..model.config import ModelConfig
from ..tensors.dtypes import KEEP, DType
from . import openai
from ._hugging_face_config import parse_config
from ._missing import is_partial_output
from ._table import Row, Table
from ._transformer_lens_config import (
    CONFIG_NAME,
    check,
    hooked_transformer_config,
    parse_fields,
    refuse_contradiction,
)

__all__ = [
    "DEFAULT_DTYPE",
    "IGNORED",
    "LIBRARY",
    "LOADING",
    "TABLE",
    "check",
    "detect",
    "files",
    "read_model",
]

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
"""A state dict that users have changed has the dtype that they chose."""

LIBRARY = "transformer-lens"
LOADING = """import gptoss_stream

# A HookedTransformer of TransformerLens 3.9
model = gptoss_stream.load_hooked_transformer(folder)"""


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by the tensors' names."""
    if "embed.W_E" not in info.tensors:
        return None
    return "the tensors have TransformerLens's names (embed.W_E)"


def read_model(info: CheckpointInfo) -> ModelConfig:
    """See `Format.read_model`: from source_config.json, or from tl_config.json without it."""
    _refuse_processed(info)
    fields = info.configs.get(CONFIG_NAME)
    described = None if fields is None else parse_fields(fields)
    if not info.config:
        if described is None:
            raise ConfigError("config.json: missing; a checkpoint folder needs it")
        return described
    if info.config.get("model_type", "gpt_oss") != "gpt_oss":
        raise ConfigError(
            f"config.json: a model of type {str(info.config['model_type'])[:40]!r}, beside tensors "
            "of a gpt-oss; take the configuration from the same source as the tensors"
        )
    parse = parse_config if "model_type" in info.config else openai.parse_config
    model = parse(info.config)
    check(model)
    if described is not None:
        refuse_contradiction(model, described, info.config_name)
    return model


def _refuse_processed(info: CheckpointInfo) -> None:
    """Refuse weights that TransformerLens has processed, of which the norms' are missing."""
    first = _BLOCK.format(l=0) + "ln1.w"
    if first in info.tensors or is_partial_output(info):
        return
    if any(name.startswith("blocks.0.") for name in info.tensors):
        raise TensorError(
            f"{info.location}: tensor {first!r} is missing, so the weights were processed "
            "(fold_ln), which cannot be undone; load the HookedTransformer without processing "
            "(from_pretrained_no_processing) and save it again"
        )


def files(
    model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
) -> dict[str, bytes]:
    """See `Format.files`: tl_config.json, and the source's configuration.

    The latter is named source_config.json. With a config.json, AutoModel would load the folder as
    a Hugging Face checkpoint, with random weights.
    """
    found = {CONFIG_NAME: strict_json.dumps(hooked_transformer_config(model, dtype))}
    if config:
        # The entry names a file of the source.
        kept = {key: value for key, value in config.items() if key != "transformers_weights"}
        found["source_config.json"] = strict_json.dumps(kept)
    return found
