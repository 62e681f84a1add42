"""einops patterns, taken apart so that an output can be made a few rows at a time.

A pattern such as `(n h) m -> n m h` says how a whole tensor is rearranged. To make only the units
`n = a … b` of the output, one needs to know which part of the input they come from: here the rows
`a*h … b*h`, and for `m (n h) -> n h m` those columns of every row. That is all this file knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

__all__ = ["Rearrangement", "rearrangement", "transposed"]

_TOKEN = re.compile(r"\(([^()]*)\)|(\w+)")


@dataclass(frozen=True, slots=True, eq=False)
class Rearrangement:
    """A pattern for inputs of one shape.

    `units` is the size of the output's first named axis, which is cut into pieces; `axis` is the
    input axis (0 or 1) in which it lies and `span` how many of that axis' elements one unit
    takes. `unit_shape` is what a unit gives. Where `axis` is 1 a unit gathers from every row of
    the input, whose rows are then the output's last axis.
    """

    pattern: str
    shape: tuple[int, ...]
    units: int
    axis: int
    span: int
    unit_shape: tuple[int, ...]
    tile_sizes: Mapping[str, int]
    """Axis sizes that hold for any piece, as einops wants them beside the pattern."""
    is_copy: bool
    """Whether the output is the input unchanged."""


def _groups(side: str) -> list[list[str]]:
    return [(grouped or single).split() for grouped, single in _TOKEN.findall(side)]


def transposed(pattern: str) -> str:
    """The pattern for an input whose two axes are swapped."""
    left, _, right = pattern.partition("->")
    first, second = (match[0] for match in _TOKEN.finditer(left))
    return f"{second} {first} ->{right}"


def _sizes(
    pattern: str, groups: list[list[str]], shape: tuple[int, ...], known: Mapping[str, int]
) -> dict[str, int]:
    if len(groups) != len(shape):
        raise ValueError(f"pattern {pattern!r} does not fit a tensor of shape {shape}")
    sizes = dict(known)
    for group, size in zip(groups, shape, strict=True):
        unknown = [name for name in group if name not in sizes]
        rest = prod(sizes[name] for name in group if name in sizes)
        if len(unknown) > 1 or rest == 0 or size % rest or (not unknown and rest != size):
            raise ValueError(f"pattern {pattern!r} does not fit a tensor of shape {shape}")
        for name in unknown:
            sizes[name] = size // rest
    return sizes


@lru_cache(maxsize=256)
def rearrangement(
    pattern: str, shape: tuple[int, ...], known: tuple[tuple[str, int], ...] = ()
) -> Rearrangement:
    """Take `pattern` apart for inputs of `shape`; `known` gives sizes the shape leaves open.

    Raises `ValueError` for a pattern that cannot be made in pieces.
    """
    left, _, right = pattern.partition("->")
    groups, out_groups = _groups(left), _groups(right)
    sizes = _sizes(pattern, groups, shape, dict(known))
    order = [name for group in out_groups for name in group]
    if sorted(order) != sorted(name for group in groups for name in group):
        raise ValueError(f"pattern {pattern!r} adds or drops axes")
    lead = order[0]
    axis = next(i for i, group in enumerate(groups) if lead in group)
    if groups[axis][0] != lead or axis > 1:
        raise ValueError(f"pattern {pattern!r} begins with an axis that no run of the input holds")
    if axis == 1 and (len(groups) != 2 or groups[0] != order[-1:] or len(order) != len(out_groups)):
        raise ValueError(
            f"pattern {pattern!r} takes columns: it must end with the rows and merge nothing"
        )
    whole = tuple(prod(sizes[name] for name in group) for group in out_groups)
    streamed = {lead} if axis == 0 else {lead, order[-1]}
    unit_shape = tuple(
        prod(sizes[name] for name in group if name != lead)
        for i, group in enumerate(out_groups)
        if i > 0 or len(group) > 1
    )
    return Rearrangement(
        pattern=pattern,
        shape=whole,
        units=sizes[lead],
        axis=axis,
        span=prod(sizes[name] for name in groups[axis][1:]),
        unit_shape=unit_shape,
        tile_sizes={name: size for name, size in sizes.items() if name not in streamed},
        is_copy=groups == out_groups,
    )
