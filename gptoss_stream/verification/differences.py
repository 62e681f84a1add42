"""Holds an output against its source: every byte made again and compared. Or against its sums.

Trusts neither record nor state of the run that made the output. Headers, index, names, dtypes and
shapes first; then the data, segment by segment, in bounded memory. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Difference", "Verification"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it should be.

    `kind` is one of `missing`, `unexpected`, `dtype`, `shape`, `index`, `file`, `checksum` and
    `value`; for a value, `index` is the first differing element's.
    """

    kind: str
    name: str
    shard: str = ""
    found: Any = None
    expected: Any = None
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f" in {self.shard}" if self.shard else ""
        at = f" at {list(self.index)}" if self.index else ""
        if self.found is None and self.expected is None:
            return f"{self.kind}: {self.name}{where}"
        return f"{self.kind}: {self.name}{where}{at}: {self.found}, expected {self.expected}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found: how much was compared (tensors, or files by their sums), and
    every difference. `format` and `selection` are what the output was compared with."""

    output: str
    format: str
    selection: Mapping[str, Any]
    tensors: int
    files: int
    nbytes: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {**asdict(self), "equal": self.equal}
