"""Checkpoints that are quantized otherwise than in MXFP4, and configurations that are out of date.

The tensors decide. `quantization_config` is often left over from the model that was fine-tuned, so
alone it refuses nothing. It names the program if the tensors are quantized.
"""

from __future__ import annotations

import re

from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.small_files import read_config
from ..errors import CheckpointError, ConfigError
from ..tensors.dtypes import DType

__all__ = ["quantization_notes", "refuse_other_quantization"]

_MARKS = (
    (re.compile(r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.|\.SCB$"), "bitsandbytes"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"weight_packed$|(weight|input)_global_scale$"), "compressed-tensors"),
    (re.compile(r"weight_scale_2$"), "ModelOpt (NVFP4)"),
    (re.compile(r"\.biases$"), "MLX"),
)
"""Names of tensors that only one program writes."""

_PROGRAMS = {"quark": "AMD Quark", "modelopt": "ModelOpt"}
_NOT_PACKED = (DType.BF16, DType.F16, DType.F32, DType.I64, DType.BOOL)
"""Dtypes of unquantized tensors, and of buffers such as positions and masks."""
_SIDE_FILE = "hf_quant_config.json"


def refuse_other_quantization(info: CheckpointInfo) -> None:
    """Refuse tensors that another program has quantized.

    Raises:
        CheckpointError: With the name of the program.
        ConfigError: If the configuration cannot be read.
    """
    config = info.location.display_path(info.config_name)
    quantization = info.config.get("quantization_config")
    if not isinstance(quantization, (dict, type(None))):
        raise ConfigError(f"{config}: quantization_config is not an object")
    dense = all(raw.dtype in _NOT_PACKED for raw in info.tensors.values())
    for pattern, program in _MARKS:
        for name, raw in info.tensors.items():
            if pattern.search(name):
                raise _refusal(info.location.display_path(raw.shard), f"tensor {name!r}", program)
    if dense:
        return
    method = (quantization or {}).get("quant_method")
    if isinstance(info.config.get("quantization"), dict):
        raise _refusal(config, "quantization", "MLX")
    if method is None and {"bits", "group_size"} <= (quantization or {}).keys():
        raise _refusal(config, "quantization_config", "MLX")
    if method is None and info.location.has(_SIDE_FILE):
        settings = read_config(info.location, _SIDE_FILE).get("quantization")
        algorithm = settings.get("quant_algo") if isinstance(settings, dict) else None
        where = info.location.display_path(_SIDE_FILE)
        raise _refusal(where, "quantization", f"ModelOpt ({str(algorithm)[:40]})")
    if method not in (None, "mxfp4", "gpt_oss_mxfp4"):  # vLLM's name for it
        algorithm = quantization.get("quant_algo") if quantization else None
        program = _PROGRAMS.get(str(method), str(method)[:40])
        kind = f"{program} ({str(algorithm)[:40]})" if algorithm else program
        raise _refusal(config, "quantization_config", kind)


def _refusal(where: str, what: str, program: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: {what}: quantized by {program}, which is not read; dequantize the checkpoint "
        "with that program, or take the unquantized or MXFP4 one that it was made from"
    )


def quantization_notes(info: CheckpointInfo, is_mxfp4: bool) -> list[str]:
    """Return what users should know if the configuration does not say what the tensors are.

    Args:
        info: The checkpoint.
        is_mxfp4: Whether its experts are in MXFP4.
    """
    if info.config_name != "config.json" or "model_type" not in info.config:
        return []
    is_configured = info.config.get("quantization_config") is not None
    if is_mxfp4 == is_configured:
        return []
    if is_mxfp4:
        note = (
            "config.json has no quantization_config, and the experts are in MXFP4: they are read "
            "as MXFP4"
        )
    else:
        note = (
            "quantization_config in config.json is out of date: the tensors are not quantized, "
            "and the output's config.json does not have it"
        )
    return [note]
