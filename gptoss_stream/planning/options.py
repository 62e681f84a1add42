"""What a user asks of a conversion, checked before any file is opened."""

from __future__ import annotations

from dataclasses import dataclass

from .. import formats
from .._utils.arguments import check_choice
from ..adapters import Adapter
from ..errors import OptionError
from ..model.pruning import Pruning
from ..model.selection import Selection, SelectionLike
from ..tensors.dtypes import KEEP, OUTPUT_DTYPES, DTypeLike, dtype_name
from ..tensors.mxfp4_rules import RULES
from .shards import DEFAULT_SHARD_SIZE, parse_size

__all__ = ["DEFAULT_FORMAT", "ConversionOptions"]

DEFAULT_FORMAT = "transformer-lens"


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """The options of `plan` and `convert` that decide which bytes are written.

    Args:
        to: The format to write.
        source_format: The format to read; None to detect it.
        dtype: A dtype, "keep", or None for the default of the two formats. The attribute is a torch
            name.
        max_shard_size: The most bytes of tensor data in a shard, or a text such as "5GB".
        selection: Which tensors to write; None for all.
        mxfp4_rule: How floats become MXFP4 (see `tensors.mxfp4_rules`); None for the default.
        reference: A checkpoint in MXFP4 whose blocks are kept where they have the source's values.
        pruning: The layers and experts of which a smaller model is made; None for all.
        adapters: The LoRA adapters to merge, in order.
        merge_like_peft: Whether merged values are rounded as PEFT does.

    Raises:
        OptionError: For a value that cannot be used.
    """

    to: str = DEFAULT_FORMAT
    source_format: str | None = None
    dtype: DTypeLike | None = None
    max_shard_size: int | str = DEFAULT_SHARD_SIZE
    selection: SelectionLike | None = None
    mxfp4_rule: str | None = None
    reference: str | None = None
    pruning: Pruning | None = None
    adapters: tuple[Adapter, ...] = ()
    merge_like_peft: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        object.__setattr__(self, "selection", Selection.of(self.selection))
        parse_size(self.max_shard_size)
        formats.load(self.to)
        if self.source_format is not None:
            formats.load(self.source_format)
        if self.dtype is not None:
            check_choice(self.dtype, "dtype", (*OUTPUT_DTYPES, KEEP))
        if self.mxfp4_rule is not None:
            check_choice(self.mxfp4_rule, "MXFP4 rule", RULES)
        if self.merge_like_peft and not self.adapters:
            raise OptionError("--merge-like-peft is for adapters, and none is given; remove it")
