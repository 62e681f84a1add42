"""What is known of a shard when it is completely written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..tensors.encoding_loss import EncodingLoss

__all__ = ["ShardSummary"]


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What is known of a shard when it is completely written."""

    sha256: str | None = None
    """Its checksum; None unless checksums were asked for."""
    losses: Mapping[str, EncodingLoss] = field(default_factory=dict)
    """What encoding to MXFP4 has lost, by the name of the tensor of blocks."""
