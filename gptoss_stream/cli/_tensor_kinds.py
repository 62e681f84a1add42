"""Tensors by kind: one line for all layers and experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .._utils.messages import listed, sized
from ..model.selection import GROUPS

if TYPE_CHECKING:
    from ..formats import Row
    from ..tensors.raw_tensor import RawTensor

__all__ = ["print_kinds"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_OTHER = "other"


def print_kinds(tensors: Mapping[str, RawTensor], table: Iterable[Row]) -> None:
    """Print a line for each kind of tensor: component, name, number, dtype, shape and size.

    Args:
        tensors: The tensors, by their names in the format.
        table: The format's table.
    """
    kinds: dict[str, list[RawTensor]] = {}
    for name, raw in tensors.items():
        kinds.setdefault(_pattern(name), []).append(raw)
    components = {
        row.stored.format(l="{layer}", e="{expert}"): _component(row.tensor) for row in table
    }
    order = [*GROUPS, _OTHER]
    lines = [
        (
            _component_of(pattern, components),
            pattern,
            f"{len(found):,}",
            listed(sorted({raw.dtype.code for raw in found})),
            listed(sorted({str(list(raw.shape)) for raw in found})),
            sized(sum(raw.nbytes for raw in found)),
        )
        for pattern, found in kinds.items()
    ]
    lines.sort(key=lambda line: order.index(line[0]))
    widths = [max(map(len, column), default=0) for column in zip(*lines, strict=True)]
    for line in lines:
        component, pattern, count, dtype, shape, size = (
            text.rjust(width) if number in (2, 5) else text.ljust(width)
            for number, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        print(f"  {component}  {pattern}  {count} x  {dtype}  {shape}  {size}")


def _pattern(name: str) -> str:
    """Return a name with {layer} and {expert} for the first two numbers in it."""
    words = iter(("{layer}", "{expert}"))
    return _NUMBER.sub(lambda number: next(words, number[0]), name)


def _component(tensor: str) -> str:
    """Return the component of a model tensor."""
    return next((name for name, members in GROUPS.items() if tensor in members), _OTHER)


def _component_of(pattern: str, components: Mapping[str, str]) -> str:
    """Return the component of a kind; the parts of MXFP4 have a suffix to the table's name."""
    stored = [
        one for one in components if pattern == one or pattern.startswith((one + "_", one + "."))
    ]
    return components[max(stored, key=len)] if stored else _OTHER
