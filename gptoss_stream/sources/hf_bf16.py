"""Hugging Face's format unquantised: re-saves such as the `-BF16` repositories, and fine-tunes.

The experts' matrices lie transposed against those in MXFP4. Names and shapes: transformers,
`models/gpt_oss/modeling_gpt_oss.py`.
"""

from __future__ import annotations

from ..checkpoint import CheckpointInfo
from ..storage import StoredTable, StoredTransposed
from ._hugging_face import EXPERTS, SHARED_TENSORS, read_config

__all__ = ["NAME", "TENSORS", "read_config", "recognise"]

NAME = "hf-bf16"

TENSORS: StoredTable = {
    **SHARED_TENSORS,
    "layers.{l}.mlp.experts.{e}.gate_up_proj": StoredTransposed(EXPERTS + "gate_up_proj"),
    "layers.{l}.mlp.experts.{e}.down_proj": StoredTransposed(EXPERTS + "down_proj"),
}


def recognise(info: CheckpointInfo) -> str | None:
    """By config.json, unless tensors of the first layer are in MXFP4 or unfused into modules."""
    if info.config.get("model_type") != "gpt_oss":
        return None
    if info.config.get("quantization_config") is not None:
        return None
    first = EXPERTS.format(l=0) + "gate_up_proj"
    if any(name.startswith((f"{first}_blocks", f"{first}s.")) for name in info.tensors):
        return None
    return 'config.json has model_type "gpt_oss" and no quantization_config'
