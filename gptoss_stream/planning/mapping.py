"""From two tables to output tensors: what each tensor of one format is made of in another.

No pair of formats has code of its own. A row of the target and the rows of the source that hold the
same model tensor give the parts of the target's tensor: axes whose index either side fixes are
dropped from both, what is left is an einops pattern, and each fixed index is a slice. For example,
`hf` to `transformer-lens`, `W_in` of expert 3:

    source   e m (i t)   e = 3, t = 1: columns 1, 3, 5 … of the matrix m, 2 * i at 3 * m * 2 * i
    target   i m
    pattern  m i -> i m

Known here: tables, axes and sizes. Not known: what any tensor is called, and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import TypeAlias

from ..checkpoint.metadata import RawTensor
from ..errors import OptionError
from ..formats._table import (
    DENSE,
    Mxfp4Encoding,
    Row,
    Table,
    TensorSpec,
    rows_by_name,
    stored_shape,
    tensor_specs,
)
from ..model.config import ModelConfig
from ..model.tensors import ABSENT_IS_ZERO
from ..tensors.dtypes import DType
from ..transforms.operands import (
    DenseOperand,
    InterleavedOperand,
    Mxfp4Operand,
    Operand,
    ZeroOperand,
)
from ..transforms.output_tensor import Origin, OutputTensor, Segment
from ..transforms.rearrangement import make_rearrangement

__all__ = ["output_tensors", "raw_tensors"]


_MAX_UNIT_NBYTES = 64 << 20
"""A slice along the first axis of an output tensor is held in memory; in any known model it has
less than 1 MB."""


_Groups: TypeAlias = "Sequence[tuple[str, ...]]"
"""The axes that make up each stored axis."""


def output_tensors(
    source: Table,
    target: Table,
    model: ModelConfig,
    raws: Mapping[str, RawTensor],
    dtype: DType | None,
) -> Iterator[OutputTensor]:
    """Yield every tensor of the target, in order: rows with `{l}` layer by layer, rows with `{e}`
    expert by expert within it.

    Args:
        source: The source's table, checked against the raw tensors.
        target: The target's table.
        model: The model.
        raws: The source's tensors by name.
        dtype: The dtype of dense tensors; None keeps that of the source.

    Raises:
        OptionError: If one format cannot be made of the other.
    """
    mapping, sizes = _Mapping(source, model, raws, dtype), model.sizes
    present = rows_by_name(row for row in target if row.is_in(model))
    stored = [one for rows in present.values() for one in tensor_specs(rows, sizes)]
    for has_layer, in_layer in groupby(stored, lambda one: "l" in one.rows[0].axes_in_name):
        block = list(in_layer)
        for layer in range(sizes["l"]) if has_layer else (None,):
            for has_expert, in_expert in groupby(block, lambda one: "e" in one.rows[0].axes_in_name):
                group = list(in_expert)
                for expert in range(sizes["e"]) if has_expert else (None,):
                    for one in group:
                        tensor = mapping.tensor(one, layer or 0, expert)
                        origin = Origin(one.rows[0].tensor, layer, expert)
                        yield replace(tensor, origin=origin)


def raw_tensors(operand: Operand) -> Iterator[RawTensor]:
    """Yield the raw tensors that an operand reads."""
    if isinstance(operand, DenseOperand):
        yield operand.raw
    elif isinstance(operand, Mxfp4Operand):
        yield from (operand.blocks, operand.scales)
    elif isinstance(operand, InterleavedOperand):
        for one in operand.operands:
            yield from raw_tensors(one)


@dataclass(frozen=True, slots=True)
class _Source:
    """A row of the source, and the elements before it in a stored tensor that several rows fill."""

    row: Row
    skipped: int = 0


class _Mapping:
    """The source's side of a mapping."""

    def __init__(
        self, source: Table, model: ModelConfig, raws: Mapping[str, RawTensor], dtype: DType | None
    ) -> None:
        self._sizes = model.sizes
        self._raws = raws
        self._dtype = dtype
        self._sources: dict[str, list[_Source]] = {}
        for rows in rows_by_name(source).values():
            skipped = 0
            for row in rows:
                if row.is_in(model):
                    self._sources.setdefault(row.tensor, []).append(_Source(row, skipped))
                skipped += prod(stored_shape(row, self._sizes))
        # Tied embeddings serve as the unembedding too.
        self._sources.setdefault("unembed", self._sources["embed"])

    def tensor(self, stored: TensorSpec, layer: int, expert: int | None) -> OutputTensor:
        """Return a stored tensor of the target, for one layer and expert."""
        name = stored.name.format(l=layer, e=expert)
        is_packed = isinstance(stored.rows[0].encoding, Mxfp4Encoding)
        segments: list[Segment] = []
        for row in stored.rows:
            fixed = dict(row.fixed) if expert is None else {**row.fixed, "e": expert}
            sources = self._sources.get(row.tensor, [])
            sizes: Mapping[str, int] = self._sizes
            if not sources and row.tensor not in ABSENT_IS_ZERO:
                raise OptionError(f"the source holds nothing that {name!r} can be made of")
            if is_packed:
                sources, sizes = self._as_bytes(row, sources, stored)
            segments += _Binding(self._raws, sources, sizes, layer).segments(row.groups, fixed)
        dtype = DType.U8 if is_packed else self._dtype or self._kept(segments)
        for segment in segments:
            if prod(segment.rearrangement.row_shape) * dtype.itemsize > _MAX_UNIT_NBYTES:
                raise OptionError(f"output tensor {name!r} cannot be made in bounded memory")
        return OutputTensor(name, dtype, stored.shape, tuple(segments))

    def _as_bytes(
        self, target: Row, sources: list[_Source], stored: TensorSpec
    ) -> tuple[list[_Source], Mapping[str, int]]:
        """Take blocks or scales for a tensor of bytes, of which the last axis has some for each
        block: what lies outside a block is moved as it is."""
        last = target.groups[-1]
        for source in sources:
            is_packed = isinstance(source.row.encoding, Mxfp4Encoding)
            if not is_packed or source.row.groups[-1] != last or len(last) != 1 or source.skipped:
                raise OptionError(
                    f"{target.stored!r} is in MXFP4, and the source has no such blocks along the "
                    "same axis; choose another format"
                )
        rows = [_component(source.row, stored.component) for source in sources]
        nbytes = prod(stored.shape[len(target.groups) - 1 :])
        return [_Source(row) for row in rows], {**self._sizes, last[0]: nbytes}

    def _kept(self, segments: Sequence[Segment]) -> DType:
        """The dtype that holds all values of the parts exactly; MXFP4 is exact in bfloat16."""
        raws = [raw for segment in segments for raw in raw_tensors(segment.operand)]
        if not raws:  # zeros
            raws = [self._raws[self._sources["embed"][0].row.stored]]
        found = {DType.BF16 if raw.dtype is DType.U8 else raw.dtype for raw in raws}
        return found.pop() if len(found) == 1 else DType.F32


