"""Tables: how a format stores the tensors of a model.

A table is a tuple of rows. A row says which stored tensor holds which model tensor, and in which
order of axes. The same table reads a checkpoint and writes one. For example

    Row("model.layers.{l}.mlp.experts.gate_up_proj", "gate_up", "e m (i t)")

is a stored tensor of each layer with the shape [experts, hidden, 2 * intermediate]. Its last axis
alternates between gate and up. And

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
    "mxfp4_tensors",
    "rows_by_name",
    "stored_shape",
    "table_specs",
    "tensor_specs",
]


_FLOATS = (DType.BF16, DType.F16, DType.F32)
_GROUP = re.compile(r"\(([a-z ]+)\)|([a-z])")


class Component(NamedTuple):
    """One of the stored tensors that an encoding makes of a tensor, such as the scales of MXFP4."""

    suffix: str
    """What follows the row's name in the component's."""
    dtypes: tuple[DType, ...]
    """The dtypes that it may have."""
    shape: tuple[int, ...]


class Encoding(Protocol):
    """How the elements of a tensor are stored."""

    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """Return the stored tensors for elements of a shape.

        Raises:
            ValueError: If elements of that shape cannot be encoded.
        """
        ...


@dataclass(frozen=True, slots=True)
class DenseEncoding:
    """Floats, in one tensor of the same shape."""

    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """See `Encoding`."""
        return (Component("", _FLOATS, shape),)


@dataclass(frozen=True, slots=True)
class Mxfp4Encoding:
    """MXFP4 along the last axis (OCP Microscaling Formats v1.0), in two tensors of U8.

    Args:
        blocks: The suffix of the blocks' name; their shape is [..., columns / 32, 16].
        scales: The suffix of the scales' name; their shape is [..., columns / 32].
    """

    blocks: str
    scales: str

    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """See `Encoding`."""
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
def _groups(axes: str) -> tuple[tuple[str, ...], ...]:
    """Parse "e m (i t)" to (("e",), ("m",), ("i", "t"))."""
    return tuple(tuple((several or one).split()) for several, one in _GROUP.findall(axes))


@cache
def _order(axes: str) -> tuple[str, ...]:
    """Parse "e m (i t)" to ("e", "m", "i", "t")."""
    return tuple(axis for group in _groups(axes) for axis in group)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of a table: a stored tensor and the model tensor in it.

    Args:
        stored: The stored name, with `{l}` for the layer and `{e}` for the expert.
        tensor: The model tensor, a name in `MODEL_TENSORS`.
        axes: The axes in the order in which they are stored, such as "e m (i t)". Axes in
            parentheses are one stored axis. Rows with the same stored name are one after another
            along the first.
        fixed: Axes of which the row holds one index only, such as {"t": 0}.
        encoding: How the elements are stored.
        optional: Whether a checkpoint may lack the tensor (see `ModelConfig.has`).
        aliases: Other stored names, which are read but not written.
        other_axes: Another order of the axes, which is read where the shape shows it but not
            written.

    Raises:
        ValueError: If the axes are not those of the model tensor.
    """

    stored: str
    tensor: str
    axes: str
    fixed: Mapping[str, int] = field(default_factory=dict)
    encoding: Encoding = DENSE
    optional: bool = False
    aliases: tuple[str, ...] = ()
    other_axes: str = ""

    def __post_init__(self) -> None:
        found = sorted([*self.order, *self.fixed, *self.axes_in_name])
        if found != sorted(MODEL_TENSORS[self.tensor].split()):
            raise ValueError(
                f"{self.stored!r} has the axes {' '.join(found)}, and {self.tensor} has "
                f"{MODEL_TENSORS[self.tensor]}"
            )

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The model axes that make up each stored axis."""
        return _groups(self.axes)

    @property
    def order(self) -> tuple[str, ...]:
        """The model axes in the order in which they are stored, outermost first."""
        return _order(self.axes)

    @property
    def axes_in_name(self) -> tuple[str, ...]:
        """The axes whose index is in the stored name: l, e or both."""
        return tuple(axis for axis in ("l", "e") if f"{{{axis}}}" in self.stored)

    def is_in(self, model: ModelConfig) -> bool:
        """Return whether a checkpoint of the model stores the tensor."""
        return not self.optional or model.has(self.tensor)


Table = tuple[Row, ...]


class TensorSpec(NamedTuple):
    """A tensor that a format stores for a model, such as the scales of all experts of a layer.

    It describes what must be in a checkpoint (as a `RawTensor`) or is to be written (as an
    `OutputTensor`), for all layers and experts with the same name.
    """

    name: str
    """The stored name, with `{l}` for the layer and `{e}` for the expert."""
    rows: tuple[Row, ...]
    """The rows of the table that it holds, one after another along its first axis."""
    dtypes: tuple[DType, ...]
    """The dtypes that it may have."""
    shape: tuple[int, ...]
    component: int
    """The number of the encoding's component that it is."""

    def names(self, model: ModelConfig) -> Iterator[tuple[int, str]]:
        """Yield the layer and the stored name of each tensor that it describes."""
        for layer, expert in model.instances(self.name):
            yield layer, self.name.format(l=layer, e=expert)


def stored_shape(row: Row, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of a row's elements, before they are encoded.

    Args:
        row: The row.
        sizes: The size of each axis (see `ModelConfig.sizes`).
    """
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
    """Yield the tensors that are stored for rows with the same stored name.

    Raises:
        TensorError: If the sizes cannot be encoded.
    """
    length = sum(stored_shape(row, sizes)[0] for row in rows)
    shape = length, *stored_shape(rows[0], sizes)[1:]
    try:
        components = rows[0].encoding.components(shape)
    except ValueError as error:
        raise TensorError(f"tensor {rows[0].stored!r}: {error}; check config.json") from None
    for number, component in enumerate(components):
        name = rows[0].stored + component.suffix
        yield TensorSpec(name, tuple(rows), component.dtypes, component.shape, number)


def table_specs(table: Iterable[Row], model: ModelConfig) -> Iterator[TensorSpec]:
    """Yield the tensors that are stored for a model, in the order of the table.

    Raises:
        TensorError: If the model's sizes cannot be encoded.
    """
    for rows in rows_by_name(row for row in table if row.is_in(model)).values():
        yield from tensor_specs(rows, model.sizes)
