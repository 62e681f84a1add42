"""A conversion as a specification that can be sent to other processes.

Other processes need to know where the source and the output are, and the options. They open both
with credentials of their own and make the plan again, which must come out the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..planning.options import ConversionOptions
from ..writing.shard_summary import ShardSummary

__all__ = ["ShardResult", "TaskSpec"]


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What another process must know to write shards of a conversion; holds no secret."""

    source: str
    """A name for `open_location`."""
    output: str
    """A local folder, or a name for `open_writable_location`."""
    options: ConversionOptions
    identity: Mapping[str, Any]
    """The identity of the run (`run_identity`), which must come out the same everywhere."""
    checksums: bool
    """Whether the run computes checksums."""
    threads: int
    """Threads that work on a shard."""
    staging: str | None
    """Where a shard is until it is uploaded; None for the process's own folder."""
    version: str = __version__


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What came of writing a shard."""

    summary: ShardSummary
    """What is known of the shard."""
    receipt: bytes | None
    """If the shard is uploaded and not visible yet: for `RemoteFolder.publish`."""
    peak_rss: int
    """The peak resident memory of the process, in bytes."""
