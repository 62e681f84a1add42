"""The results of a comparison of two checkpoints (see `compare`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .._utils.messages import summary
from .._utils.strict_json import SCHEMA

__all__ = ["Comparison", "Relation"]


@dataclass(frozen=True, slots=True)
class Relation:
    """How a tensor of the source relates to the same tensor of the reference."""

    tensor: str
    """The model tensor, such as "down" (see `MODEL_TENSORS`)."""
    layer: int | None
    """The layer; None for a tensor that belongs to none."""
    expert: int | None
    """The expert; None for a tensor that belongs to none."""
    values: str
    """`equal`, `scaled`, `changed`, or `missing` for a tensor that only one of the two stores."""
    arrangement: str = ""
    """How the source stores the values, if it is not as its format says.

    `transposed`: rows and columns are exchanged. `halves`: gate and up are stored one after the
    other, and are read as if they alternated. `alternating`: gate and up alternate, and are read
    as if they were stored one after the other. `transposed halves`: both.
    """
    difference: float | None = None
    """The relative difference ‖source - reference‖ / ‖reference‖ in that arrangement. None if
    nothing was compared, the reference is zero, or a value is no finite number."""
    scale: float | None = None
    """Of `scaled` values, the source divided by the reference."""
    shows_arrangement: bool = False
    """Whether the values can show another arrangement: those of a matrix that is not square, is
    symmetric, or has few values cannot."""

    def __str__(self) -> str:
        values = self.values
        if self.scale is not None:
            values = f"scaled by {self.scale:.3g}"
        elif values == "changed" and self.difference is not None:
            values = f"changed by {self.difference:.2g}"
        if not self.arrangement:
            return values
        return self.arrangement if values == "equal" else f"{self.arrangement}, {values}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare`."""

    source: str
    """What was compared: a path or a URL."""
    source_format: str
    """Its format."""
    reference: str
    """What it was compared with: a path or a URL."""
    reference_format: str
    """Its format."""
    layers: int
    """The number of layers that were compared, from the first on."""
    experts: tuple[int, ...]
    """The experts that were compared."""
    num_values: int
    """The number of values that were compared."""
    notes: tuple[str, ...]
    """What was not compared because only one of the two models has it."""
    relations: tuple[Relation, ...]
    """Every compared tensor, layer by layer."""

    def __repr__(self) -> str:
        counts = Counter(relation.values for relation in self.relations)
        found = [f"{count:,} {values}" for values, count in counts.items()]
        found += [f"{tensor} {how}" for tensor, how in self.rearranged.items()]
        return summary(self, f"{', '.join(found)}; {self.source} with {self.reference}")

    @property
    def rearranged(self) -> Mapping[str, str]:
        """The model tensors that are rearranged throughout, each with its arrangement.

        Of these, every tensor that can show its arrangement has one and the same.
        """
        found: dict[str, set[str]] = {}
        for relation in self.relations:
            if relation.shows_arrangement and relation.values != "missing":
                found.setdefault(relation.tensor, set()).add(relation.arrangement)
        return {
            tensor: arrangement
            for tensor, arrangements in found.items()
            if len(arrangements) == 1 and (arrangement := next(iter(arrangements)))
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        return {"schema": SCHEMA, **asdict(self), "rearranged": dict(self.rearranged)}
