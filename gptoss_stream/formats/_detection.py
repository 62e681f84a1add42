"""The detection of a checkpoint's format."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint.metadata import CheckpointInfo
from ..errors import CheckpointError
from ._check_tensors import names_present
from ._format import Format

__all__ = ["detect_format"]


def detect_format(info: CheckpointInfo, formats: Mapping[str, Format]) -> tuple[str, str]:
    """Return the name of a checkpoint's format and the reason for it.

    If several formats claim a checkpoint, the one with most of the stored names is chosen.

    Args:
        info: The checkpoint.
        formats: All formats by name.

    Raises:
        CheckpointError: If it is of no known format or mixes two; the message says what it is.
    """
    _refuse_duplicates(info)
    reasons = {name: module.detect(info) for name, module in formats.items()}
    claims = [name for name, reason in reasons.items() if reason is not None]
    if not claims:
        raise CheckpointError(_describe_unknown(info))
    present = {name: names_present(module.TABLE, info.tensors) for name, module in formats.items()}
    name = max(claims, key=lambda name: len(present[name]))
    _refuse_mixture(info, name, present)
    return name, str(reasons[name])


def _refuse_duplicates(info: CheckpointInfo) -> None:
    """Refuse a tensor that is stored both in MXFP4 and dense: nothing says which one counts."""
    for name, raw in info.tensors.items():
        dense = info.tensors.get(name.removesuffix("_blocks")) if name.endswith("_blocks") else None
        if dense is not None:
            raise CheckpointError(
                f"{info.location.display_path(raw.shard)}: tensor {name!r} is MXFP4, and "
                f"{dense.name!r} in {dense.shard} is the same unquantized; remove one of them"
            )


def _refuse_mixture(info: CheckpointInfo, name: str, present: Mapping[str, set[str]]) -> None:
    """Refuse tensors of another format beside those of one: nothing says which ones count."""
    for other, names in present.items():
        foreign = sorted(names - present[name])
        if foreign:
            file = info.location.display_path(info.tensors[foreign[0]].shard)
            raise CheckpointError(
                f"{file}: tensor {foreign[0]!r} is one of {other}, beside those of {name}; remove "
                "the ones that do not count"
            )


def _describe_unknown(info: CheckpointInfo) -> str:
    """Return the message for a checkpoint of no known format: what it is, and what to do."""
    if info.config_name != "config.json":
        file = info.location.display_path("config.json")
        return f"{file}: missing; this is a part of a model, which cannot be converted"
    config = info.location.display_path(info.config_name)
    model_type = info.config.get("model_type")
    if model_type not in (None, "gpt_oss"):
        found = str(model_type)[:40]
        return f"{config}: a checkpoint of model type {found!r}; only gpt_oss can be converted"
    quantization = info.config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        return f"{config}: quantization_config is not an object"
    if quantization is not None and quantization.get("quant_method") != "mxfp4":
        method = str(quantization.get("quant_method"))[:40]
        return f"{config}: quantized by {method!r}; only mxfp4 can be converted"
    if model_type == "gpt_oss":
        return (
            f"{config}: no quantization_config, and tensors in MXFP4; take config.json from the "
            "same source as the tensors, or add --from hf-mxfp4"
        )
    return f"{config}: not of a gpt-oss checkpoint: it has the model type {model_type!r}"