def _component(row: Row, number: int) -> Row:
    encoding = row.encoding
    assert isinstance(encoding, Mxfp4Encoding)
    suffix = (encoding.blocks, encoding.scales)[number]
    return replace(row, stored=row.stored + suffix, encoding=DENSE)


@dataclass(frozen=True, slots=True)
class _Binding:
    """One model tensor of one layer, in the source's rows."""

    raws: Mapping[str, RawTensor]
    sources: Sequence[_Source]
    sizes: Mapping[str, int]
    layer: int

    def segments(self, groups: _Groups, fixed: Mapping[str, int]) -> Iterator[Segment]:
        """Yield the parts of a target, one after another along its first axis.

        Args:
            groups: The target's axes as it stores them.
            fixed: The index of each axis that the target does not store.
        """
        order = [axis for group in groups for axis in group]
        if not self.sources:
            size = prod(self.sizes[axis] for axis in order)
            yield Segment(ZeroOperand((size,)), make_rearrangement(("x",), ("x",), (size,)))
            return
        lead = order[0]
        if self._is_apart(lead, order, fixed):
            rest = [tuple(axis for axis in group if axis != lead) for group in groups]
            for index in range(self.sizes[lead]):
                yield from self.segments([g for g in rest if g], {**fixed, lead: index})
            return
        yield self._segment(groups, order, fixed)

    def _is_apart(self, lead: str, order: list[str], fixed: Mapping[str, int]) -> bool:
        """Whether each index of the target's first axis is a part of its own.

        So it is where the source holds each in a tensor or row of its own, and where a slice would
        be large (an expert) although the source begins with the same axis.
        """
        stored = self._order(fixed)
        if lead not in stored:
            return True
        if lead not in ("e", "t") or stored == order:
            return False
        return lead == "t" or stored[0] == lead

    def _order(self, fixed: Mapping[str, int]) -> list[str]:
        """The source's axes but for those that are fixed."""
        return [axis for axis in self._source(fixed).row.order if axis not in fixed]

    def _source(self, fixed: Mapping[str, int]) -> _Source:
        """The row that holds the fixed indices; any of several while they leave it open."""
        for source in self.sources:
            if all(fixed.get(axis, index) == index for axis, index in source.row.fixed.items()):
                return source
        raise self._refusal(f"nothing holds {fixed}")

    def _refusal(self, reason: str) -> OptionError:
        row = self.sources[0].row
        return OptionError(
            f"the source's {row.stored!r} ({row.axes}) cannot be made into what is asked for: "
            f"{reason}; choose another format"
        )

    def _segment(self, groups: _Groups, order: list[str], fixed: Mapping[str, int]) -> Segment:
        if "t" in order and _step(self._order(fixed)) != _step(order):
            operand, axes = self._interleaved(groups, fixed)
        else:
            operand, axes = self._operand(fixed)
        runs = _runs(
            axes, order, joined=isinstance(operand, DenseOperand) and operand.selected is None
        )
        shape = tuple(prod(self.sizes[axis] for axis in run) for run in runs)
        if isinstance(operand, DenseOperand) and operand.selected is None:
            operand = replace(operand, stored_shape=shape)
        if shape != operand.shape:
            raise self._refusal(f"its axes cannot be rearranged as {' '.join(order)}")
        names = tuple("".join(run) for run in runs)
        wanted = tuple(sorted(names, key=lambda name: order.index(name[0])))
        try:
            return Segment(operand, make_rearrangement(names, wanted, shape))
        except ValueError as error:
            raise self._refusal(str(error)) from None

    def _interleaved(
        self, groups: _Groups, fixed: Mapping[str, int]
    ) -> tuple[Operand, list[tuple[str, ...]]]:
        """Gate and up in turn, as the target wants them and the source does not hold them."""
        (within,) = (group for group in groups if "t" in group)
        both = [self._operand({**fixed, "t": index}) for index in range(self.sizes["t"])]
        (gate, axes), (up, others) = both
        inner = [number for number, group in enumerate(axes[:2]) if group[-1:] == within[:1]]
        if within[1:] != ("t",) or axes != others or gate.shape != up.shape or not inner:
            raise self._refusal("gate and up cannot be joined")
        joined = [(*group, "t") if number in inner else group for number, group in enumerate(axes)]
        return InterleavedOperand((gate, up), inner[0]), joined

    def _operand(self, fixed: Mapping[str, int]) -> tuple[Operand, list[tuple[str, ...]]]:
        """The source's elements with some indices fixed, and the axes that are left of each of
        its stored axes."""
        source = self._source(fixed)
        row, first = source.row, source.skipped
        groups = list(row.groups)
        sizes = {axis: self.sizes[axis] for axis in row.order}
        while len(groups[0]) == 1 and groups[0][0] in fixed and len(groups) > 1:
            axis = groups.pop(0)[0]
            del sizes[axis]
            first += fixed[axis] * prod(sizes.values())
        shape = tuple(prod(sizes[axis] for axis in group) for group in groups)
        taken, along = None, 0
        for number, group in enumerate(groups):
            for axis in set(group) & fixed.keys():
                if taken is not None or number > 1:
                    raise self._refusal("more than one of its axes would be cut")
                taken, along = _slice(group, axis, fixed[axis], sizes), number
                groups[number] = tuple(other for other in group if other != axis)
        name = row.stored
        if isinstance(row.encoding, Mxfp4Encoding):
            names = (name + row.encoding.blocks, name + row.encoding.scales)
            blocks, scales = (self._raw(name, fixed) for name in names)
            if along:
                raise self._refusal("it would be cut within its MXFP4 blocks")
            if taken is None:
                groups = [tuple(axis for group in groups[:-1] for axis in group), groups[-1]]
            matrix = prod(shape[:-1]), shape[-1]
            return Mxfp4Operand(blocks, scales, first // shape[-1], matrix, taken), groups
        if taken is not None and along == 0 and taken.step == 1:
            first += taken.start * prod(shape[1:])
            shape, taken = (len(taken), *shape[1:]), None
        return DenseOperand(self._raw(name, fixed), first, shape, along, taken), groups

    def _raw(self, name: str, fixed: Mapping[str, int]) -> RawTensor:
        if "{e}" in name and "e" not in fixed:
            raise self._refusal("it holds a single expert")
        return self.raws[name.format(l=self.layer, e=fixed.get("e"))]


def _before(axis: str, order: Sequence[str]) -> str | None:
    """The axis right outside of one."""
    at = order.index(axis)
    return order[at - 1] if at else None


def _step(order: Sequence[str]) -> int | None:
    """How gate and up lie: 1 where they alternate, -1 where they are halves, None where there is
    but one of them."""
    return order.index("t") - order.index("i") if "t" in order else None


def _slice(group: tuple[str, ...], axis: str, index: int, sizes: Mapping[str, int]) -> range:
    """The indices of a stored axis at which one of its axes has an index."""
    size = prod(sizes[other] for other in group)
    if group[0] == axis:
        length = size // sizes[axis]
        return range(index * length, (index + 1) * length)
    if group[-1] == axis:
        return range(index, size, sizes[axis])
    raise OptionError(f"{axis} lies within ({' '.join(group)})")


def _runs(groups: _Groups, order: list[str], *, joined: bool) -> list[list[str]]:
    """Join axes that follow on each other in the source and in the target, in the source's order.

    With `joined`, across the source's stored axes too.
    """
    runs: list[list[str]] = []
    for group in groups:
        begins = not joined
        for axis in group:
            if runs and not begins and _before(axis, order) == runs[-1][-1]:
                runs[-1].append(axis)
            else:
                runs.append([axis])
            begins = False
    return runs
