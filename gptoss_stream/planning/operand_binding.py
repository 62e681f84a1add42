"""The segments of an output tensor, from the axes of a target row and of the source's rows.

A table's row names the axes of a stored tensor: "e m (i t)" has three stored axes, of which the
last consists of two model axes. The model axes of one stored axis are a *group*. An axis is
*fixed* if the target's name or row gives one index of it. Fixed axes are dropped from both sides,
what is left is an einops pattern, and each fixed index is a slice of the source.

Example: `hf` to `transformer-lens`, `W_in` of expert 3, [intermediate, hidden].

    source    e m (i t)       gate_up_proj [32, 2880, 5760]
    target    i m             with e = 3 and t = 1 fixed
    e = 3     m (i t)         elements from 3 * 2880 * 5760 on, [2880, 5760]
    t = 1     m i             its columns 1, 3, 5, …, [2880, 2880]
    pattern   m i -> i m
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..adapters import Saved
from ..errors import OptionError
from ..formats import Row, Table, rows_by_name
from ..formats._table import Mxfp4Encoding, stored_shape
from ..model.config import ModelConfig
from ..model.pruning import ResolvedPruning
from ..tensors.raw_tensor import RawTensor
from ..transforms.mxfp4_operand import Mxfp4Operand
from ..transforms.operand import Operand
from ..transforms.operands import DenseOperand, InterleavedOperand, ZeroOperand
from ..transforms.output_tensor import Segment
from ..transforms.rearrangement import make_rearrangement
from .adaptation import TensorMerge
from .axes import Groups, gate_up_step, indices_with, merge_axes

__all__ = ["SegmentBuilder", "SourceRow", "source_rows"]


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row of the source's table."""

    row: Row
    first: int = 0
    """The row's first element in the stored tensor, which several rows may share."""


def source_rows(
    table: Table, model: ModelConfig, pruning: ResolvedPruning | None = None
) -> dict[str, list[SourceRow]]:
    """Return the rows that hold each model tensor, by its name.

    Args:
        table: The source's table.
        model: The model; rows of tensors that it lacks are left out.
        pruning: The source's layers and experts of which it is made; None for all.
    """
    sizes = {**model.sizes, **(pruning.source_sizes if pruning else {})}
    found: dict[str, list[SourceRow]] = {}
    for rows in rows_by_name(table).values():
        first = 0
        for row in rows:
            if row.is_in(model):
                found.setdefault(row.tensor, []).append(SourceRow(row, first))
            first += prod(stored_shape(row, sizes))
    return found


