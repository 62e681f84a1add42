"""The detection of a checkpoint's format."""

from __future__ import annotations

from collections.abc import Mapping

from ..checkpoint.metadata import CheckpointInfo
from ..errors import CheckpointError
from ._check_tensors import names_present
from ._format import Format
from ._quantization import refuse_other_quantization
from ._unknown import describe_unknown

__all__ = ["detect_format"]


def detect_format(info: CheckpointInfo, formats: Mapping[str, Format]) -> tuple[str, str]:
    """Return the name of a checkpoint's format and the reason for it.

    If several formats claim a checkpoint, the one with most of the stored names is chosen.

    Args:
        info: The checkpoint.
        formats: All formats by name.

    Raises:
        CheckpointError: If it is of no known format, quantized otherwise or mixes two formats; the
            message says what it is.
    """
    _refuse_duplicates(info)
    refuse_other_quantization(info)
    reasons = {name: module.detect(info) for name, module in formats.items()}
    claims = [name for name, reason in reasons.items() if reason is not None]
    if not claims:
        tables = {name: module.TABLE for name, module in formats.items()}
        raise CheckpointError(describe_unknown(info, tables))
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
