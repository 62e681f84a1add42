"""Hugging Face unquantized: what transformers, vLLM, PEFT and training code load.

Some programs save the experts' matrices transposed (unsloth-zoo#1114); they are read too. Source of
names, shapes and transpositions: transformers, `models/gpt_oss/modeling_gpt_oss.py` and,
for the experts' matrices made of MXFP4, `integrations/mxfp4.py` (`convert_moe_packed_tensors`).
"""

from __future__ import annotations

from ..checkpoint.metadata import CheckpointInfo
from ..model.config import ModelConfig
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
from ._table import Row, Table

__all__ = ["LIBRARY", "LOADING", "TABLE", "check", "detect", "files", "notes", "read_model"]

TABLE: Table = (
    *FIRST,
    *ROUTER,
    Row(EXPERTS + "gate_up_proj", "gate_up", "e m (i t)", other_axes="e (i t) m"),
    EXPERT_BIASES[0],
    Row(EXPERTS + "down_proj", "down", "e i m", other_axes="e m i"),
    EXPERT_BIASES[1],
    *LAST,
)

files = config_files


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by config.json and by the stacked tensors of the experts."""
    if not is_hugging_face(info, ("experts.gate_up_proj", "experts.down_proj")):
        return None
    return 'config.json has model_type "gpt_oss", and the experts are stacked and not in MXFP4'


def check(model: ModelConfig) -> None:
    """See `Format.check`: nothing to refuse, since loaders read the whole configuration."""
