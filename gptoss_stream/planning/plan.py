"""From a source and a format to write to a plan: every shard, tensor, shape and size of the output.

Reads headers and configuration, no tensor data (but of a bias that must be zero), and moves none.
All that can be wrong with a source and is visible in these is found here, before the first byte is
written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .. import formats
from ..checkpoint.metadata import CheckpointInfo, read_metadata
from ..checkpoint.reader import is_zero
from ..errors import OptionError, TensorError
from ..formats._check import check_tensors, read_table
from ..formats._table import Table, mxfp4_tensors
from ..model.config import ModelConfig
from ..model.selection import GROUPS, ResolvedSelection, Selection
from ..model.tensors import ABSENT_IS_ZERO
from ..storage.location import LocationLike
from ..tensors.dtypes import KEEP, OUTPUT_DTYPES, DType, is_exact, output_dtype, torch_name
from ..transforms.output_tensor import OutputTensor, element_ranges
from .mapping import MappedTensor, output_tensors, raw_tensors
from .shards import DEFAULT_SHARD_SIZE, PlannedShard, parse_size, plan_shards

__all__ = ["DEFAULT_FORMAT", "Plan", "plan"]


DEFAULT_FORMAT = "transformer-lens"


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a conversion will write, decided before any data is read."""

    info: CheckpointInfo = field(repr=False)
    source_format: str
    detected_by: str
    model: ModelConfig
    """The model as it is written: with what the source stores."""
    to: str
    """The format that is written."""
    dtype: str
    """That of dense tensors, a torch name or "keep"."""
    main_dtype: DType
    """The dtype of most dense elements, which the configuration names."""
    max_shard_size: int
    selection: ResolvedSelection
    is_partial: bool
    """Whether the output holds but a part of the model's tensors."""
    shards: tuple[PlannedShard, ...] = field(repr=False)
    unmapped: tuple[str, ...]
    """Raw tensors that the checkpoint holds and the output has no use for."""
    narrowed: Mapping[str, int]
    """How many output tensors lose precision, by dtypes: {"F32 to BF16": 12}."""
    warning: str
    """What everybody who writes this format should know."""

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
                for element_range in element_ranges(tensor, 0, tensor.nbytes):
                    sizes[element_range.raw.name] = element_range.raw.dtype.itemsize
                    runs = touched.setdefault(element_range.raw.name, [])
                    runs.append((element_range.first, element_range.first + element_range.count))
        return sum(sizes[name] * _union_length(runs) for name, runs in touched.items())

    @property
    def spill_nbytes(self) -> int:
        """Disk space that is needed beside the output while it is made."""
        return sum(shard.spill_nbytes for shard in self.shards)


def _union_length(runs: list[tuple[int, int]]) -> int:
    length, reached = 0, 0
    for begin, end in sorted(runs):
        length += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def plan(
    source: LocationLike,
    *,
    to: str = DEFAULT_FORMAT,
    source_format: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    selection: Selection | None = None,
) -> Plan:
    """Plan the conversion of a checkpoint.

    Args:
        source: A folder, a repository of the Hub, or a URL (see `places.open_place`).
        to: The format to write (see `formats.names`).
        source_format: The format to read; by default it is detected.
        dtype: A torch name (bfloat16, float16, float32), or "keep" for the source's own. By
            default "keep" from a format to itself and from `transformer-lens`, else bfloat16.
        max_shard_size: In bytes, or a text such as "5GB" (decimal units).
        selection: Which tensors of the output; all by default.

    Raises:
        OptionError: For an argument that cannot be used, and where the format cannot be written.
        CheckpointError: For a source that cannot be converted.
        MachineError: If reading fails.
        MissingPackageError: If an extra is not installed.
    """
    limit = parse_size(max_shard_size)
    target = formats.load(to)
    if source_format is not None:
        formats.load(source_format)
    if dtype not in (None, KEEP, *OUTPUT_DTYPES):
        names = ", ".join([*OUTPUT_DTYPES, KEEP])
        raise OptionError(f"unknown dtype {dtype!r}; choose one of {names}")
    info = read_metadata(source)
    found, reason = (
        formats.detect_format(info) if source_format is None else (source_format, "as asked")
    )
    format_ = formats.load(found)
    written = _dtype_name(dtype, to, found)
    with formats.naming_config(info):
        table, model = read_table(format_.TABLE, format_.read_model(info), info)
        target.check(model)
    check_tensors(table, model, info)
    _refuse_quantizing(table, target.TABLE, found, to)
    left_out = _refuse_unmappable(table, target.TABLE, model, info, to)
    resolved = (selection or Selection()).resolve(model)
    made_in = None if written == KEEP else output_dtype(written)
    whole = [*output_tensors(table, target.TABLE, model, info.tensors, made_in)]
    _refuse_cut_stacks(whole, resolved, to)
    tensors = [t.tensor for t in whole if resolved.takes(t.tensor.name, *t.origin)]
    if not tensors:
        raise OptionError(f"the selection {resolved.as_dict()} chooses no tensor of {to}")
    used = {
        raw.name
        for t in whole
        for segment in t.tensor.segments
        for raw in raw_tensors(segment.operand)
    }
    used |= {name.format(l=n) for name in formats.ignored(format_) for n in range(model.num_layers)}
    used |= left_out
    return Plan(
        info=info,
        source_format=found,
        detected_by=reason,
        model=model,
        to=to,
        dtype=written,
        main_dtype=_main_dtype(tensors),
        max_shard_size=limit,
        selection=resolved,
        is_partial=len(tensors) < len(whole),
        shards=plan_shards(tensors, limit),
        unmapped=tuple(sorted(info.tensors.keys() - used)),
        narrowed=_count_narrowed(tensors),
        warning=formats.warning(target) if to != found else "",
    )


