"""The report of what encoding to MXFP4 has lost: `mxfp4_encoding.json`, beside the shards.

While a run is unfinished, what each shard has lost is kept in a file of its own, which is written
before the shard gets its final name, as its checksum is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from .._utils import strict_json
from ..tensors.dtypes import BLOCK_VALUES
from ..tensors.mxfp4_encoder import EncodingLoss

__all__ = ["LOSSES_SUFFIX", "REPORT_NAME", "build_report", "losses_as_text", "parse_losses"]

REPORT_NAME = "mxfp4_encoding.json"
LOSSES_SUFFIX = ".mxfp4.json"

Losses = Mapping[str, EncodingLoss]


def losses_as_text(losses: Losses) -> bytes:
    """Return what the tensors of a shard have lost as the text of a file."""
    return strict_json.dumps({name: asdict(loss) for name, loss in losses.items()})


def parse_losses(text: bytes) -> dict[str, EncodingLoss]:
    """Return what `losses_as_text` has written; nothing for a damaged text."""
    try:
        return {name: EncodingLoss(**loss) for name, loss in strict_json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def build_report(encoding: Mapping[str, Any], losses: Losses) -> dict[str, Any]:
    """Return the report as JSON types.

    Args:
        encoding: The rule and the reference.
        losses: What each tensor has lost, by the name of its blocks.
    """
    total = EncodingLoss()
    for loss in losses.values():
        total.add(loss)
    return {
        **encoding,
        "total": _as_dict(total),
        "tensors": {name: _as_dict(losses[name]) for name in sorted(losses)},
    }


def _as_dict(loss: EncodingLoss) -> dict[str, Any]:
    values = max(1, loss.blocks * BLOCK_VALUES)
    return {
        "blocks": loss.blocks,
        "blocks_kept": loss.kept,
        "blocks_encoded": loss.blocks - loss.kept,
        "relative_error": float(f"{loss.relative_error:.6g}"),
        "clipped": loss.clipped / values,
        "flushed": loss.flushed / values,
    }
