"""What a pair of formats cannot convert, found before any data is moved."""

from __future__ import annotations

from collections.abc import Iterable

from .. import formats
from ..checkpoint.metadata import CheckpointInfo
from ..checkpoint.zero_check import is_zero
from ..errors import OptionError, TensorError
from ..formats import SourceModel, Table, mxfp4_tensors
from ..model.selection import GROUPS, ResolvedSelection
from ..model.tensors import ABSENT_IS_ZERO
from ..tensors.dtypes import KEEP, DType, torch_name
from ..transforms.output_tensor import OutputTensor

__all__ = ["choose_dtype", "refuse_cut_stacks", "refuse_quantizing", "refuse_unmappable"]


def choose_dtype(dtype: str | None, source_format: str, to: str) -> str:
    """Return the dtype to write, a torch name or "keep".

    Args:
        dtype: The dtype that was asked for, or None for the default.
        source_format: The format that is read.
        to: The format that is written.

    Raises:
        OptionError: If the format cannot be written in the dtype.
    """
    if dtype is None:
        return KEEP if to == source_format else formats.default_dtype(formats.load(source_format))
    if mxfp4_tensors(formats.load(to).TABLE) and dtype not in (KEEP, torch_name(DType.BF16)):
        raise OptionError(
            f"dtype {dtype!r}: {to} has its experts in MXFP4 and all else in bfloat16; choose "
            "bfloat16 or keep"
        )
    return dtype


def refuse_quantizing(source: SourceModel, target: Table, to: str) -> None:
    """Refuse to make MXFP4 of floats, which needs an encoder.

    Raises:
        OptionError: If the target stores a tensor in MXFP4 and the source does not.
    """
    if mxfp4_tensors(target) - mxfp4_tensors(source.table):
        raise OptionError(
            f"{source.name} to {to}: {to} has the experts in MXFP4, and floats are not quantized "
            "by this version; --to hf is the unquantized format that most readers load"
        )


def refuse_unmappable(
    source: SourceModel, target: Table, info: CheckpointInfo, to: str
) -> set[str]:
    """Refuse to leave out a tensor, unless it is a bias that may be absent and is zero.

    Returns:
        The names of the raw tensors that are left out.

    Raises:
        TensorError: If the target has no row for a tensor that counts.
    """
    kept = {row.tensor for row in target}
    names: set[str] = set()
    for row in source.table:
        if row.tensor in kept or not row.is_in(source.model):
            continue
        for layer, expert in source.model.instances(row.stored):
            raw = info.tensors[row.stored.format(l=layer, e=expert)]
            if row.tensor not in ABSENT_IS_ZERO or not is_zero(info, raw):
                raise TensorError(
                    f"{info.location.display_path(raw.shard)}: tensor {raw.name!r} is not zero, "
                    f"and the format {to} cannot hold it: the output would compute something else"
                )
            names.add(raw.name)
    return names


def refuse_cut_stacks(
    tensors: Iterable[OutputTensor], selection: ResolvedSelection, to: str
) -> None:
    """Refuse to select experts of a tensor that stacks them: they would lose their numbers.

    Raises:
        OptionError: Naming such a tensor.
    """
    if selection.experts is None:
        return
    for tensor in tensors:
        name, _, expert = tensor.origin
        if (
            name in GROUPS["experts"]
            and expert is None
            and selection.matches(tensor.name, *tensor.origin)
        ):
            raise OptionError(
                f"format {to} stacks the experts in one tensor ({tensor.name}), in which "
                "some would lose their numbers; take all experts, or another format"
            )
