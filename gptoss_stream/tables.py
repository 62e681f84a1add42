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
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from typing import NamedTuple, Protocol

from .checkpoint import CheckpointInfo, RawTensor
from .dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType
from .errors import TensorError, counted, listed
from .model import ATTENTION_BIASES, MODEL_TENSORS, ModelConfig

__all__ = [
    "DENSE",
    "Component",
    "Dense",
    "Encoding",
    "Mxfp4",
    "Row",
    "StoredTensor",
    "Table",
    "check",
    "components",
    "fused",
    "group_sizes",
    "names_present",
    "packed_tensors",
    "read_table",
]

_MOST_MISSING = 100_000  # that are looked for one by one
_FLOATS = (DType.BF16, DType.F16, DType.F32)
_GROUP = re.compile(r"\(([a-z ]+)\)|([a-z])")


class Component(NamedTuple):
    """One stored tensor of a row: what is added to the row's name, its dtypes, its shape."""

    suffix: str
    dtypes: tuple[DType, ...]
    shape: tuple[int, ...]


class Encoding(Protocol):
    """How the elements of a tensor become stored bytes."""

    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """Return the stored tensors for elements of `shape`; raises `ValueError` for a shape that
        cannot be encoded."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """Floats as they are, in one tensor."""

    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
        """Return the one stored tensor."""
        return (Component("", _FLOATS, shape),)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """MXFP4 along the last axis (OCP Microscaling Formats v1.0): blocks [..., columns / 32, 16] and
    scales [..., columns / 32], both U8; the fields are what the row's name gets for each."""

    blocks: str
    scales: str

    def components(self, shape: tuple[int, ...]) -> tuple[Component, ...]:
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


DENSE = Dense()


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


class StoredTensor(NamedTuple):
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


def fused(table: Iterable[Row]) -> dict[str, tuple[Row, ...]]:
    """Group rows by stored name, in the order of the table."""
    found: dict[str, tuple[Row, ...]] = {}
    for row in table:
        found[row.stored] = (*found.get(row.stored, ()), row)
    return found


def packed_tensors(table: Table) -> set[str]:
    """Return the model tensors that a table stores in MXFP4."""
    return {row.tensor for row in table if isinstance(row.encoding, Mxfp4)}


def components(rows: Sequence[Row], sizes: Mapping[str, int]) -> Iterator[StoredTensor]:
    """Yield the stored tensors of rows with one stored name.

    Raises:
        TensorError: If the sizes cannot be encoded.
    """
    (first, *rest), encoding = group_sizes(rows[0], sizes), rows[0].encoding
    first = sum(group_sizes(row, sizes)[0] for row in rows)
    try:
        found = encoding.components((first, *rest))
    except ValueError as error:
        raise TensorError(f"tensor {rows[0].stored!r}: {error}; check config.json") from None
    for number, (suffix, dtypes, shape) in enumerate(found):
        yield StoredTensor(rows[0].stored + suffix, tuple(rows), dtypes, shape, number)


def read_table(table: Table, model: ModelConfig, info: CheckpointInfo) -> tuple[Table, ModelConfig]:
    """Decide by stored names alone how a checkpoint is read.

    What is stored counts, whatever the configuration says: a stored output embedding is one of its
    own, and stored attention biases are the model's.

    Returns:
        The table in the spelling of the checkpoint, and the model with what is stored.

    Raises:
        TensorError: If a tensor is stored under two spellings of its name, or if the configuration
            calls for far more tensors than there are.
    """
    count = sum(prod(model.sizes[axis] for axis in row.named) for row in table)
    if count > len(info.tensors) + _MOST_MISSING:
        raise TensorError(
            f"{info.place}: {info.config_name} calls for {counted(count, 'tensor')}, and there are "
            f"{len(info.tensors)}; check {info.config_name}"
        )

    def is_stored(row: Row, name: str) -> bool:
        name = _first_name(row, name)
        return any(
            name.format(l=layer, e=expert) in info.tensors
            for layer, expert in model.instances(name)
        )

    spelled = []
    for row in table:
        found = [name for name in (row.stored, *row.also) if row.also and is_stored(row, name)]
        if len(found) > 1:
            raise TensorError(
                f"{info.place}: tensors are stored as {found[0]!r} and as {found[1]!r}; "
                "remove one of them"
            )
        spelled.append(replace(row, stored=found[0], also=()) if found else row)
    stored = {row.tensor for row in spelled if not row.optional or is_stored(row, row.stored)}
    return tuple(spelled), replace(
        model,
        attention_bias=model.attention_bias or bool(stored & ATTENTION_BIASES),
        tied_embeddings=model.tied_embeddings and "unembed" not in stored,
        unembed_bias="unembed_bias" in stored,
    )


def names_present(table: Table, tensors: Mapping[str, RawTensor]) -> set[str]:
    """Return which of a table's names, of the first layer and expert, tensors have."""
    names = {
        _first_name(row, name).format(l=0, e=0) for row in table for name in (row.stored, *row.also)
    }
    return names & tensors.keys()


def _first_name(row: Row, stored: str) -> str:
    """The name of the first stored tensor of a row."""
    return stored + row.encoding.components((BLOCK_VALUES,))[0].suffix


def check(table: Table, model: ModelConfig, info: CheckpointInfo) -> None:
    """Check every stored tensor that a table needs against the headers.

    Tensors of a layer beyond the model's last are refused; others that the table does not name
    are not looked at.

    Raises:
        TensorError: Naming file, tensor, what was found and what was expected; several missing
            tensors are named at once.
    """
    missing: dict[str, None] = {}
    config = info.config_name
    for rows in fused(row for row in table if row.is_in(model)).values():
        for stored in components(rows, model.sizes):
            beyond = info.tensors.get(stored.name.format(l=model.num_layers, e=0))
            if beyond is not None and "{l}" in stored.name:
                raise TensorError(
                    f"{info.place.at(beyond.shard)}: tensor {beyond.name!r} is of a layer that "
                    f"{config}, with {model.num_layers} layers, has not; check {config}"
                )
            for layer, expert in model.instances(stored.name):
                name = stored.name.format(l=layer, e=expert)
                raw = info.tensors.get(name)
                if raw is None:
                    missing[name] = None
                elif raw.dtype not in stored.dtypes or raw.shape != stored.shape:
                    expected = " or ".join(map(str, stored.dtypes))
                    raise TensorError(
                        f"{info.place.at(raw.shard)}: tensor {name!r} is {raw.dtype} "
                        f"{list(raw.shape)}; {config} calls for {expected} {list(stored.shape)}"
                    )
    if missing:
        raise TensorError(
            f"{info.place}: {counted(len(missing), 'tensor')} missing that {config} calls for: "
            f"{listed([*map(repr, missing)])}; download the checkpoint again"
        )
