"""Hugging Face's format with the experts in MXFP4: openai/gpt-oss-20b, -120b, and fine-tunes.

Names and shapes: transformers, `models/gpt_oss/modeling_gpt_oss.py` and `integrations/mxfp4.py`.
"""

from __future__ import annotations

from ..checkpoint import CheckpointInfo
from ..storage import StoredMxfp4, StoredTable
from ._hugging_face import EXPERTS, SHARED_TENSORS, read_config

__all__ = ["NAME", "TENSORS", "read_config", "recognise"]

NAME = "hf-mxfp4"

TENSORS: StoredTable = {
    **SHARED_TENSORS,
    "layers.{l}.mlp.experts.{e}.gate_up_proj": StoredMxfp4(
        EXPERTS + "gate_up_proj_blocks", EXPERTS + "gate_up_proj_scales"
    ),
    "layers.{l}.mlp.experts.{e}.down_proj": StoredMxfp4(
        EXPERTS + "down_proj_blocks", EXPERTS + "down_proj_scales"
    ),
}


def recognise(info: CheckpointInfo) -> str | None:
    """By config.json alone: the tensors are held against it afterwards."""
    quantization = info.config.get("quantization_config")
    if info.config.get("model_type") != "gpt_oss" or not isinstance(quantization, dict):
        return None
    if quantization.get("quant_method") != "mxfp4":
        return None
    return 'config.json has model_type "gpt_oss" and quant_method "mxfp4"'