@dataclass(frozen=True, slots=True)
class SegmentBuilder:
    """Builds the segments of output tensors that hold one model tensor."""

    raws: Mapping[str, RawTensor]
    """The source's tensors by name."""
    source_rows: Sequence[SourceRow]
    """The source's rows with the model tensor; none if it is absent and zero."""
    sizes: Mapping[str, int]
    """The size of each axis in the target."""
    block_axis: str = ""
    """The axis along which the target's rows are encoded, its last one; empty if they are not."""
    pruning: ResolvedPruning | None = None
    """The source's layers and experts of which the target's are made; None if all are the same."""
    merge: TensorMerge | None = None
    """What adapters change in the tensor; None for nothing."""

    def segments(self, groups: Groups, fixed: Mapping[str, int]) -> Iterator[Segment]:
        """Yield the segments for a row of the target.

        Args:
            groups: The target's axes as it stores them.
            fixed: The index of each axis that the target does not store.

        Raises:
            OptionError: If the source's elements cannot be rearranged to the target's.
        """
        order = [axis for group in groups for axis in group]
        if self.merge is not None and order[:1] != ["l"]:
            replacement = self.merge.replacement(fixed)
            if replacement is not None:
                yield from self._replaced(replacement).segments(groups, fixed)
                return
        if not self.source_rows:
            size = prod(self.sizes[axis] for axis in order)
            yield Segment(ZeroOperand((size,)), make_rearrangement(("x",), ("x",), (size,)))
        elif not order:
            yield self._single_element(fixed)
        elif self._needs_split(order, fixed):
            first = order[0]
            others = [tuple(axis for axis in group if axis != first) for group in groups]
            for index in range(self.sizes[first]):
                yield from self.segments([g for g in others if g], {**fixed, first: index})
        else:
            yield self._segment(groups, order, fixed)

    def _replaced(self, replacement: Saved) -> SegmentBuilder:
        """Return a builder that takes what an adapter stores instead of the source's tensor."""
        assert self.merge is not None
        row, raw = replacement.row, replacement.raw
        name = row.stored.format(l=replacement.layer)
        merge = replace(self.merge, is_replaced=True)
        return replace(self, raws={name: raw}, source_rows=[SourceRow(row)], merge=merge)

    def _needs_split(self, order: list[str], fixed: Mapping[str, int]) -> bool:
        """Return whether each index of the target's first axis becomes a segment of its own.

        It does if the source stores each index in a tensor or row of its own. It also does if the
        axis is that of experts or of gate and up, and the axes after it are in another order: in
        one segment of all indices, a row would be a whole matrix. And it does if only some layers
        or experts are taken.
        """
        first, stored = order[0], self._stored_order(fixed)
        if self.merge is not None and self.merge.splits(first, fixed):
            return True
        if first not in stored or self._is_chosen(first, fixed):
            return True
        if first not in ("e", "t") or stored == order:
            return False
        return first == "t" or stored[0] == first

    def _is_chosen(self, axis: str, fixed: Mapping[str, int]) -> bool:
        """Return whether the indices of an axis have to be taken from the source one by one.

        Otherwise the source stores them in one piece: they are all, or the first ones of the axis
        that is outermost.
        """
        if self.pruning is None or axis not in self.pruning.source_sizes:
            return False
        if axis == "l" or "l" not in fixed:
            return True  # which expert of the source it is depends on the layer
        is_whole = self.sizes[axis] == self.pruning.source_sizes[axis]
        is_outermost = self._source_row(fixed).row.order[0] == axis
        return not is_whole and not (is_outermost and self.pruning.keeps_first_experts(fixed["l"]))

    def _single_element(self, fixed: Mapping[str, int]) -> Segment:
        """Return a segment of one element, such as the router's bias of an expert."""
        operand = self._operand(fixed)[0]
        if operand.shape != (1,):
            raise self._refusal("it has more elements")
        return Segment(operand, make_rearrangement(("x",), ("x",), (1,)))

    def _stored_order(self, fixed: Mapping[str, int]) -> list[str]:
        """Return the source's axes in order, without those that are fixed."""
        return [axis for axis in self._source_row(fixed).row.order if axis not in fixed]

    def _source_row(self, fixed: Mapping[str, int]) -> SourceRow:
        """Return a row that holds the fixed indices; the first one, if several do."""
        for source in self.source_rows:
            if all(fixed.get(axis, index) == index for axis, index in source.row.fixed.items()):
                return source
        raise self._refusal(f"no tensor has {fixed}")

    def _refusal(self, reason: str) -> OptionError:
        row = self.source_rows[0].row
        return OptionError(
            f"the source's {row.stored!r} ({row.axes}) cannot be converted to this format: "
            f"{reason}; choose another format"
        )

    def _segment(self, groups: Groups, order: list[str], fixed: Mapping[str, int]) -> Segment:
        """Return a single segment for a row of the target."""
        if any(self._is_chosen(axis, fixed) for axis in order):
            raise self._refusal("layers and experts are chosen along the target's first axis only")
        if "t" in order and gate_up_step(self._stored_order(fixed)) != gate_up_step(order):
            operand, operand_groups = self._interleaved_operand(groups, fixed)
        else:
            operand, operand_groups = self._operand(fixed)
        is_contiguous = isinstance(operand, DenseOperand) and operand.selected is None
        inputs = self.merge.input_axes if self.merge is not None else ""
        merged = merge_axes(
            operand_groups, order, self.block_axis, inputs, across_groups=is_contiguous
        )
        shape = tuple(prod(self.sizes[axis] for axis in axes) for axes in merged)
        if isinstance(operand, DenseOperand) and is_contiguous:
            operand = replace(operand, stored_shape=shape)
        if shape != operand.shape:
            raise self._refusal(f"its axes cannot be rearranged as {' '.join(order)}")
        if self.merge is not None:
            operand = self.merge.adapted(operand, merged, fixed)
        source = tuple("".join(axes) for axes in merged)
        target = tuple(sorted(source, key=lambda name: order.index(name[0])))
        try:
            return Segment(operand, make_rearrangement(source, target, shape))
        except ValueError as error:
            raise self._refusal(str(error)) from None

    def _interleaved_operand(
        self, groups: Groups, fixed: Mapping[str, int]
    ) -> tuple[Operand, list[tuple[str, ...]]]:
        """Return gate and up in turn, as in the target's (i t), and the axes of each stored axis.

        The source has them as halves, or in tensors of their own.
        """
        (target_group,) = (group for group in groups if "t" in group)
        (gate, gate_groups), (up, up_groups) = (
            self._operand({**fixed, "t": index}) for index in range(self.sizes["t"])
        )
        axes = [n for n, group in enumerate(gate_groups[:2]) if group[-1:] == target_group[:1]]
        is_alike = gate_groups == up_groups and gate.shape == up.shape
        if target_group[1:] != ("t",) or not is_alike or not axes:
            raise self._refusal("gate and up cannot be joined")
        (axis,) = axes
        joined = [(*g, "t") if number == axis else g for number, g in enumerate(gate_groups)]
        return InterleavedOperand((gate, up), axis), joined

    def _operand(self, fixed: Mapping[str, int]) -> tuple[Operand, list[tuple[str, ...]]]:
        """Return the source's elements with the fixed indices, and the axes of each stored axis."""
        if self.pruning is not None:
            fixed = self.pruning.source_indices(fixed)
        source = self._source_row(fixed)
        row, first = source.row, source.first
        groups = list(row.groups)
        stored = {} if self.pruning is None else self.pruning.source_sizes
        sizes = {
            axis: (stored if axis in stored and axis in fixed else self.sizes)[axis]
            for axis in row.order
        }
        # Fixed axes that are outermost only change where the elements begin.
        while len(groups[0]) == 1 and groups[0][0] in fixed and len(groups) > 1:
            axis = groups.pop(0)[0]
            del sizes[axis]
            first += fixed[axis] * prod(sizes.values())
        shape = tuple(prod(sizes[axis] for axis in group) for group in groups)
        selected, selected_axis = None, 0
        for number, group in enumerate(groups):
            for axis in set(group) & fixed.keys():
                if selected is not None or number > 1:
                    raise self._refusal("more than one of its axes would be sliced")
                selected, selected_axis = indices_with(axis, fixed[axis], group, sizes), number
                groups[number] = tuple(other for other in group if other != axis)
        if isinstance(row.encoding, Mxfp4Encoding):
            if selected_axis:
                raise self._refusal("it would be sliced within its MXFP4 blocks")
            if selected is None:
                groups = [tuple(axis for group in groups[:-1] for axis in group), groups[-1]]
            names = row.stored + row.encoding.blocks, row.stored + row.encoding.scales
            blocks, scales = (self._raw(name, fixed) for name in names)
            matrix_shape = prod(shape[:-1]), shape[-1]
            return Mxfp4Operand(blocks, scales, first // shape[-1], matrix_shape, selected), groups
        if selected is not None and selected_axis == 0 and selected.step == 1:
            first += selected.start * prod(shape[1:])
            shape, selected = (len(selected), *shape[1:]), None
        raw = self._raw(row.stored, fixed)
        return DenseOperand(raw, first, shape, selected_axis, selected), groups

    def _raw(self, name: str, fixed: Mapping[str, int]) -> RawTensor:
        """Return the raw tensor of a stored name, with the fixed layer and expert."""
        for axis, noun in (("l", "layer"), ("e", "expert")):
            if f"{{{axis}}}" in name and axis not in fixed:
                raise self._refusal(f"it holds a single {noun}")
        return self.raws[name.format(l=fixed.get("l"), e=fixed.get("e"))]
