"""From two tables to output tensors: what each tensor of one format is made of in another.

No pair of formats has code of its own. A row of the target table and the rows of the source table
that hold the same model tensor give the segments of the target's tensor (see `operand_binding`).
This module knows tables, axes and sizes. It does not know what tensors are called, or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import prod

from ..adapters import Merge
from ..errors import OptionError
from ..formats import Row, Table, TensorSpec, table_specs
from ..formats._table import DENSE, Mxfp4Encoding
from ..model.config import ModelConfig
from ..model.pruning import ResolvedPruning
from ..model.tensors import ABSENT_IS_ZERO
from ..tensors.dtypes import DType
from ..tensors.raw_tensor import RawTensor
from ..transforms.operands import raw_tensors
from ..transforms.output_tensor import Origin, OutputTensor, Segment
from ..transforms.row_encoding import BLOCKS, SCALES
from .adaptation import TensorMerge
from .operand_binding import SegmentBuilder, SourceRow, source_rows
from .quantization import Quantization, encoded_segments

__all__ = ["output_tensors"]

_MAX_ROW_NBYTES = 64 << 20
"""The largest row of an output tensor (a slice of length 1 along its first axis), which is made in
memory. In the known models rows have less than 1 MB."""


def output_tensors(
    source: Table,
    target: Table,
    model: ModelConfig,
    raws: Mapping[str, RawTensor],
    dtype: DType | None,
    quantization: Quantization | None = None,
    pruning: ResolvedPruning | None = None,
    merge: Merge | None = None,
) -> Iterator[OutputTensor]:
    """Yield every tensor of the target, in the order in which they are written.

    Args:
        source: The source's table, checked against the raw tensors.
        target: The target's table.
        model: The model as it is written.
        raws: The source's tensors by name.
        dtype: The dtype of dense tensors; None keeps that of the source.
        quantization: How floats are encoded; the default rule without a reference if it is None.
        pruning: The source's layers and experts that are kept; None for all.
        merge: The adapters to be merged; None for none.

    Raises:
        OptionError: If the target cannot be made of the source.
    """
    mapping = _Mapping(source, model, raws, dtype, quantization or Quantization(), pruning, merge)
    for spec, layer, expert in _in_order(table_specs(target, model), model.sizes):
        yield mapping.output_tensor(spec, layer, expert)


def _in_order(
    specs: Iterable[TensorSpec], sizes: Mapping[str, int]
) -> Iterator[tuple[TensorSpec, int | None, int | None]]:
    """Yield tensors with layer and expert, in the order in which they are written.

    The order is that of the table, but tensors with `{l}` are written layer by layer, and within
    a layer tensors with `{e}` expert by expert.
    """
    for has_layer, specs_of_layer in groupby(specs, lambda spec: "l" in spec.rows[0].axes_in_name):
        layer_specs = list(specs_of_layer)
        for layer in range(sizes["l"]) if has_layer else (None,):
            for has_expert, specs_of_expert in groupby(
                layer_specs, lambda spec: "e" in spec.rows[0].axes_in_name
            ):
                expert_specs = list(specs_of_expert)
                for expert in range(sizes["e"]) if has_expert else (None,):
                    for spec in expert_specs:
                        yield spec, layer, expert


class _Mapping:
    """A mapping from a source's tensors to those of any format.

    Args:
        source: The source's table.
        model: The model.
        raws: The source's tensors by name.
        dtype: The dtype of dense tensors; None keeps that of the source.
        quantization: How floats are encoded.
        pruning: The source's layers and experts that are kept; None for all.
        merge: The adapters to be merged; None for none.
    """

    def __init__(
        self,
        source: Table,
        model: ModelConfig,
        raws: Mapping[str, RawTensor],
        dtype: DType | None,
        quantization: Quantization,
        pruning: ResolvedPruning | None,
        merge: Merge | None,
    ) -> None:
        self._pruning = pruning
        self._merge = merge
        self._model = model
        self._quantization = quantization
        self._sizes = model.sizes
        self._raws = raws
        self._dtype = dtype
        self._source_rows = source_rows(source, model, pruning)
        # Tied embeddings: the embedding is the unembedding too.
        self._source_rows.setdefault("unembed", self._source_rows["embed"])

    def output_tensor(
        self, spec: TensorSpec, layer: int | None, expert: int | None
    ) -> OutputTensor:
        """Return the output tensor of a target's tensor, for one layer and expert."""
        name = spec.name.format(l=layer, e=expert)
        in_name = {axis: i for axis, i in (("l", layer), ("e", expert)) if i is not None}
        is_mxfp4 = isinstance(spec.rows[0].encoding, Mxfp4Encoding)
        segments: list[Segment] = []
        stored: list[Segment] = []
        for row in spec.rows:
            source_rows = self._source_rows.get(row.tensor, [])
            sizes: Mapping[str, int] = self._sizes
            fixed = {**row.fixed, **in_name}
            if not source_rows and row.tensor not in ABSENT_IS_ZERO:
                raise OptionError(f"the source holds nothing that {name!r} can be made of")
            merge = self._tensor_merge(source_rows, layer)
            if is_mxfp4 and (merge is not None or not _is_packed(source_rows)):
                builder = SegmentBuilder(
                    self._raws, source_rows, sizes, row.order[-1], self._pruning, merge
                )
                segments += encoded_segments(
                    builder, row, fixed, spec.component, self._model, self._quantization
                )
                continue
            if is_mxfp4:
                source_rows, sizes = self._stored_bytes(row, source_rows, spec)
            builder = SegmentBuilder(
                self._raws, source_rows, sizes, pruning=self._pruning, merge=merge
            )
            made = list(builder.segments(row.groups, fixed))
            segments += made
            stored += made if merge is None else self._unchanged(builder, row, fixed)
        dtype = DType.U8 if is_mxfp4 else self._dtype or self._kept_dtype(stored)
        for segment in segments:
            if prod(segment.row_shape) * dtype.itemsize > _MAX_ROW_NBYTES:
                raise OptionError(f"output tensor {name!r} cannot be made in bounded memory")
        origin = Origin(spec.rows[0].tensor, layer, expert)
        made_with = ""
        if any(segment.encoding is not None for segment in segments) and spec.component == SCALES:
            first = _component_row(spec.rows[0], BLOCKS)
            made_with = first.stored.format(l=layer, e=expert)
        return OutputTensor(name, dtype, spec.shape, tuple(segments), origin, made_with)

    def _tensor_merge(
        self, source_rows: Sequence[SourceRow], layer: int | None
    ) -> TensorMerge | None:
        """Return what adapters change in a tensor of a layer; None if nothing."""
        tensor = source_rows[0].row.tensor if source_rows else ""
        if self._merge is None:
            return None
        sizes = {**self._sizes, **(self._pruning.source_sizes if self._pruning else {})}
        if self._pruning is not None and layer is not None:
            layer = self._pruning.layers[layer]
        if not self._merge.touches(tensor, layer):
            return None
        return TensorMerge(self._merge, tensor, sizes, self._pruning)

    def _unchanged(
        self, builder: SegmentBuilder, row: Row, fixed: Mapping[str, int]
    ) -> list[Segment]:
        """Return the segments without any adapter, whose dtype is kept."""
        return list(replace(builder, merge=None).segments(row.groups, fixed))

    def _stored_bytes(
        self, target: Row, source_rows: Sequence[SourceRow], spec: TensorSpec
    ) -> tuple[list[SourceRow], Mapping[str, int]]:
        """Return the source rows of an MXFP4 tensor as rows of bytes, its blocks or its scales.

        MXFP4 is copied, not decoded. This works if both formats have blocks along the same axis.
        Then that axis is one of bytes, and the other axes can be rearranged.

        Returns:
            The source rows, and the sizes of the axes, in bytes for the last.
        """
        last = target.groups[-1]
        for source in source_rows:
            is_mxfp4 = isinstance(source.row.encoding, Mxfp4Encoding)
            if not is_mxfp4 or source.row.groups[-1] != last or len(last) != 1 or source.first:
                raise OptionError(
                    f"{target.stored!r} is in MXFP4, and the source has no such blocks along the "
                    "same axis; choose another format"
                )
        rows = [SourceRow(_component_row(source.row, spec.component)) for source in source_rows]
        nbytes = prod(spec.shape[len(target.groups) - 1 :])
        return rows, {**self._sizes, last[0]: nbytes}

    def _kept_dtype(self, segments: Iterable[Segment]) -> DType:
        """Return the dtype that represents all values of some segments exactly.

        It is the source's, where there is only one; bfloat16 for MXFP4; and float32 for several.
        """
        raws = [raw for segment in segments for raw in raw_tensors(segment.operand)]
        if not raws:  # zeros
            raws = [self._raws[self._source_rows["embed"][0].row.stored]]
        dtypes = {DType.BF16 if raw.dtype is DType.U8 else raw.dtype for raw in raws}
        return dtypes.pop() if len(dtypes) == 1 else DType.F32


def _is_packed(source_rows: Sequence[SourceRow]) -> bool:
    """Return whether the source stores a model tensor in MXFP4."""
    return any(isinstance(source.row.encoding, Mxfp4Encoding) for source in source_rows)


def _component_row(row: Row, component: int) -> Row:
    """Return a row for the blocks or the scales of an MXFP4 row, as dense bytes."""
    encoding = row.encoding
    assert isinstance(encoding, Mxfp4Encoding)
    suffix = (encoding.blocks, encoding.scales)[component]
    return replace(row, stored=row.stored + suffix, encoding=DENSE)
