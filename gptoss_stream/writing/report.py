"""What a conversion did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .._utils.messages import counted, sized, summary
from .._utils.strict_json import SCHEMA
from ..planning.plan import Plan
from .output_spec import OutputResult

__all__ = ["Report", "make_report"]


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did. Sizes are in bytes."""

    output: str
    """Where it was written: a path or a URL."""
    format: str
    """The format that was written."""
    dtype: str
    """The dtype of dense tensors, a torch name or "keep"."""
    partial: bool
    """Whether only some of the model's tensors were written."""
    complete: bool
    """Whether the output is complete; it is not before the last of several array tasks ends."""
    tensors: int
    """The number of tensors of the whole output."""
    bytes_in: int
    """Bytes of the source that the whole output takes."""
    bytes_out: int
    """Bytes of the whole output's shards."""
    bytes_resumed: int
    """Bytes of shards (of this array task) that were finished before."""
    seconds: float
    """How long the run took."""
    peak_rss: int
    """The largest peak resident memory of all processes."""
    shards: dict[str, int]
    """The size of each shard."""
    unmapped: tuple[str, ...]
    """Raw tensors of the source that the output does not use."""
    notes: tuple[str, ...]
    """What users should know about how the source was read."""
    narrowed: Mapping[str, int]
    """The number of tensors that lost precision, by dtypes: {"F32 to BF16": 12}."""
    adapters: tuple[Mapping[str, Any], ...]
    """The LoRA adapters that were merged: location, revision and scale."""
    mxfp4: Mapping[str, Any] | None
    """What encoding to MXFP4 lost, in all and by tensor; None if nothing was encoded, or the output
    is not complete. The same is in the output's mxfp4_encoding.json."""

    def __repr__(self) -> str:
        part = ", part of the model" if self.partial else ""
        state = "" if self.complete else ", not complete yet"
        return summary(
            self,
            f"{counted(self.tensors, 'tensor')}, {sized(self.bytes_out)} in "
            f"{counted(len(self.shards), 'shard')}, {self.format}, {self.dtype}{part}{state}, "
            f"in {self.seconds:.1f} s, {self.output}",
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {"schema": SCHEMA, **asdict(self)}


def make_report(
    plan: Plan,
    output: str,
    result: OutputResult,
    seconds: float,
    peak_rss: int,
) -> Report:
    """Return the report of a conversion.

    Args:
        plan: The plan.
        output: What messages call the output.
        result: What came of the run.
        seconds: How long it took.
        peak_rss: The peak resident memory, in bytes.
    """
    return Report(
        output=output,
        format=plan.to,
        dtype=plan.dtype,
        partial=plan.is_partial,
        complete=result.is_complete,
        tensors=plan.num_tensors,
        bytes_in=plan.source_nbytes,
        bytes_out=plan.nbytes,
        bytes_resumed=result.resumed,
        seconds=seconds,
        peak_rss=peak_rss,
        shards={shard.name: shard.nbytes for shard in plan.shards},
        unmapped=plan.unmapped,
        notes=plan.notes,
        narrowed=plan.narrowed,
        adapters=() if plan.merge is None else tuple(plan.merge.sources()),
        mxfp4=result.encoding,
    )
