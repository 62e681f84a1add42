"""How adapters come into segments: an operand with its changes, and tensors that are replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ..adapters import Merge, Saved
from ..errors import OptionError
from ..model.pruning import ResolvedPruning
from ..model.tensors import EXPERT_TENSORS, matrix_axes, matrix_shape
from ..tensors.dtypes import DType
from ..transforms.adapted_operand import AdaptedOperand, MatrixAxis
from ..transforms.operand import Operand
from ..transforms.operands import raw_tensors

__all__ = ["TensorMerge"]


@dataclass(frozen=True, slots=True)
class TensorMerge:
    """What adapters change in one model tensor."""

    merge: Merge
    tensor: str
    sizes: Mapping[str, int]
    """The size of each axis in the source."""
    pruning: ResolvedPruning | None = None
    """The source's layers and experts that are kept; None for all."""
    is_replaced: bool = False
    """Whether the source's rows are already what an adapter stores instead."""

    @property
    def input_axes(self) -> str:
        """The axes of the inputs, which are not joined with those of the outputs."""
        return matrix_axes(self.tensor)[1]

    def splits(self, axis: str, fixed: Mapping[str, int]) -> bool:
        """Return whether each index of an axis becomes a segment of its own.

        Each layer has changes of its own, and each expert of a layer that is changed.
        """
        if axis == "l":
            return True
        is_expert = axis == "e" and self.tensor in EXPERT_TENSORS
        return is_expert and self.merge.touches(self.tensor, self._source(fixed).get("l"))

    def replacement(self, fixed: Mapping[str, int]) -> Saved | None:
        """Return what is taken instead of the tensor with some indices fixed, if anything is."""
        if self.is_replaced:
            return None
        return self.merge.replacement(self.tensor, self._source(fixed).get("l"))

    def adapted(
        self, operand: Operand, axes: Sequence[Sequence[str]], fixed: Mapping[str, int]
    ) -> Operand:
        """Return an operand with the changes of all adapters.

        Args:
            operand: The operand.
            axes: The model axes that make up each of its axes.
            fixed: The index of each axis that it does not have.

        Raises:
            OptionError: If its axes cannot be those of a matrix of one layer and expert.
        """
        indices = self._source(fixed)
        expert = indices.get("e") if self.tensor in EXPERT_TENSORS else None
        changes = self.merge.changes(self.tensor, indices.get("l"), expert)
        if not changes:
            return operand
        of_axis = self._strides()
        try:
            mapped = tuple(
                MatrixAxis(
                    of_axis[group[0]].is_input,
                    tuple((self.sizes[axis], of_axis[axis].stride) for axis in group),
                )
                for group in axes
            )
        except KeyError:
            raise OptionError(
                f"adapters cannot be merged into this format: it stores {self.tensor} in an order "
                "of axes that separates no layers or experts; choose another format"
            ) from None
        first = [0, 0]
        for axis, index in indices.items():
            if axis in of_axis:
                first[of_axis[axis].is_input] += index * of_axis[axis].stride
        dtypes = {raw.dtype for raw in raw_tensors(operand)} - {DType.U8} or {DType.BF16}
        dtype = dtypes.pop() if len(dtypes) == 1 else DType.F32
        base_dtype = dtype
        for change in changes:
            operand = AdaptedOperand(
                operand, mapped, (first[0], first[1]),
                self.merge.rounded(change, dtype), matrix_shape(self.tensor, self.sizes)[0],
                dtype if self.merge.like_peft else DType.F32, base_dtype,
            )  # fmt: skip
            base_dtype = operand.dtype
        return operand

    def _strides(self) -> dict[str, _Stride]:
        """Return how far apart the indices of each axis are in the matrix."""
        found = {}
        for is_input, axes in enumerate(matrix_axes(self.tensor)):
            for number, axis in enumerate(axes):
                following = prod(self.sizes[other] for other in axes[number + 1 :])
                found[axis] = _Stride(bool(is_input), following)
        return found

    def _source(self, fixed: Mapping[str, int]) -> Mapping[str, int]:
        """Return fixed indices with the source's layer and expert."""
        return fixed if self.pruning is None else self.pruning.source_indices(fixed)


@dataclass(frozen=True, slots=True)
class _Stride:
    """Of an axis: whether it is of the inputs, and how far apart its indices are."""

    is_input: bool
    stride: int
