"""From a source and a layout to a plan: every shard, tensor, shape and size of the output.

Reads headers and configuration, no tensor data, and moves none. All that can be wrong with a
source and is visible in these is found here, before the first byte is written.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

from . import layouts, sources, storage
from .checkpoint import CheckpointInfo, RawTensor, describe
from .dtypes import DType, output_dtype
from .errors import OptionError
from .layouts import Layout, Row, ZeroRow
from .model import ModelConfig
from .operands import Operand, Packed, Plain, Zeros, plain, take_rows
from .patterns import Rearrangement, rearrangement, transposed
from .places import Name
from .recipe import OutputTensor, Part, extents
from .safetensors_format import build_header
from .selection import ResolvedSelection, Selection

__all__ = [
    "DEFAULT_LAYOUT",
    "DEFAULT_SHARD_SIZE",
    "LayoutTensor",
    "Plan",
    "PlannedShard",
    "layout_tensors",
    "parse_size",
    "plan",
    "shards",
]

DEFAULT_LAYOUT = "transformer-lens"
DEFAULT_SHARD_SIZE = "5GB"
STAGED_NBYTES = 64_000_000
"""A transpose of more than this goes through a scratch file (`scratch`): reading it a few columns
at a time would read it from disk once for each time."""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of the output: its tensors in order, and where each one's data begins in it."""

    name: str
    tensors: tuple[OutputTensor, ...]
    header: bytes = field(repr=False)
    offsets: tuple[int, ...] = field(repr=False)
    nbytes: int

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data."""
        return self.nbytes - len(self.header)

    @property
    def scratch_nbytes(self) -> int:
        """Disk space that is needed beside the shard while it is made."""
        return sum(
            part.elements * plain(part.operand).raw.dtype.itemsize for part, _ in self.staged()
        )

    def overlapping(self, begin: int, end: int) -> Iterator[tuple[OutputTensor, int, int, int]]:
        """The tensors with data in bytes `begin … end` of the file: tensor, from and to which of
        its bytes, and where in the file that is."""
        for i in range(max(0, bisect_right(self.offsets, begin) - 1), len(self.tensors)):
            at = self.offsets[i]
            if at >= end:
                return
            low = max(begin, at)
            high = min(end, at + self.tensors[i].nbytes)
            if low < high:
                yield self.tensors[i], low - at, high - at, low

    def staged(self) -> Iterator[tuple[Part, int]]:
        """The parts that are transposed through a scratch file, and where their tensors begin."""
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            for part in tensor.parts:
                if is_staged(part):
                    yield part, offset


def is_staged(part: Part) -> bool:
    """Whether a part is a transpose too large to be read in columns."""
    operand = part.operand
    return (
        isinstance(operand, Plain)
        and part.rearrangement.axis == 1
        and part.elements * operand.raw.dtype.itemsize > STAGED_NBYTES
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a conversion will write, decided before any data is read."""

    info: CheckpointInfo = field(repr=False)
    source_format: str
    recognised_by: str
    model: ModelConfig
    layout: str
    dtype: DType
    max_shard_size: int
    selection: ResolvedSelection
    is_partial: bool
    """Whether the output holds but a part of the model's tensors."""
    shards: tuple[PlannedShard, ...] = field(repr=False)
    unused: tuple[str, ...]
    """Raw tensors that the checkpoint holds and the layout has no use for."""

    @property
    def num_tensors(self) -> int:
        """Output tensors."""
        return sum(len(shard.tensors) for shard in self.shards)

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data in the output (the index calls it total_size)."""
        return sum(shard.data_nbytes for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the output's shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def source_nbytes(self) -> int:
        """Bytes of the raw tensors that the output is made of, each counted once."""
        touched: dict[str, list[tuple[int, int]]] = {}
        sizes = {}
        for shard in self.shards:
            for tensor in shard.tensors:
                for extent in extents(tensor, 0, tensor.nbytes):
                    sizes[extent.raw.name] = extent.raw.dtype.itemsize
                    runs = touched.setdefault(extent.raw.name, [])
                    runs.append((extent.first, extent.first + extent.count))
        return sum(sizes[name] * _union_length(runs) for name, runs in touched.items())

    @property
    def scratch_nbytes(self) -> int:
        """Disk space that is needed beside the output while it is made."""
        return sum(shard.scratch_nbytes for shard in self.shards)


def _union_length(runs: list[tuple[int, int]]) -> int:
    length, reached = 0, 0
    for begin, end in sorted(runs):
        length += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def plan(
    source: Name,
    *,
    layout: str = DEFAULT_LAYOUT,
    dtype: str = "bfloat16",
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    selection: Selection | None = None,
    source_format: str | None = None,
) -> Plan:
    """Plan the conversion of a checkpoint: a folder, a repository of the Hub, a URL (see
    `places.open_place`).

    `dtype` is a torch name (bfloat16, float16, float32); `max_shard_size` is in bytes or a text
    such as "5GB" (decimal units); `source_format` overrides what is recognised (see
    `sources.names`). Raises `OptionError` for an argument that is none of these,
    `CheckpointError` for a source that cannot be converted, `MachineError` where reading fails,
    `MissingPackageError` where an extra is not installed.
    """
    target_dtype = output_dtype(dtype)
    limit = parse_size(max_shard_size)
    target = layouts.load(layout)
    chosen_format = None if source_format is None else sources.load(source_format)
    info = describe(source)
    format_, reason = (
        sources.recognise(info) if chosen_format is None else (chosen_format, "as asked")
    )
    with sources.naming_config(info):
        model = format_.read_config(info.config)
        target.check(model)
    storage.check(format_.TENSORS, model, info)
    resolved = (selection or Selection()).resolve(model)
    whole = [*layout_tensors(target, format_.TENSORS, model, info.tensors, target_dtype)]
    _refuse_cut_stacks(whole, resolved, layout)
    tensors = [t.tensor for t in whole if resolved.takes(t.tensor.name, *t.made_of)]
    if not tensors:
        raise OptionError(f"the selection {resolved.as_dict()} chooses no tensor of {layout}")
    used = {raw.name for t in whole for raw in _raws(t.tensor)}
    return Plan(
        info=info,
        source_format=format_.NAME,
        recognised_by=reason,
        model=model,
        layout=layout,
        dtype=target_dtype,
        max_shard_size=limit,
        selection=resolved,
        is_partial=len(tensors) < len(whole),
        shards=shards(tensors, limit),
        unused=tuple(sorted(info.tensors.keys() - used)),
    )


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as "5GB", "500MB" or 1000 (decimal units); raises `OptionError`."""
    match = _SIZE.fullmatch(str(size).strip())
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match and len(match[1]) < 20 else 0
    if nbytes < 1:
        raise OptionError(f"{size!r} is not a size; write it as 5GB or 500MB")
    return nbytes


