"""From a checkpoint and a format to a plan: every shard, tensor, shape and size of the output.

Reads headers and configuration and moves no data; of the tensors' data it reads only biases that
must be zero. Everything that can be wrong with a source and is visible there is found here, before
the first byte is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .. import formats
from .._utils.messages import counted, sized, summary
from ..adapters import (
    AdapterFile,
    AdapterLike,
    Merge,
    as_adapters,
    merge_adapters,
    read_adapter,
)
from ..checkpoint.metadata import CheckpointInfo, read_metadata
from ..checkpoint.regrouping_reader import KEPT_TENSORS
from ..errors import ConfigError, OptionError, TensorError
from ..formats import SourceModel, check_tensors
from ..model.config import ModelConfig
from ..model.numbers import NumbersLike
from ..model.pruning import ExpertsLike, Pruning, prune
from ..model.selection import ResolvedSelection, Selection, SelectionLike
from ..storage.location import LocationLike
from ..storage.open_location import open_location
from ..tensors.dtypes import KEEP, DType, DTypeLike, dtype_name, output_dtype
from ..tensors.html_table import TensorRow, html_table
from ..transforms.operands import raw_tensors
from .checks import (
    choose_dtype,
    choose_quantization,
    pruned_tensors,
    refuse_cut_stacks,
    refuse_unmappable,
    replaced_tensors,
    smaller_model_notes,
    unmapped_tensors,
)
from .mapping import output_tensors
from .options import DEFAULT_FORMAT, ConversionOptions
from .precision import count_narrowed, main_dtype
from .shards import DEFAULT_SHARD_SIZE, PlannedShard, parse_size, plan_shards, spill_nbytes
from .source_bytes import source_nbytes

__all__ = ["Plan", "plan", "plan_conversion", "read_adapters", "read_reference"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will write, decided before any data is read."""

    info: CheckpointInfo
    """The source."""
    source_format: str
    """The format that is read."""
    detected_by: str
    """Why the source is of that format."""
    model: ModelConfig
    """The model as it is written: with the tensors that the source stores."""
    to: str
    """The format that is written."""
    dtype: str
    """The dtype of dense tensors, a torch name or "keep"."""
    main_dtype: DType
    """The dtype of most dense elements, which the configuration names."""
    max_shard_size: int
    """The most bytes of tensor data in a shard."""
    selection: ResolvedSelection
    """Which tensors are written."""
    is_partial: bool
    """Whether only some of the model's tensors are written."""
    shards: tuple[PlannedShard, ...]
    """The files of the output that hold tensors, in order."""
    unmapped: tuple[str, ...]
    """Raw tensors of the source that the output does not use."""
    narrowed: Mapping[str, int]
    """The number of output tensors that lose precision, by dtypes: {"F32 to BF16": 12}."""
    warning: str
    """What users of this format should know; empty if there is nothing."""
    notes: tuple[str, ...] = ()
    """What users should know about how the source was read."""
    mxfp4_rule: str | None = None
    """The rule by which floats become MXFP4; None if none do."""
    pruning: Mapping[str, Any] | None = None
    """The layers of the source that are kept, and the experts of each: {"layers": [0, 3],
    "experts": {"0": [1, 4], "3": [0, 2]}}; None if all are."""
    merge: Merge | None = None
    """The LoRA adapters that are merged; None for none."""
    reference: CheckpointInfo | None = None
    """The checkpoint whose MXFP4 blocks are kept where they decode to the source's values."""

    def __repr__(self) -> str:
        return summary(self, self.summary)

    def _repr_html_(self) -> str:
        """Return a table with a row for each kind of tensor, for notebooks."""
        return html_table(
            self.summary,
            (
                TensorRow(tensor.name, tensor.dtype.code, tensor.shape, tensor.nbytes)
                for shard in self.shards
                for tensor in shard.tensors
            ),
        )

    @property
    def summary(self) -> str:
        """What is written and of what, in a line."""
        part = ", part of the model" if self.is_partial else ""
        return (
            f"{counted(self.num_tensors, 'tensor')}, {sized(self.nbytes)} in "
            f"{counted(len(self.shards), 'shard')}, {self.to}, {self.dtype}{part}, "
            f"from {self.source_format} in {self.info.location}"
        )

    @property
    def num_tensors(self) -> int:
        """The number of output tensors."""
        return sum(len(shard.tensors) for shard in self.shards)

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data in the output (`total_size` in the index)."""
        return sum(shard.data_nbytes for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of the output's shards, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def source_nbytes(self) -> int:
        """Bytes that are read of the source, each counted once."""
        return source_nbytes(self.shards)

    @property
    def spill_nbytes(self) -> int:
        """Bytes of disk space that spill files need in addition to the output."""
        regrouped = 0 if self.merge is None else KEPT_TENSORS * self.merge.regrouped_nbytes
        return spill_nbytes(self.shards) + regrouped


def plan(
    source: LocationLike,
    *,
    to: str = DEFAULT_FORMAT,
    source_format: str | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    selection: SelectionLike | None = None,
    mxfp4_rule: str | None = None,
    reference: LocationLike | None = None,
    keep_layers: NumbersLike | None = None,
    keep_experts: ExpertsLike | None = None,
    adapters: AdapterLike | Sequence[AdapterLike] | None = (),
    merge_like_peft: bool = False,
) -> Plan:
    """Plan the conversion of a checkpoint; moves no data.

    Args:
        source: A local folder, a repository of the Hub, or a URL (see `open_location`).
        to: The format to write (see `formats.names`).
        source_format: The format to read; by default it is detected.
        dtype: bfloat16, float16 or float32 (see `DTypeLike`), or "keep" for the source's own. By
            default "keep" from a format to itself and from `transformer-lens`, else bfloat16.
        max_shard_size: In bytes, or a text such as "5GB" (decimal units).
        selection: Which tensors of the output, as a `Selection` or a dict of its arguments; all by
            default.
        mxfp4_rule: How floats become MXFP4: "openai" (the default), "modelopt", "ocp" or "even".
        reference: A checkpoint in MXFP4, such as openai/gpt-oss-20b. Its blocks are kept where they
            decode to the source's values.
        keep_layers: The layers of which a smaller model is made, such as "0-5", [0, 5] or range(6);
            all by default.
        keep_experts: The experts of each layer of which a smaller model is made, such as
            "0,3,7-12", likewise, or as many numbers by layer; all by default.
        adapters: LoRA adapters to merge, in order: locations, or `Adapter` objects that say more.
        merge_like_peft: Whether merged values are rounded as PEFT does, instead of once.

    Returns:
        The plan.

    Raises:
        OptionError: For an argument that cannot be used, and if the format cannot be written.
        CheckpointError: For a source that cannot be converted.
        MachineError: If reading fails.
        MissingPackageError: If an extra is not installed.
    """
    pruning = Pruning.of(keep_layers, keep_experts)
    options = ConversionOptions(
        to, source_format, dtype, max_shard_size, selection, mxfp4_rule, pruning=pruning,
        adapters=as_adapters(adapters), merge_like_peft=merge_like_peft,
    )  # fmt: skip
    info = read_metadata(open_location(source))
    read = formats.read_source(info, source_format)
    return plan_conversion(read, options, read_reference(reference), read_adapters(options))


def read_reference(reference: LocationLike | None) -> SourceModel | None:
    """Read the format and the model of a reference, if there is one; raises as `plan` does.

    Its raw tensors have the number 1 in `RawTensor.checkpoint`.
    """
    if reference is None:
        return None
    source = formats.read_source(read_metadata(open_location(reference)), None)
    check_tensors(source.table, source.model, source.info)
    tensors = {name: replace(raw, checkpoint=1) for name, raw in source.info.tensors.items()}
    return replace(source, info=replace(source.info, tensors=tensors))


def read_adapters(options: ConversionOptions) -> list[AdapterFile]:
    """Read the adapters of a conversion; raises as `plan` does.

    Their tensors have the numbers from 2 on in `RawTensor.checkpoint`.
    """
    return [read_adapter(one, number) for number, one in enumerate(options.adapters, 2)]


def plan_conversion(
    source: SourceModel,
    options: ConversionOptions,
    reference: SourceModel | None = None,
    adapters: Sequence[AdapterFile] = (),
) -> Plan:
    """Plan the conversion of a checkpoint, a reference and adapters that were read.

    Raises as `plan` does.
    """
    info = source.info
    target, to = formats.load(options.to), options.to
    dtype = choose_dtype(dtype_name(options.dtype), source.name, to)
    pruning = prune(source.model, options.pruning)
    model = source.model if pruning is None else pruning.model(source.model)
    try:
        with formats.naming_config(info):
            target.check(model)
    except ConfigError as error:
        if pruning is None:
            raise
        raise OptionError(f"of what is kept: {error}") from None
    check_tensors(source.table, source.model, info)
    if source.doubt:
        raise TensorError(source.doubt)
    merge = merge_adapters(adapters, source.model, like_peft=options.merge_like_peft)
    quantization = choose_quantization(options, source, reference, target.TABLE, merge)
    left_out = refuse_unmappable(source, target.TABLE, info, to)
    if merge is not None:
        left_out |= replaced_tensors(source, merge)
    if pruning is not None:
        left_out |= pruned_tensors(source, pruning)
    selection = Selection.of(options.selection).resolve(model)
    written_dtype = None if dtype == KEEP else output_dtype(dtype)
    every = [
        *output_tensors(
            source.table,
            target.TABLE,
            model,
            info.tensors,
            written_dtype,
            quantization,
            pruning,
            merge,
        )
    ]
    refuse_cut_stacks(every, selection, to)
    used = {
        raw.name for t in every for segment in t.segments for raw in raw_tensors(segment.operand)
    }
    tensors = [tensor for tensor in every if selection.matches(tensor.name, *tensor.origin)]
    if not tensors:
        raise OptionError(selection.no_match(to))
    max_shard_size = parse_size(options.max_shard_size)
    return Plan(
        info=info,
        source_format=source.name,
        detected_by=source.detected_by,
        model=model,
        to=to,
        dtype=dtype,
        main_dtype=main_dtype(tensors),
        max_shard_size=max_shard_size,
        selection=selection,
        is_partial=len(tensors) < len(every),
        shards=plan_shards(tensors, max_shard_size),
        unmapped=unmapped_tensors(source, used, left_out),
        narrowed=count_narrowed(tensors),
        warning=formats.warning(target) if to != source.name else "",
        notes=(*source.notes, *smaller_model_notes(source, model)),
        pruning=None if pruning is None else pruning.as_dict(),
        merge=merge,
        mxfp4_rule=None if quantization is None else quantization.rule,
        reference=None if quantization is None or reference is None else reference.info,
    )
