"""Hugging Face with the experts in MXFP4: openai/gpt-oss-20b, -120b, and fine-tunes.

Source of names and shapes: transformers, `models/gpt_oss/modeling_gpt_oss.py` and
`integrations/mxfp4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoint.metadata import CheckpointInfo
from ..model.config import ModelConfig
from ..tensors.dtypes import DType
from ._hugging_face import (
    EXPERT_BIASES,
    EXPERTS,
    FIRST,
    LAST,
    LIBRARY,
    LOADING,
    ROUTER,
    config_files,
    is_hugging_face,
    notes,
    read_model,
)
from ._table import Mxfp4Encoding, Row, Table

__all__ = [
    "LIBRARY",
    "LOADING",
    "QUANTIZATION",
    "TABLE",
    "check",
    "detect",
    "files",
    "notes",
    "read_model",
]

_MXFP4 = Mxfp4Encoding("_blocks", "_scales")

TABLE: Table = (
    *FIRST,
    *ROUTER,
    Row(EXPERTS + "gate_up_proj", "gate_up", "e (i t) m", encoding=_MXFP4),
    EXPERT_BIASES[0],
    Row(EXPERTS + "down_proj", "down", "e m i", encoding=_MXFP4),
    EXPERT_BIASES[1],
    *LAST,
)

QUANTIZATION: Mapping[str, Any] = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
"""The quantization_config of the released models."""


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by config.json, and because the experts are in blocks and scales."""
    if not is_hugging_face(info, ("_proj_blocks", "_proj_scales")):
        return None
    return 'config.json has model_type "gpt_oss", and the experts are in MXFP4'


def check(model: ModelConfig) -> None:
    """See `Format.check`: nothing to refuse, since loaders read the whole configuration."""


def files(
    model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
) -> dict[str, bytes]:
    """See `Format.files`: config.json with the quantization_config of the released models."""
    return config_files(model, config, dtype, partial=partial, quantization=QUANTIZATION)