def _raws(tensor: OutputTensor) -> Iterator[RawTensor]:
    for part in tensor.parts:
        operand = part.operand
        if isinstance(operand, Packed):
            yield from (operand.blocks, operand.scales)
        elif isinstance(operand, Plain):
            yield operand.raw


@dataclass(frozen=True, slots=True)
class LayoutTensor:
    """An output tensor and what it is made of: a model tensor, and its layer and expert where
    there are such (of a tensor that stacks the experts, none)."""

    tensor: OutputTensor
    made_of: tuple[str, int | None, int | None]


def layout_tensors(
    layout: Layout,
    table: storage.StoredTable,
    model: ModelConfig,
    raws: Mapping[str, RawTensor],
    dtype: DType,
) -> Iterator[LayoutTensor]:
    """Every output tensor, in order: rows with {l} layer by layer, rows with {e} expert by
    expert within it."""
    present = [r for r in layout.ROWS if not _is_left_out(r, model)]
    for has_layer, rows in groupby(present, lambda row: "{l}" in row.target):
        block = list(rows)
        for layer in range(model.num_layers) if has_layer else (None,):
            for has_expert, run in groupby(block, lambda row: "{e}" in row.target):
                group = list(run)
                for expert in range(model.num_experts) if has_expert else (None,):
                    for row in group:
                        tensor = _tensor(row, table, model, raws, dtype, layer or 0, expert or 0)
                        yield LayoutTensor(tensor, (row.model_tensor, layer, expert))


