"""From a source and a format to write to a plan: every shard, tensor, shape and size of the output.

Reads headers and configuration, no tensor data (but of a bias that must be zero), and moves none.
All that can be wrong with a source and is visible in these is found here, before the first byte is
written.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from . import formats
from .checkpoint import CheckpointInfo, describe, is_zero
from .dtypes import KEEP, OUTPUT_DTYPES, DType, is_exact, output_dtype, torch_name
from .errors import OptionError, TensorError
from .mapping import MappedTensor, output_tensors, raw_tensors
from .model import ABSENT_IS_ZERO, ModelConfig
from .operands import Dense, dense
from .places import Name
from .recipe import OutputTensor, Part, extents
from .safetensors_format import build_header
from .selection import GROUPS, ResolvedSelection, Selection
from .tables import Table, check, packed_tensors, read_table

__all__ = [
    "DEFAULT_FORMAT",
    "DEFAULT_SHARD_SIZE",
    "Plan",
    "PlannedShard",
    "parse_size",
    "plan",
    "shards",
]

DEFAULT_FORMAT = "transformer-lens"
DEFAULT_SHARD_SIZE = "5GB"
SPILL_NBYTES = 64_000_000
"""A transposition of more than this goes through a spill file (`scratch`): reading it a few columns
at a time would read it from disk once for each time."""
SPILLED_AXES = frozenset({"v"})
"""Only tensors with these axes are that large; an expert's matrix is read again from the page
cache for each segment of the output, which costs less than writing it once more."""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One file of the output: its tensors in order, and where each one's data begins in it."""

    name: str
    tensors: tuple[OutputTensor, ...]
    header: bytes = field(repr=False)
    offsets: tuple[int, ...] = field(repr=False)
    nbytes: int

    @property
    def data_nbytes(self) -> int:
        """Bytes of tensor data."""
        return self.nbytes - len(self.header)

    @property
    def scratch_nbytes(self) -> int:
        """Disk space that is needed beside the shard while it is made."""
        return sum(
            part.elements * dense(part.operand).raw.dtype.itemsize for part, _ in self.staged()
        )

    def overlapping(self, begin: int, end: int) -> Iterator[tuple[OutputTensor, int, int, int]]:
        """The tensors with data in bytes `begin … end` of the file: tensor, from and to which of
        its bytes, and where in the file that is."""
        for i in range(max(0, bisect_right(self.offsets, begin) - 1), len(self.tensors)):
            at = self.offsets[i]
            if at >= end:
                return
            low = max(begin, at)
            high = min(end, at + self.tensors[i].nbytes)
            if low < high:
                yield self.tensors[i], low - at, high - at, low

    def staged(self) -> Iterator[tuple[Part, int]]:
        """The parts that are transposed through a scratch file, and where their tensors begin."""
        for tensor, offset in zip(self.tensors, self.offsets, strict=True):
            for part in tensor.parts:
                if is_staged(part):
                    yield part, offset


