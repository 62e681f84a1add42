"""Hugging Face unquantised: what transformers, vLLM, PEFT and training code load.

Names, shapes and transpositions: transformers, `models/gpt_oss/modeling_gpt_oss.py` and, for the
experts' matrices out of MXFP4, `integrations/mxfp4.py` (`convert_moe_packed_tensors`).
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
    is_unquantised,
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
    """See `Format.detect`: by config.json, unless the experts of layer 0 are one by one."""
    first = EXPERTS.format(l=0)
    one_by_one = (first + "gate_up_projs.", first + "0.")
    if not is_unquantised(info) or any(name.startswith(one_by_one) for name in info.tensors):
        return None
    return 'config.json has model_type "gpt_oss" and no quantization_config'


def check(model: ModelConfig) -> None:
    """See `Format.check`: the code that loads this format reads the whole configuration."""
