"""Axes of stored tensors: which are joined, and which indices a fixed one leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeAlias

from ..errors import OptionError

__all__ = ["Groups", "gate_up_step", "indices_with", "merge_axes"]

Groups: TypeAlias = "Sequence[tuple[str, ...]]"
"""The model axes that make up each stored axis."""


def gate_up_step(order: Sequence[str]) -> int | None:
    """Return how gate and up are stored.

    Returns:
        1 if they alternate, "(i t)"; -1 if they are halves, "(t i)"; None without both of them.
    """
    return order.index("t") - order.index("i") if "t" in order else None


def indices_with(axis: str, index: int, group: tuple[str, ...], sizes: Mapping[str, int]) -> range:
    """Return the indices of a stored axis at which one of its model axes has an index."""
    size = prod(sizes[other] for other in group)
    if group[0] == axis:
        length = size // sizes[axis]
        return range(index * length, (index + 1) * length)
    if group[-1] == axis:
        return range(index, size, sizes[axis])
    raise OptionError(f"the axis {axis} is within ({' '.join(group)}), where it cannot be sliced")


def merge_axes(
    groups: Groups, order: list[str], block_axis: str, inputs: str, *, across_groups: bool
) -> list[list[str]]:
    """Merge axes that follow on each other in both source and target: they need no rearranging.

    Args:
        groups: The source's axes, as it stores them.
        order: The target's axes.
        block_axis: An axis that is not merged with those before it.
        inputs: Axes that are not merged with others: of an adapted matrix, those of its inputs.
        across_groups: Whether axes of different groups may be merged.

    Returns:
        The source's axes in its order, each merged axis as the axes that it consists of.
    """
    merged: list[list[str]] = []
    for group in groups:
        may_merge = across_groups
        for axis in group:
            position = order.index(axis)
            follows = position > 0 and bool(merged) and order[position - 1] == merged[-1][-1]
            is_alike = follows and (axis in inputs) == (merged[-1][-1] in inputs)
            if may_merge and is_alike and axis != block_axis:
                merged[-1].append(axis)
            else:
                merged.append([axis])
            may_merge = True
    return merged