def is_staged(part: Part) -> bool:
    """Whether a part is a transposition too large to be read in columns."""
    operand, how = part.operand, part.rearrangement
    return (
        how.transposes
        and isinstance(operand, Dense)
        and not SPILLED_AXES.isdisjoint("".join(how.axes))
        and part.elements * operand.raw.dtype.itemsize > SPILL_NBYTES
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a conversion will write, decided before any data is read."""

    info: CheckpointInfo = field(repr=False)
    source_format: str
    recognised_by: str
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
    unused: tuple[str, ...]
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
                for extent in extents(tensor, 0, tensor.nbytes):
                    sizes[extent.raw.name] = extent.raw.dtype.itemsize
                    runs = touched.setdefault(extent.raw.name, [])
                    runs.append((extent.first, extent.first + extent.count))
        return sum(sizes[name] * _union_length(runs) for name, runs in touched.items())

    @property
    def scratch_nbytes(self) -> int:
        """Disk space that is needed beside the output while it is made."""
        return sum(shard.scratch_nbytes for shard in self.shards)


def _union_length(runs: list[tuple[int, int]]) -> int:
    length, reached = 0, 0
    for begin, end in sorted(runs):
        length += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return length


def plan(
    source: Name,
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
    info = describe(source)
    found, reason = formats.detect(info) if source_format is None else (source_format, "as asked")
    format_ = formats.load(found)
    written = _dtype_name(dtype, to, found)
    with formats.naming_config(info):
        table, model = read_table(format_.TABLE, format_.read_model(info), info)
        target.check(model)
    check(table, model, info)
    _refuse_quantising(table, target.TABLE, found, to)
    left_out = _refuse_lost(table, target.TABLE, model, info, to)
    resolved = (selection or Selection()).resolve(model)
    made_in = None if written == KEEP else output_dtype(written)
    whole = [*output_tensors(table, target.TABLE, model, info.tensors, made_in)]
    _refuse_cut_stacks(whole, resolved, to)
    tensors = [t.tensor for t in whole if resolved.takes(t.tensor.name, *t.made_of)]
    if not tensors:
        raise OptionError(f"the selection {resolved.as_dict()} chooses no tensor of {to}")
    used = {raw.name for t in whole for part in t.tensor.parts for raw in raw_tensors(part.operand)}
    used |= {name.format(l=n) for name in formats.ignored(format_) for n in range(model.num_layers)}
    used |= left_out
    return Plan(
        info=info,
        source_format=found,
        recognised_by=reason,
        model=model,
        to=to,
        dtype=written,
        main_dtype=_main_dtype(tensors),
        max_shard_size=limit,
        selection=resolved,
        is_partial=len(tensors) < len(whole),
        shards=shards(tensors, limit),
        unused=tuple(sorted(info.tensors.keys() - used)),
        narrowed=_narrowed(tensors),
        warning=formats.warning(target) if to != found else "",
    )


def _dtype_name(dtype: str | None, to: str, found: str) -> str:
    """The dtype to write, by name."""
    if dtype is None:
        default = formats.default_dtype(formats.load(found))
        return KEEP if to == found else default
    if packed_tensors(formats.load(to).TABLE) and dtype not in (KEEP, torch_name(DType.BF16)):
        raise OptionError(
            f"dtype {dtype!r}: {to} has its experts in MXFP4 and all else in bfloat16; choose "
            "bfloat16 or keep"
        )
    return dtype


def _refuse_quantising(source: Table, target: Table, found: str, to: str) -> None:
    """Refuse to make MXFP4 of floats, which needs an encoder."""
    if packed_tensors(target) - packed_tensors(source):
        raise OptionError(
            f"{found} to {to}: {to} has the experts in MXFP4, and floats are not quantised by "
            "this version; --to hf is the unquantised format that most readers load"
        )


def _refuse_lost(
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
                    f"{info.place.at(raw.shard)}: tensor {raw.name!r} is not zero, and {to} has no "
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


def _narrowed(tensors: Iterable[OutputTensor]) -> dict[str, int]:
    """How many tensors lose precision, by dtypes."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        found = {raw.dtype for part in tensor.parts for raw in raw_tensors(part.operand)}
        counts.update(
            f"{'MXFP4' if dtype is DType.U8 else dtype} to {tensor.dtype}"
            for dtype in found
            if not is_exact(dtype, tensor.dtype)
        )
    return dict(sorted(counts.items()))


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as "5GB", "500MB" or 1000 (decimal units); raises `OptionError`."""
    match = _SIZE.fullmatch(str(size).strip())
    nbytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match and len(match[1]) < 20 else 0
    if nbytes < 1:
        raise OptionError(f"{size!r} is not a size; write it as 5GB or 500MB")
    return nbytes


def _refuse_cut_stacks(
    tensors: Iterable[MappedTensor], selection: ResolvedSelection, to: str
) -> None:
    """Refuse to choose experts of a tensor that stacks them: they would lose their numbers."""
    for t in tensors:
        tensor, _, expert = t.made_of
        if (
            selection.experts is not None
            and tensor in GROUPS["experts"]
            and expert is None
            and selection.takes(t.tensor.name, *t.made_of)
        ):
            raise OptionError(
                f"format {to} stacks the experts in one tensor ({t.tensor.name}), in which "
                "some would lose their numbers; take all experts, or another format"
            )


def shards(
    tensors: Sequence[OutputTensor], limit: int, *, first_number: int = 1, stem: str = "model"
) -> tuple[PlannedShard, ...]:
    """Lay tensors, in order, into shards of at most `limit` bytes of data.

    One suffices: `model.safetensors`. More: `model-00001-of-000NN.safetensors`, counted from
    `first_number` (OpenAI's repositories count from 0, and the last number follows suit).
    """
    sizes = [tensor.nbytes for tensor in tensors]
    groups = balanced_groups(sizes, limit)
    last_number = len(groups) - 1 + first_number
    result = []
    first = 0
    for number, count in enumerate(groups, first_number):
        members = tuple(tensors[first : first + count])
        header = build_header((t.name, t.dtype, t.shape) for t in members)
        starts = accumulate(sizes[first : first + count], initial=len(header))
        *offsets, end = starts
        name = (
            "model.safetensors"
            if len(groups) == 1
            else f"{stem}-{number:05d}-of-{last_number:05d}.safetensors"
        )
        result.append(PlannedShard(name, members, header, tuple(offsets), end))
        first += count
    return tuple(result)


def _greedy(sizes: Iterable[int], limit: int) -> list[int]:
    """How many of the sizes go into each group, in order; one above the limit goes alone."""
    groups: list[int] = []
    room = 0
    for size in sizes:
        if not groups or size > room:
            groups.append(0)
            room = limit
        groups[-1] += 1
        room -= size
    return groups


def balanced_groups(sizes: Sequence[int], limit: int) -> list[int]:
    """Cut sizes, in order, into as few groups of at most `limit` as possible, the largest group
    being as small as it can: how many sizes go into each.

    A size above the limit makes a group alone.
    """
    count = len(_greedy(sizes, limit))
    low, high = max(sizes, default=1), limit
    while low < high:
        middle = (low + high) // 2
        if len(_greedy(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _greedy(sizes, min(high, limit))
