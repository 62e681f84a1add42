"""How a checkpoint format stores the model's tensors: what the tables in `formats/` are made of.

A table is a tuple of `Row`; each says which stored tensor holds which tensor of the model, in which
order of axes. The same table reads a checkpoint and writes one. For example

    Row("model.layers.{l}.mlp.experts.gate_up_proj", "gate_up", "e m (i t)")

is a stored tensor of each layer with the shape [experts, hidden, 2 * intermediate], in whose last
axis gate and up alternate, and

    Row("blocks.{l}.mlp.experts.{e}.W_in.weight", "gate_up", "i m", {"t": 1})

is the up projection of one expert, [intermediate, hidden].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import NamedTuple, Protocol

from ..errors import TensorError
from ..model.config import ModelConfig
from ..model.tensors import MODEL_TENSORS
from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType

__all__ = [
    "DENSE",
    "Component",
    "DenseEncoding",
    "Encoding",
    "Mxfp4Encoding",
    "Row",
    "Table",
    "TensorSpec",
    "group_sizes",
    "mxfp4_tensors",
    "rows_by_name",
    "tensor_specs",
]


_FLOATS = (DType.BF16, DType.F16, DType.F32)


_GROUP = re.compile(r"\(([a-z ]+)\)|([a-z])")


class Component(NamedTuple):
    """One stored tensor of a row: what is added to the row's name, its dtypes, its shape."""

    suffix: str
    dtypes: tuple[DType, ...]
    shape: tuple[int, ...]


class Encoding(Protocol):
    """How the elements of a tensor become stored bytes."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """Return the stored tensors for elements of `shape`; raises `ValueError` for a shape that
        cannot be encoded."""
        ...


@dataclass(frozen=True, slots=True)
class DenseEncoding:
    """Floats as they are, in one tensor."""

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """Return the one stored tensor."""
        return (Component("", _FLOATS, shape),)


@dataclass(frozen=True, slots=True)
class Mxfp4Encoding:
    """MXFP4 along the last axis (OCP Microscaling Formats v1.0): blocks [..., columns / 32, 16] and
    scales [..., columns / 32], both U8; the fields are what the row's name gets for each."""

    blocks: str
    scales: str

    def tensor_specs(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """Return blocks and scales."""
        *lead, columns = shape
        groups, rest = divmod(columns, BLOCK_VALUES)
        if rest:
            raise ValueError(
                f"rows of {columns} values do not divide into MXFP4 blocks of {BLOCK_VALUES}"
            )
        return (
            Component(self.blocks, (DType.U8,), (*lead, groups, BLOCK_NBYTES)),
            Component(self.scales, (DType.U8,), (*lead, groups)),
        )


DENSE = DenseEncoding()


@cache
def _parse(axes: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple((several or one).split()) for several, one in _GROUP.findall(axes))


@cache
def _flat(axes: str) -> tuple[str, ...]:
    return tuple(axis for group in _parse(axes) for axis in group)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a table: a stored tensor and the model tensor in it.

    Args:
        stored: The stored name, with `{l}` and `{e}` for the layer's and the expert's number.
        tensor: A name in `model.MODEL_TENSORS`.
        axes: The axes as they are stored, those in parentheses as one: "e m (i t)". Rows with the
            same stored name lie one after another along the first.
        fixed: Axes that are not stored because the row holds one index of them: {"t": 0}.
        encoding: How elements become bytes.
        optional: Whether a checkpoint may lack the tensor (see `ModelConfig.has`).
        also: Other stored names for the same, which are read and not written.

    Raises:
        ValueError: If the axes are not those of the model tensor.
    """

    stored: str
    tensor: str
    axes: str
    fixed: Mapping[str, int] = field(default_factory=dict)
    encoding: Encoding = DENSE
    optional: bool = False
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        found = sorted([*self.order, *self.fixed, *self.named])
        if found != sorted(MODEL_TENSORS[self.tensor].split()):
            raise ValueError(
                f"{self.stored!r} has the axes {' '.join(found)}, and {self.tensor} has "
                f"{MODEL_TENSORS[self.tensor]}"
            )

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The axes that make up each stored axis."""
        return _parse(self.axes)

    @property
    def order(self) -> tuple[str, ...]:
        """The stored axes, outermost first."""
        return _flat(self.axes)

    @property
    def named(self) -> tuple[str, ...]:
        """The axes whose index the stored name tells."""
        return tuple(axis for axis in ("l", "e") if f"{{{axis}}}" in self.stored)

    def is_in(self, model: ModelConfig) -> bool:
        """Return whether a checkpoint of the model has the tensor."""
        return not self.optional or model.has(self.tensor)


Table = tuple[Row, ...]


class TensorSpec(NamedTuple):
    """A stored tensor of a table, with `{l}` and `{e}` in its name where there are several: its
    rows, and what they have in common."""

    name: str
    rows: tuple[Row, ...]
    dtypes: tuple[DType, ...]
    shape: tuple[int, ...]
    component: int
    """Which of the encoding's components it is."""


def group_sizes(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the sizes of a row's stored axes, before they are encoded."""
    return tuple(prod(sizes[axis] for axis in group) for group in row.groups)


def rows_by_name(table: Iterable[Row]) -> dict[str, tuple[Row, ...]]:
    """Group rows by stored name, in the order of the table."""
    found: dict[str, tuple[Row, ...]] = {}
    for row in table:
        found[row.stored] = (*found.get(row.stored, ()), row)
    return found


def mxfp4_tensors(table: Table) -> set[str]:
    """Return the model tensors that a table stores in MXFP4."""
    return {row.tensor for row in table if isinstance(row.encoding, Mxfp4Encoding)}


def tensor_specs(rows: Sequence[Row], sizes: Mapping[str, int]) -> Iterator[TensorSpec]:
    """Yield the stored tensors of rows with one stored name.

    Raises:
        TensorError: If the sizes cannot be encoded.
    """
    (first, *rest), encoding = group_sizes(rows[0], sizes), rows[0].encoding
    first = sum(group_sizes(row, sizes)[0] for row in rows)
    try:
        found = encoding.tensor_specs((first, *rest))
    except ValueError as error:
        raise TensorError(f"tensor {rows[0].stored!r}: {error}; check config.json") from None
    for number, (suffix, dtypes, shape) in enumerate(found):
        yield TensorSpec(rows[0].stored + suffix, tuple(rows), dtypes, shape, number)
