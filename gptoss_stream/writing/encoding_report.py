"""The report of what encoding to MXFP4 has lost: `mxfp4_encoding.json`, beside the shards.

While a run is unfinished, what each shard has lost is kept in a file of its own, which is written
before the shard gets its final name, as its checksum is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from .._utils import strict_json
from ..tensors.dtypes import BLOCK_VALUES
from ..tensors.encoding_loss import EncodingLoss

__all__ = [
    "LOSSES_SUFFIX",
    "REPORT_NAME",
    "build_report",
    "losses_as_text",
    "parse_losses",
    "parse_report",
    "read_losses",
    "reported_losses",
]

REPORT_NAME = "mxfp4_encoding.json"
LOSSES_SUFFIX = ".mxfp4.json"

Losses = Mapping[str, EncodingLoss]


def losses_as_text(losses: Losses) -> bytes:
    """Return what the tensors of a shard have lost as the text of a file."""
    found = {name: asdict(loss) for name, loss in losses.items()}
    return strict_json.dumps({"schema": strict_json.SCHEMA, "losses": found})


def parse_losses(text: bytes) -> dict[str, EncodingLoss]:
    """Return what `losses_as_text` has written; nothing for a damaged text."""
    try:
        found = strict_json.loads(text)
        if found.pop("schema", strict_json.SCHEMA) != strict_json.SCHEMA:
            return {}
        return read_losses(found.get("losses", found))  # earlier versions wrote them alone
    except (ValueError, TypeError, AttributeError):
        return {}


def read_losses(found: Mapping[str, Any]) -> dict[str, EncodingLoss]:
    """Return losses from JSON types.

    Raises:
        ValueError: If one cannot be that of a tensor; also TypeError and AttributeError.
    """
    losses = {name: EncodingLoss(**loss) for name, loss in found.items()}
    if not all(map(_is_valid, losses.values())):
        raise ValueError("not what a tensor can have lost")
    return losses


def _is_valid(loss: EncodingLoss) -> bool:
    """Return whether a loss can be one of a tensor."""
    counts = loss.blocks, loss.kept, loss.flushed, loss.clipped, loss.step
    sums = loss.squared_error, loss.squared_norm
    return all(type(count) is int and 0 <= count < 2**60 for count in counts) and all(
        type(value) in (int, float) and 0 <= value < math.inf for value in sums
    )


def build_report(
    encoding: Mapping[str, Any], losses: Losses, expected: Iterable[str]
) -> dict[str, Any]:
    """Return the report as JSON types.

    Args:
        encoding: The rule and the reference.
        losses: What each tensor has lost, by the name of its blocks.
        expected: The names of all tensors of blocks that are encoded.
    """
    expected = set(expected)
    tensors = {name: _as_dict(losses[name]) for name in sorted(losses) if name in expected}
    total = EncodingLoss()
    for tensor in tensors.values():
        total.add(_as_loss(tensor))  # as rounded, so that a report can be made again from a report
    return {
        "schema": strict_json.SCHEMA,
        **encoding,
        "total": _as_dict(total),
        "tensors": tensors,
        "unknown": sorted(expected - tensors.keys()),
    }


def parse_report(text: bytes) -> dict[str, Any] | None:
    """Return the report that is in a file, or None for a damaged text or another schema."""
    try:
        report = strict_json.loads(text)
        losses = [_as_loss(tensor) for tensor in (report["total"], *report["tensors"].values())]
        is_valid = all(map(_is_valid, losses)) and isinstance(report["rule"], str)
        is_valid = is_valid and report.get("schema", strict_json.SCHEMA) == strict_json.SCHEMA
        return report if is_valid and isinstance(report["unknown"], list) else None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def reported_losses(text: bytes) -> dict[str, EncodingLoss]:
    """Return what the tensors of a report have lost; nothing for a damaged text."""
    report = parse_report(text)
    tensors = {} if report is None else report["tensors"]
    return {name: _as_loss(tensor) for name, tensor in tensors.items()}


def _as_dict(loss: EncodingLoss) -> dict[str, Any]:
    values = max(1, loss.blocks * BLOCK_VALUES)
    return {
        "blocks": loss.blocks,
        "blocks_kept": loss.kept,
        "blocks_encoded": loss.blocks - loss.kept,
        "relative_error": float(f"{loss.relative_error:.6g}"),
        "norm": float(f"{math.sqrt(loss.squared_norm):.6g}"),
        "clipped": loss.clipped / values,
        "flushed": loss.flushed / values,
    }


def _as_loss(tensor: Mapping[str, Any]) -> EncodingLoss:
    """Return the loss that `_as_dict` describes."""
    values, squared_norm = tensor["blocks"] * BLOCK_VALUES, float(tensor["norm"]) ** 2
    return EncodingLoss(
        blocks=int(tensor["blocks"]),
        kept=int(tensor["blocks_kept"]),
        flushed=round(tensor["flushed"] * values),
        clipped=round(tensor["clipped"] * values),
        squared_error=float(tensor["relative_error"]) ** 2 * squared_norm,
        squared_norm=squared_norm,
    )
