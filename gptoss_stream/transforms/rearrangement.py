"""An einops pattern that is applied to a few rows of its output at a time.

A *row* is a slice of length 1 along the first axis of the output. Two kinds of patterns can be
applied row by row. An example of each, with the sizes of gpt-oss-20b:

    W_Q    n h m -> n m h    [64, 64, 2880] -> [64, 2880, 64]     64 rows, each [2880, 64]
    W_U    v m -> m v        [201088, 2880] -> [2880, 201088]     2880 rows, each [201088]

W_Q: both sides begin with the same axis, here the query heads. Rows 3 to 5 of the output are made
of rows 3 to 5 of the input alone.

W_U: a transposition of two axes. Rows 3 to 5 of the output are columns 3 to 5 of the input, so
every row of the input has to be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["Rearrangement", "make_rearrangement"]


@dataclass(frozen=True, slots=True, eq=False)
class Rearrangement:
    """An einops pattern for inputs of one shape."""

    pattern: str
    source_axes: tuple[str, ...]
    """The input's axes."""
    axes: tuple[str, ...]
    """The output's axes."""
    num_rows: int
    """The length of the output's first axis."""
    row_shape: tuple[int, ...]
    """The lengths of its other axes."""
    transposes: bool
    """Whether a row of the output is a column of the input."""
    is_copy: bool
    """Whether the output is the input unchanged."""


@lru_cache(maxsize=256)
def make_rearrangement(
    source: tuple[str, ...], target: tuple[str, ...], shape: tuple[int, ...]
) -> Rearrangement:
    """Return the rearrangement of inputs of one shape.

    Args:
        source: The input's axes.
        target: The output's axes, the same in any order.
        shape: The input's shape.

    Raises:
        ValueError: If the pattern cannot be applied row by row.
    """
    sizes = dict(zip(source, shape, strict=True))
    pattern = f"{' '.join(source)} -> {' '.join(target)}"
    if sorted(source) != sorted(target) or len(sizes) != len(source):
        raise ValueError(f"pattern {pattern!r} adds, drops or repeats axes")
    transposes = target[0] != source[0]
    if transposes and len(source) != 2:
        raise ValueError(f"pattern {pattern!r} is not a transposition and changes the first axis")
    return Rearrangement(
        pattern=pattern,
        source_axes=source,
        axes=target,
        num_rows=sizes[target[0]],
        row_shape=tuple(sizes[axis] for axis in target[1:]),
        transposes=transposes,
        is_copy=source == target,
    )
