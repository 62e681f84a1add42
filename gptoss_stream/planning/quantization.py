"""How floats become MXFP4: the rule, and a reference whose blocks are kept where they are equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..errors import OptionError
from ..formats import Row, SourceModel
from ..formats._table import Mxfp4Encoding
from ..model.config import ModelConfig
from ..tensors.dtypes import BLOCK_VALUES, DType
from ..tensors.mxfp4_rules import DEFAULT_RULE
from ..transforms.mxfp4_operand import Mxfp4Operand
from ..transforms.output_tensor import Segment
from ..transforms.row_encoding import RowEncoding
from .operand_binding import SegmentBuilder, source_rows

__all__ = ["Quantization", "encoded_segments", "refuse_reference"]

_MAX_TILE_NBYTES = 64 << 20
"""The most bytes of 32 rows of a matrix that is transposed and encoded: a block is made of them."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How floats become MXFP4."""

    rule: str = DEFAULT_RULE
    """The name of the rule (see `tensors.mxfp4_rules`)."""
    reference: SourceModel | None = None
    """A checkpoint in MXFP4, as `read_reference` returns it. A block of it that decodes to the
    source's values is kept."""


def refuse_reference(reference: SourceModel, model: ModelConfig) -> None:
    """Refuse a reference that has no blocks for a model's tensors.

    Raises:
        OptionError: Saying why.
    """
    where = reference.info.location
    if not any(isinstance(row.encoding, Mxfp4Encoding) for row in reference.table):
        raise OptionError(
            f"--reference {where}: it is in the format {reference.name}, without MXFP4; name the "
            "checkpoint that the model was trained from, such as openai/gpt-oss-20b"
        )
    compared = {"l": "layers", "e": "experts", "i": "intermediate size", "m": "hidden size"}
    for axis, what in compared.items():
        found, size = reference.model.sizes[axis], model.sizes[axis]
        if found != size:
            raise OptionError(
                f"--reference {where}: {what} {found}, and the source has {size}; name the "
                "checkpoint that the model was trained from"
            )


def encoded_segments(
    builder: SegmentBuilder,
    row: Row,
    fixed: Mapping[str, int],
    component: int,
    model: ModelConfig,
    quantization: Quantization,
) -> Iterator[Segment]:
    """Yield the segments of an MXFP4 tensor that is made of floats.

    Args:
        builder: Builds segments of the source's floats.
        row: The target's row.
        fixed: The index of each axis that the target does not store.
        component: `BLOCKS` or `SCALES`.
        model: The model.
        quantization: How floats are encoded.

    Raises:
        OptionError: If the floats cannot be encoded in bounded memory.
    """
    kept = list(_reference_segments(builder, row, fixed, model, quantization.reference))
    first = 0
    for segment in builder.segments(row.groups, fixed):
        how = segment.rearrangement
        if len(how.row_shape) != 1 or (
            how.transposes
            and segment.operand.shape[1] * BLOCK_VALUES * DType.F32.itemsize > _MAX_TILE_NBYTES
        ):
            raise OptionError(
                f"{row.stored!r}: the source's values cannot be encoded in bounded memory; choose "
                "another format"
            )
        reference = _reference_rows(kept, first, how.num_rows)
        yield replace(segment, encoding=RowEncoding(quantization.rule, component, reference))
        first += how.num_rows


def _reference_segments(
    builder: SegmentBuilder,
    row: Row,
    fixed: Mapping[str, int],
    model: ModelConfig,
    reference: SourceModel | None,
) -> Iterator[Segment]:
    """Yield the same tensor as the reference holds it."""
    if reference is None:
        return
    rows = source_rows(reference.table, model, builder.pruning).get(row.tensor, [])
    same = replace(
        builder, raws=reference.info.tensors, source_rows=rows, sizes=model.sizes, merge=None
    )
    yield from same.segments(row.groups, fixed)


def _reference_rows(segments: Sequence[Segment], first: int, count: int) -> Mxfp4Operand | None:
    """Return rows of the reference as an operand of their own; None without a reference."""
    begins = accumulate((s.rearrangement.num_rows for s in segments), initial=0)
    for segment, begin in zip(segments, begins, strict=False):
        operand, skipped = segment.operand, first - begin
        if skipped >= 0 and skipped + count <= segment.rearrangement.num_rows:
            is_packed = isinstance(operand, Mxfp4Operand) and operand.selected is None
            if not is_packed or not segment.rearrangement.is_copy:
                raise OptionError("the reference has its blocks along other axes")
            assert isinstance(operand, Mxfp4Operand)
            shape = count, operand.stored_shape[1]
            return replace(operand, first_row=operand.first_row + skipped, stored_shape=shape)
    if segments:
        raise OptionError("the reference has its experts in other tensors than the output")
    return None
