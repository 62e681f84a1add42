"""einops patterns of whole tensors, applied to a few rows of the output at a time.

Two kinds suffice for what `mapping` asks for. Either the output's first axis is the input's too, as
in `n m h -> n h m`: then a slice along it comes from a slice of the input. Or the pattern is a
transposition, `a b -> b a`: then rows of the output are columns of the input, gathered from all its
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Rearrangement", "rearrangement"]


@dataclass(frozen=True, slots=True, eq=False)
class Rearrangement:
    """A pattern for inputs of one shape.

    The output is made in units: slices of length 1 along its first axis. There are `units` of the
    shape `unit_shape`.
    """

    pattern: str
    axes: tuple[str, ...]
    """The output's axes."""
    num_rows: int
    row_shape: tuple[int, ...]
    transposes: bool
    """Whether a unit is a column of the input."""
    is_copy: bool
    """Whether the output is the input unchanged."""


@lru_cache(maxsize=256)
def rearrangement(
    source: tuple[str, ...], target: tuple[str, ...], shape: tuple[int, ...]
) -> Rearrangement:
    """Rearrange inputs with the axes `source`, of this shape, into outputs with the axes `target`.

    Raises:
        ValueError: For axes that cannot be rearranged a few rows at a time.
    """
    sizes = dict(zip(source, shape, strict=True))
    pattern = f"{' '.join(source)} -> {' '.join(target)}"
    if sorted(source) != sorted(target) or len(sizes) != len(source):
        raise ValueError(f"pattern {pattern!r} adds, drops or repeats axes")
    transposes = target[0] != source[0]
    if transposes and len(source) != 2:
        raise ValueError(f"pattern {pattern!r} is no transposition and begins with another axis")
    return Rearrangement(
        pattern=pattern,
        axes=target,
        num_rows=sizes[target[0]],
        row_shape=tuple(sizes[axis] for axis in target[1:]),
        transposes=transposes,
        is_copy=source == target,
    )
