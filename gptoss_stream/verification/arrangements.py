"""Finds out whether values are those of a reference, in its own arrangement or in another one.

An arrangement says at which row and column of the reference a value of the source should be. It is
found only if the values show it clearly: unrelated values differ by about 1.4 times their norm in
every arrangement, and a fine-tune by far less in the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from .elements import Array
from .relations import Relation

__all__ = ["Arrangement", "arrangements", "relate"]

Arrangement: TypeAlias = "Callable[[Array, Array], tuple[Array, Array]]"
"""Returns the rows and columns of the reference for rows and columns of the source."""

_FEWEST_VALUES = 32
"""The fewest values from which anything else than equality is concluded."""
_MUCH_CLOSER = 0.5
"""How much smaller the distance in another arrangement must be, as a ratio."""
_MOSTLY = 0.6
"""The share of the values that must be closer in another arrangement: a few large ones are not
enough. Of unrelated values it is half."""
_ROUNDED = 0.005
"""What remains of scaled values may differ by this much: bfloat16 rounds them by up to 0.004. A
scale as close to 1 is not named."""


def arrangements(
    tensor: str, num_rows: int, num_columns: int, *, is_split: bool
) -> Iterator[tuple[str, Arrangement]]:
    """Yield the arrangements that a tensor may have, with their names in `Relation`.

    Args:
        tensor: The model tensor.
        num_rows: The rows of its matrix, in which gate and up alternate.
        num_columns: The columns; 1 for a vector.
        is_split: Whether the source stores gate and up in tensors of their own.
    """
    half = num_rows // 2

    def halves(rows: Array) -> Array:
        block, row = np.divmod(rows, half)
        return 2 * row + block

    yield "", lambda rows, columns: (rows, columns)
    if num_rows == num_columns > 1:
        yield "transposed", lambda rows, columns: (columns, rows)
    if tensor in ("gate_up", "gate_up_bias"):
        yield "halves", lambda rows, columns: (halves(rows), columns)
        yield "alternating", lambda rows, columns: (rows % 2 * half + rows // 2, columns)
        if num_rows == num_columns:
            yield "transposed halves", lambda rows, columns: (halves(columns), rows)
        elif is_split and half == num_columns:  # two square matrices
            yield "transposed", lambda rows, columns: (2 * columns + rows % 2, rows // 2)


def relate(
    tensor: str, layer: int | None, expert: int | None, found: Array, expected: Mapping[str, Array]
) -> Relation:
    """Return how values of the source relate to those of the reference.

    Args:
        tensor: The model tensor.
        layer: Its layer.
        expert: Its expert.
        found: Values of the source.
        expected: What they should be, by arrangement; "" is that of the format.
    """
    own = expected[""]
    # In an arrangement that moves few values, or equal ones, nothing can be seen.
    visible = [
        name
        for name, values in expected.items()
        if np.count_nonzero(values != own) >= _FEWEST_VALUES and _varies(found)
    ]

    def relation(
        values: str,
        arrangement: str = "",
        difference: float | None = None,
        scale: float | None = None,
    ) -> Relation:
        return Relation(
            tensor, layer, expert, values, arrangement, difference, scale, bool(visible)
        )

    if np.array_equal(found, own):
        return relation("equal", difference=0.0)
    if not all(np.isfinite(values).all() for values in (found, *expected.values())):
        return relation("changed")
    found = found.astype(np.float64)  # in which no product of floats is infinite
    expected = {name: values.astype(np.float64) for name, values in expected.items()}
    own = expected[""]
    chosen = min(visible, key=lambda name: _fit(found, expected[name])[1], default="")
    if chosen and not _is_clear(found, expected[chosen], own):
        chosen = ""
    values = expected[chosen]
    if np.array_equal(found, values):
        return relation("equal", chosen, 0.0)
    norm = _norm(values)
    difference = _norm(found - values) / norm if norm else None
    scale, remaining = _fit(found, values)
    if (
        np.count_nonzero(values) >= _FEWEST_VALUES
        and _varies(values)
        and abs(scale - 1) >= _ROUNDED
        and remaining <= min(_ROUNDED, abs(scale - 1) / 4)
    ):
        return relation("scaled", chosen, difference, scale)
    return relation("changed", chosen, difference)


def _is_clear(found: Array, expected: Array, own: Array) -> bool:
    """Return whether values are clearly closer to those of another arrangement than to their own.

    They are compared after scaling.
    """
    (scale, distance), (own_scale, own_distance) = _fit(found, expected), _fit(found, own)
    moved = expected != own
    closer = np.abs(found - scale * expected) < np.abs(found - own_scale * own)
    return distance <= _MUCH_CLOSER * own_distance and bool(closer[moved].mean() >= _MOSTLY)


def _fit(found: Array, expected: Array) -> tuple[float, float]:
    """Return the scale that fits best, and the relative distance that remains.

    If one side is zero, the scale is 0 and the distance 1.
    """
    if not found.any() or not expected.any():
        return 0.0, 1.0
    scale = float(found @ expected / (expected @ expected))
    return scale, _norm(found - scale * expected) / _norm(found)


def _norm(values: Array) -> float:
    return float(np.linalg.norm(values))


def _varies(values: Array) -> bool:
    return bool((values != values[0]).any())