def _is_left_out(row: Row | ZeroRow, model: ModelConfig) -> bool:
    return isinstance(row, Row) and row.optional and not model.has(row.model_tensor)


def _refuse_cut_stacks(
    tensors: Iterable[LayoutTensor], selection: ResolvedSelection, layout: str
) -> None:
    """Of a tensor that stacks the experts, some would lose their numbers."""
    for t in tensors:
        model_tensor, _, expert = t.made_of
        if (
            selection.experts is not None
            and "{e}" in model_tensor
            and expert is None
            and selection.takes(t.tensor.name, *t.made_of)
        ):
            raise OptionError(
                f"layout {layout} stacks the experts in one tensor ({t.tensor.name}), in which "
                "some would lose their numbers; take all experts, or another layout"
            )


def _tensor(
    row: Row | ZeroRow,
    table: storage.StoredTable,
    model: ModelConfig,
    raws: Mapping[str, RawTensor],
    dtype: DType,
    layer: int,
    expert: int,
) -> OutputTensor:
    name = row.target.format(l=layer, e=expert)
    if isinstance(row, ZeroRow):
        shape = model.shape(row.shape)
        part = Part(
            Zeros(shape), rearrangement("a -> a" if len(shape) == 1 else "a b -> a b", shape)
        )
        return OutputTensor(name, dtype, shape, (part,))
    stacked = "{e}" in row.model_tensor and "{e}" not in row.target
    parts = []
    for e in range(model.num_experts) if stacked else (expert,):
        operand = storage.bind(table, model, raws, row.model_tensor, layer, e)
        operand = take_rows(operand, *row.rows)
        parts.append(Part(operand, _rearrangement(row, operand, model)))
    shape = parts[0].rearrangement.shape
    return OutputTensor(name, dtype, (len(parts), *shape) if stacked else shape, tuple(parts))


def _rearrangement(row: Row, operand: Operand, model: ModelConfig) -> Rearrangement:
    known = tuple((axis, model.size(letters)) for axis, letters in row.axes.items())
    pattern = row.pattern
    if isinstance(operand, Plain) and operand.is_transposed:
        pattern = transposed(pattern)
    return rearrangement(pattern, operand.shape, known)


def shards(
    tensors: Sequence[OutputTensor], limit: int, *, first_number: int = 1, stem: str = "model"
) -> tuple[PlannedShard, ...]:
    """Lay tensors, in order, into shards of at most `limit` bytes of data.

    One suffices: `model.safetensors`. More: `model-00001-of-000NN.safetensors`, counted from
    `first_number` (OpenAI's repositories count from 0, and the last number follows suit).
    """
    sizes = [tensor.nbytes for tensor in tensors]
    groups = balanced_groups(sizes, limit)
    last_number = len(groups) - 1 + first_number
    result = []
    first = 0
    for number, count in enumerate(groups, first_number):
        members = tuple(tensors[first : first + count])
        header = build_header((t.name, t.dtype, t.shape) for t in members)
        starts = accumulate(sizes[first : first + count], initial=len(header))
        *offsets, end = starts
        name = (
            "model.safetensors"
            if len(groups) == 1
            else f"{stem}-{number:05d}-of-{last_number:05d}.safetensors"
        )
        result.append(PlannedShard(name, members, header, tuple(offsets), end))
        first += count
    return tuple(result)


def _greedy(sizes: Iterable[int], limit: int) -> list[int]:
    """How many of the sizes go into each group, in order; one above the limit goes alone."""
    groups: list[int] = []
    room = 0
    for size in sizes:
        if not groups or size > room:
            groups.append(0)
            room = limit
        groups[-1] += 1
        room -= size
    return groups


def balanced_groups(sizes: Sequence[int], limit: int) -> list[int]:
    """Cut sizes, in order, into as few groups of at most `limit` as possible, the largest group
    being as small as it can: how many sizes go into each.

    A size above the limit makes a group alone.
    """
    count = len(_greedy(sizes, limit))
    low, high = max(sizes, default=1), limit
    while low < high:
        middle = (low + high) // 2
        if len(_greedy(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _greedy(sizes, min(high, limit))
