"""MXFP4 tensors whose bytes are those of the format under another shape or dtype.

Some programs save the blocks flat, [experts, rows, groups * 16]. transformers has saved them with a
fixed number of 90 groups, which only fits a width of 2880: for other widths the shapes are
[experts, k * rows, groups / k, 16] and [experts, rows, groups / k, k * 16]. All of them are the
same bytes in the same order. Scales are saved as F8_E8M0 too, which is what their bytes are
(OCP Microscaling Formats v1.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..model.config import ModelConfig
from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType
from ..tensors.raw_tensor import RawTensor
from ._table import Mxfp4Encoding, Table, TensorSpec, stored_shape, table_specs

__all__ = ["mxfp4_views"]


def mxfp4_views(
    table: Table, model: ModelConfig, tensors: Mapping[str, RawTensor]
) -> Mapping[str, RawTensor]:
    """Return the tensors of a checkpoint, with the format's shape and dtype for MXFP4 tensors.

    Tensors that are not the same bytes in the same order are returned as they are.

    Args:
        table: The table of the checkpoint's format.
        model: The model.
        tensors: The tensors by name.
    """
    viewed = dict(tensors)
    rows = [row for row in table if isinstance(row.encoding, Mxfp4Encoding)]
    if any(stored_shape(row, model.sizes)[-1] % BLOCK_VALUES for row in rows):
        return viewed  # `check_tensors` refuses such sizes
    for spec in table_specs(rows, model):
        for _, name in spec.names(model):
            if name in tensors:
                viewed[name] = _view(tensors[name], spec)
    return viewed


def _view(raw: RawTensor, spec: TensorSpec) -> RawTensor:
    """Return a tensor of blocks or scales under the format's shape and dtype."""
    is_scales = spec.component == 1
    if is_scales:
        is_same = raw.dtype is DType.F8_E8M0 and raw.shape == spec.shape
    else:
        is_same = raw.dtype is DType.U8 and _is_same_order(raw.shape, spec.shape)
    return replace(raw, dtype=DType.U8, shape=spec.shape) if is_same else raw


def _is_same_order(shape: tuple[int, ...], blocks: tuple[int, ...]) -> bool:
    """Return whether blocks of one shape are those of [..., rows, groups, 16] in the same order."""
    *lead, rows, groups, _ = blocks
    count = len(lead)
    if shape[:count] != tuple(lead):
        return False
    rest = shape[count:]
    if rest == (rows, groups * BLOCK_NBYTES):
        return True
    if len(rest) != 3 or rest[0] * rest[1] * rest[2] != rows * groups * BLOCK_NBYTES:
        return False
    if rest in ((groups, rows, BLOCK_NBYTES), (rows, BLOCK_NBYTES, groups)):
        return False  # more likely transposed
    if rest[0] == rows:
        return rest[2] % BLOCK_NBYTES == 0
    return rest[0] % rows == 0 and rest[2] == BLOCK_NBYTES