def _dtype_name(dtype: str | None, to: str, found: str) -> str:
    """The dtype to write, by name."""
    if dtype is None:
        default = formats.default_dtype(formats.load(found))
        return KEEP if to == found else default
    if mxfp4_tensors(formats.load(to).TABLE) and dtype not in (KEEP, torch_name(DType.BF16)):
        raise OptionError(
            f"dtype {dtype!r}: {to} has its experts in MXFP4 and all else in bfloat16; choose "
            "bfloat16 or keep"
        )
    return dtype


def _refuse_quantizing(source: Table, target: Table, found: str, to: str) -> None:
    """Refuse to make MXFP4 of floats, which needs an encoder."""
    if mxfp4_tensors(target) - mxfp4_tensors(source):
        raise OptionError(
            f"{found} to {to}: {to} has the experts in MXFP4, and floats are not quantised by "
            "this version; --to hf is the unquantised format that most readers load"
        )


def _refuse_unmappable(
    source: Table, target: Table, model: ModelConfig, info: CheckpointInfo, to: str
) -> set[str]:
    """Refuse to leave out a tensor, unless it is one that may be absent and is zero.

    Returns:
        The names of those that are left out.
    """
    kept = {row.tensor for row in target}
    names: set[str] = set()
    for row in source:
        if row.tensor in kept or not row.is_in(model):
            continue
        for layer, expert in model.instances(row.stored):
            raw = info.tensors[row.stored.format(l=layer, e=expert)]
            if row.tensor not in ABSENT_IS_ZERO or not is_zero(info, raw):
                raise TensorError(
                    f"{info.location.display_path(raw.shard)}: tensor {raw.name!r} is not zero, and {to} has no "
                    "place for it: the output would compute something else"
                )
            names.add(raw.name)
    return names


def _main_dtype(tensors: Iterable[OutputTensor]) -> DType:
    """The dtype of most dense elements; bfloat16 where there are none."""
    counts: Counter[DType] = Counter()
    for tensor in tensors:
        if tensor.dtype is not DType.U8:
            counts[tensor.dtype] += tensor.nbytes // tensor.dtype.itemsize
    return max(counts, key=lambda dtype: counts[dtype], default=DType.BF16)


def _count_narrowed(tensors: Iterable[OutputTensor]) -> dict[str, int]:
    """How many tensors lose precision, by dtypes."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        found = {raw.dtype for segment in tensor.segments for raw in raw_tensors(segment.operand)}
        counts.update(
            f"{'MXFP4' if dtype is DType.U8 else dtype} to {tensor.dtype}"
            for dtype in found
            if not is_exact(dtype, tensor.dtype)
        )
    return dict(sorted(counts.items()))


def _refuse_cut_stacks(
    tensors: Iterable[MappedTensor], selection: ResolvedSelection, to: str
) -> None:
    """Refuse to choose experts of a tensor that stacks them: they would lose their numbers."""
    for t in tensors:
        tensor, _, expert = t.origin
        if (
            selection.experts is not None
            and tensor in GROUPS["experts"]
            and expert is None
            and selection.takes(t.tensor.name, *t.origin)
        ):
            raise OptionError(
                f"format {to} stacks the experts in one tensor ({t.tensor.name}), in which "
                "some would lose their numbers; take all experts, or another format"
            )
