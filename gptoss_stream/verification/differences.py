"""The results of a verification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .._utils.messages import counted, shortened, sized, summary
from .._utils.strict_json import SCHEMA
from ..errors import VerificationError

__all__ = ["Difference", "Verification"]


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference between an output and what was expected."""

    kind: str
    """`missing`, `unexpected`, `dtype`, `shape`, `index`, `file`, `checksum` or `value`."""
    name: str
    """The tensor or file."""
    shard: str = ""
    """The shard of a tensor; empty for a file."""
    found: Any = None
    """What the output has: a number, a dtype's code, a shape or a text; None for nothing."""
    expected: Any = None
    """What was expected, likewise."""
    index: tuple[int, ...] = ()
    """For a value, the indices of the tensor's first element that differs."""

    def __repr__(self) -> str:
        return summary(self, str(self))

    def __str__(self) -> str:
        where = f" in {self.shard}" if self.shard else ""
        at = f" at {list(self.index)}" if self.index else ""
        if self.found is None and self.expected is None:
            return f"{self.kind}: {self.name}{where}"
        return f"{self.kind}: {self.name}{where}{at}: {self.found}, expected {self.expected}"


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of `verify` or `verify_checksums`; true if the output is as expected."""

    output: str
    """What was verified: a path or a URL."""
    format: str
    """The format that was expected; empty for checksums."""
    selection: Mapping[str, Any]
    """The selection that was expected, as `ResolvedSelection.as_dict`; empty for checksums."""
    tensors: int
    """Number of tensors whose data were compared; 0 for checksums."""
    files: int
    """Number of files whose checksums were compared; 0 without checksums."""
    nbytes: int
    """Bytes that were compared."""
    differences: tuple[Difference, ...]
    """What is not as expected; of a tensor's data the first element that differs."""
    unread: int = 0
    """Number of those files that were not read, since the Hub lists their checksums."""

    def __repr__(self) -> str:
        found = counted(len(self.differences), "difference") if self.differences else "equal"
        what = counted(self.files, "file") if self.files else counted(self.tensors, "tensor")
        return summary(self, f"{found}, {what} and {sized(self.nbytes)} compared, {self.output}")

    def __bool__(self) -> bool:
        return self.equal

    @property
    def equal(self) -> bool:
        """Whether there are no differences."""
        return not self.differences

    def raise_for_differences(self) -> None:
        """Raise an error that names the first differences; do nothing if there are none.

        Raises:
            VerificationError: If the output is not as expected.
        """
        if self.differences:
            first = [shortened(" ".join(str(one).split()), 150) for one in self.differences[:3]]
            more = "; …" if len(self.differences) > len(first) else ""
            raise VerificationError(
                f"{self.output}: {counted(len(self.differences), 'difference')}: "
                f"{'; '.join(first)}{more}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        return {"schema": SCHEMA, **asdict(self), "equal": self.equal}
