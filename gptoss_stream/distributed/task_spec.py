"""A conversion in words that can travel, and making a shard of it wherever they arrive.

What other processes need to know is where source and output are and what was asked for: they open
both themselves, with credentials of their own, and plan anew. The plan must come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import __version__

__all__ = ["ShardResult", "TaskSpec"]


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What a process elsewhere must know to make shards of a conversion.

    `source` and `output` are names for `open_place` and `open_store`, without any secret;
    `options` are those of `plan`; `identity` is what must come of it there too. `threads` work on
    a shard. What goes to a store lies in `staging` meanwhile, or where the process has room.
    """

    source: str
    output: str
    options: Mapping[str, Any]
    identity: Mapping[str, Any]
    checksums: bool
    threads: int
    staging: str | None
    version: str = __version__


@dataclass(frozen=True, slots=True)
class ShardResult:
    """A shard that was made: its SHA-256 where that is wanted, and the most memory that the
    process has had, in bytes."""

    sha256: str | None
    peak_rss: int
