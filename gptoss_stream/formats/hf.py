"""Hugging Face unquantized: what transformers, vLLM, PEFT and training code load.

Source of names, shapes and transpositions: transformers, `models/gpt_oss/modeling_gpt_oss.py` and,
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
    ROUTER,
    config_files,
    is_unquantized,
    read_model,
)
from ._table import Row, Table

__all__ = ["TABLE", "check", "detect", "files", "read_model"]

TABLE: Table = (
    *FIRST,
    *ROUTER,
    Row(EXPERTS + "gate_up_proj", "gate_up", "e m (i t)"),
    EXPERT_BIASES[0],
    Row(EXPERTS + "down_proj", "down", "e i m"),
    EXPERT_BIASES[1],
    *LAST,
)

files = config_files


def detect(info: CheckpointInfo) -> str | None:
    """See `Format.detect`: by config.json, unless each expert of layer 0 has its own tensors."""
    experts = EXPERTS.format(l=0)
    unfused = (experts + "gate_up_projs.", experts + "0.")
    if not is_unquantized(info) or any(name.startswith(unfused) for name in info.tensors):
        return None
    return 'config.json has model_type "gpt_oss" and no quantization_config'


def check(model: ModelConfig) -> None:
    """See `Format.check`: nothing to refuse, since loaders read the whole configuration."""
