"""What a run writes, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._utils.strict_json import SCHEMA
from ..checkpoint.auxiliary_files import CopiedFile
from ..planning.shards import PlannedShard
from ..tensors.safetensors_header import INDEX_NAME, build_index
from .checksums import CHECKSUMS_NAME
from .encoding_report import REPORT_NAME
from .run_state import RECORD_NAME

__all__ = ["OutputResult", "OutputSpec", "Resumption"]


@dataclass(frozen=True, slots=True)
class Resumption:
    """What a run, or an array task of it, finds of an interrupted one. Sizes are in bytes."""

    total_shards: int
    """Shards that this run, or array task, is to write."""
    finished_shards: int
    """Those that are finished."""
    finished_nbytes: int
    """Their size."""
    written_nbytes: int
    """What was written of other shards and is used."""
    lost_nbytes: int
    """What was written of other shards and is made again."""

    @classmethod
    def of(
        cls,
        shards: Sequence[PlannedShard],
        finished: Sequence[PlannedShard],
        begun_nbytes: int,
        written_nbytes: int,
    ) -> Resumption:
        """Return what a run finds.

        Args:
            shards: The shards that it is to write.
            finished: Those that are finished.
            begun_nbytes: The bytes that were written of others.
            written_nbytes: The bytes of these that can be used.
        """
        nbytes = sum(shard.nbytes for shard in finished)
        lost = max(0, begun_nbytes - written_nbytes)
        return cls(len(shards), len(finished), nbytes, written_nbytes, lost)

    @property
    def nbytes(self) -> int:
        """What is not written again."""
        return self.finished_nbytes + self.written_nbytes


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The files of an output."""

    identity: Mapping[str, Any]
    """JSON values that tell one run from another (`planning.run_identity`)."""
    shards: Sequence[PlannedShard]
    auxiliary_files: Mapping[str, bytes | CopiedFile]
    """Configuration, tokenizer and other small files by name, as bytes or to be copied."""
    checksums: bool = False
    """Whether `SHA256SUMS` is written."""
    encoding: Mapping[str, Any] | None = None
    """The rule and the reference by which floats become MXFP4; None if none do."""
    has_index: bool = True
    """Whether the index is written: a checkpoint has one, an adapter does not."""

    @property
    def index(self) -> bytes:
        """The text of the index file."""
        weight_map = {t.name: shard.name for shard in self.shards for t in shard.tensors}
        return build_index(sum(shard.data_nbytes for shard in self.shards), weight_map)

    @property
    def state(self) -> dict[str, Any]:
        """The state of a run that writes these files (see `run_state`)."""
        names = [*self.auxiliary_files, *(shard.name for shard in self.shards)]
        report = [] if self.encoding is None else [REPORT_NAME]
        checksums = [CHECKSUMS_NAME] if self.checksums else []
        index = [INDEX_NAME] if self.has_index else []
        files = [*names, *report, *checksums, RECORD_NAME, *index]
        return {"schema": SCHEMA, **self.identity, "checksums": self.checksums, "files": files}


@dataclass(frozen=True, slots=True)
class OutputResult:
    """What came of a run."""

    resumed: int
    """Bytes of shards that were written before."""
    is_complete: bool
    """Whether the output is complete; it is not while other array tasks still run."""
    encoding: Mapping[str, Any] | None = None
    """The report about encoding to MXFP4 (see `encoding_report`); None if nothing was encoded, or
    the output is not complete."""
