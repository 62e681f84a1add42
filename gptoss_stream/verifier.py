"""Holds an output against its source: every byte made again and compared. Or against its sums.

Trusts neither record nor state of the run that made the output. Headers, index, names, dtypes and
shapes first; then the data, segment by segment, in bounded memory. Writes nothing.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from . import formats, strict_json
from .cast import STORAGE, cast
from .checkpoint import (
    Checkpoint,
    CheckpointInfo,
    Extent,
    RawTensor,
    Schedule,
    read_header,
)
from .checksums import SUMS_NAME, parse_sums
from .companions import carried
from .dtypes import KEEP, OUTPUT_DTYPES, DType
from .errors import CheckpointError, OptionError, OutputError, machine_error
from .executor import SEGMENT_NBYTES
from .places import FileInfo, Folder, Name, local_path
from .planner import DEFAULT_FORMAT, Plan, is_staged, plan
from .recipe import OutputTensor, Part, Piece, extents, fill, make_pieces
from .run_state import RECORD_NAME, WORK_NAME
from .safetensors_format import INDEX_NAME, METADATA, build_index
from .second_reader import objection
from .selection import Selection
from .streaming import AnyCheckpoint, open_checkpoint
from .workers import Buffer, Task, count_workers, run_tasks

_LINES = 64  # rows of a large transpose compared at a time: what is read of them stays small

__all__ = ["Difference", "Verification", "verify", "verify_checksums"]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it should be.

    `kind` is one of `missing`, `unexpected`, `dtype`, `shape`, `index`, `file`, `checksum` and
    `value`; for a value, `index` is the first differing element's.
    """

    kind: str
    name: str
    shard: str = ""
    found: Any = None
    expected: Any = None
    index: tuple[int, ...] = ()

    def __str__(self) -> str:
        where = f" in {self.shard}" if self.shard else ""
        at = f" at {list(self.index)}" if self.index else ""
        if self.found is None and self.expected is None:
            return f"{self.kind}: {self.name}{where}"
        return f"{self.kind}: {self.name}{where}{at}: {self.found}, expected {self.expected}"


@dataclass(frozen=True, slots=True)
class Verification:
    """What a verification found: how much was compared (tensors, or files by their sums), and
    every difference. `format` and `selection` are what the output was compared with."""

    output: str
    format: str
    selection: Mapping[str, Any]
    tensors: int
    files: int
    nbytes: int
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {**asdict(self), "equal": self.equal}


def verify(
    source: Name,
    output: str | os.PathLike[str],
    *,
    to: str | None = None,
    source_format: str | None = None,
    selection: Selection | None = None,
    sample: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    on_plan: Callable[[int], None] = lambda nbytes: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Compare an output folder with what its source gives, byte for byte.

    The dtype is that of most of the output's floats, or each tensor's own where the output's record
    says "keep" (without a record, where the tensors differ in it). `to` (the format) and
    `selection` are, where they are not given, what the record says; the result repeats them.
    `sample` compares the data of that many tensors, chosen at random by `seed`, instead of all;
    names, dtypes, shapes, index and the small files beside the weights are compared in any case.
    `on_plan` is told how many bytes will be compared, `on_bytes`, from any thread, how many have
    been. Raises `CheckpointError` for a source and `OutputError` for an output that is none,
    `OptionError` for an argument that cannot be meant, `MachineError` where reading fails,
    `MissingPackageError` where an extra is not installed. Differences are not raised but returned.
    """
    threads = count_workers(workers)
    folder = local_path(output)
    try:
        found, differences = _read_output(folder)
        recorded = _recorded(folder, found)
        planned = plan(
            source,
            to=to or recorded["to"],
            source_format=source_format,
            dtype=recorded["dtype"],
            selection=selection or recorded["selection"],
        )
        expected = {tensor.name: tensor for s in planned.shards for tensor in s.tensors}
        differences += _compare_names(found.tensors, expected)
        differences += _compare_index(folder, found.tensors)
        differences += _compare_companions(folder, planned)
        comparable = [t for t in expected.values() if _is_comparable(t, found.tensors)]
        if sample is not None:
            if sample < 1:
                raise OptionError(f"a sample of {sample} tensors: there must be at least one")
            chosen = random.Random(seed).sample(comparable, min(sample, len(comparable)))
            comparable = sorted(chosen, key=lambda tensor: tensor.name)
        nbytes = sum(tensor.nbytes for tensor in comparable)
        on_plan(nbytes)
        with open_checkpoint(planned.info) as source_files, Checkpoint(found) as output_files:
            comparison = _Comparison(source_files, output_files, on_bytes)
            comparison.take(comparable, found.tensors)
            run_tasks(comparison.tasks(), threads, SEGMENT_NBYTES, comparison.stop)
            source_files.check_unchanged()
            output_files.check_unchanged()
    except OSError as error:
        raise machine_error(error, f"verifying {folder}") from error
    differences += sorted(comparison.differences.values(), key=lambda d: d.name)
    return Verification(
        str(folder),
        planned.to,
        planned.selection.as_dict(),
        len(comparable),
        0,
        nbytes,
        tuple(differences),
    )


def verify_checksums(
    output: str | os.PathLike[str],
    *,
    on_plan: Callable[[int], None] = lambda nbytes: None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Hold the files of an output folder against its own `SHA256SUMS`, without the source.

    Finds what has changed since the folder was written; whether it was right then, only `verify`
    can tell. `on_plan` and `on_bytes` as there. Raises `OutputError` for a folder without sums,
    `OptionError` for a URL, `MachineError` where reading fails. Differences are not raised but
    returned.
    """
    folder = local_path(output)
    differences: list[Difference] = []
    nbytes = 0
    try:
        if not (folder / SUMS_NAME).is_file():
            raise OutputError(f"{folder}: no {SUMS_NAME} in it; convert --checksums writes one")
        try:
            sums = parse_sums((folder / SUMS_NAME).read_bytes())
        except ValueError as error:
            sums = {}
            differences.append(
                Difference("checksum", SUMS_NAME, expected="a sum on each line", found=str(error))
            )
        present = {name: folder / name for name in sums if (folder / name).is_file()}
        differences += [Difference("missing", name) for name in sums if name not in present]
        differences += [
            Difference("unexpected", file.name)
            for file in sorted(folder.glob("*.safetensors"))
            if file.name not in sums
        ]
        on_plan(sum(file.stat().st_size for file in present.values()))
        for name, file in present.items():
            digest = hashlib.sha256()
            with open(file, "rb", buffering=0) as opened:
                while chunk := opened.read(SEGMENT_NBYTES):
                    digest.update(chunk)
                    nbytes += len(chunk)
                    on_bytes(len(chunk))
            if digest.hexdigest() != sums[name]:
                differences.append(Difference("checksum", name, "", digest.hexdigest(), sums[name]))
        differences += _compare_state(folder)
    except OSError as error:
        raise machine_error(error, f"verifying {folder}") from error
    return Verification(str(folder), "", {}, 0, len(present), nbytes, tuple(differences))


def _read_output(folder: Path) -> tuple[CheckpointInfo, list[Difference]]:
    """The tensors of every sound shard in a folder, and what is wrong with the others."""
    if not folder.is_dir():
        raise OutputError(f"{folder}: there is no such folder; name a converted one")
    shards: list[FileInfo] = []
    tensors: dict[str, RawTensor] = {}
    differences = []
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise OutputError(f"{folder}: no .safetensors file in it; name a converted folder")
    for name in names:
        try:
            shard, found, metadata = read_header(Folder(folder), name)
        except CheckpointError as error:
            differences.append(Difference("file", name, found=str(error), expected="a sound shard"))
            continue
        shards.append(shard)
        described = ((raw.name, raw.dtype, raw.shape) for raw in found.values())
        seen = objection(folder / name, described)
        if seen is not None:
            differences.append(Difference("file", name, "", seen, "what safetensors can read"))
        if metadata != METADATA:
            differences.append(Difference("file", name, "", f"metadata {metadata}", METADATA))
        differences += [
            Difference("unexpected", twice, f"{name}, a second time")
            for twice in sorted(tensors.keys() & found.keys())
        ]
        tensors = {**found, **tensors}
    return CheckpointInfo(Folder(folder), {}, tuple(shards), tensors), differences


def _recorded(folder: Path, found: CheckpointInfo) -> dict[str, Any]:
    """What an output's record says of format and selection, and whether dtypes were kept; where it
    says nothing, the defaults, and of the dtype what the tensors say."""
    counts = {
        name: sum(raw.dtype is dtype for raw in found.tensors.values())
        for name, dtype in OUTPUT_DTYPES.items()
    }
    most = max(counts, key=lambda name: counts[name])
    is_packed = any(raw.dtype is DType.U8 for raw in found.tensors.values())
    is_kept = len(list(filter(None, counts.values()))) > 1 or (is_packed and most != "bfloat16")
    to, selection = DEFAULT_FORMAT, Selection()
    try:
        record = strict_json.loads((folder / RECORD_NAME).read_bytes())
        to, is_kept = str(record["format"]), record["dtype"] == KEEP
        selection = Selection.from_dict(record["selection"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return {"to": to, "dtype": KEEP if is_kept else most, "selection": selection}


def _compare_names(
    found: Mapping[str, RawTensor], expected: Mapping[str, OutputTensor]
) -> Iterator[Difference]:
    for name, tensor in expected.items():
        raw = found.get(name)
        if raw is None:
            yield Difference("missing", name)
        elif raw.dtype is not tensor.dtype:
            yield Difference("dtype", name, raw.shard, raw.dtype.code, tensor.dtype.code)
        elif raw.shape != tensor.shape:
            yield Difference("shape", name, raw.shard, list(raw.shape), list(tensor.shape))
    for name in sorted(found.keys() - expected.keys()):
        yield Difference("unexpected", name, found[name].shard)


def _is_comparable(tensor: OutputTensor, found: Mapping[str, RawTensor]) -> bool:
    raw = found.get(tensor.name)
    return raw is not None and raw.dtype is tensor.dtype and raw.shape == tensor.shape


def _compare_index(folder: Path, found: Mapping[str, RawTensor]) -> Iterator[Difference]:
    """The index must say of the shards what is true."""
    file = folder / INDEX_NAME
    if not file.is_file():
        yield Difference("index", INDEX_NAME, found="no file", expected="an index")
        return
    expected = build_index(
        sum(raw.nbytes for raw in found.values()), {n: raw.shard for n, raw in found.items()}
    )
    if _parsed(file.read_bytes()) != _parsed(expected):
        yield Difference("index", INDEX_NAME, found="another", expected="that of the shards")


def _compare_companions(folder: Path, planned: Plan) -> Iterator[Difference]:
    """The small files beside the weights, and whether a run is still unfinished."""
    expected = formats.load(planned.to).files(
        planned.model, planned.info.config, planned.main_dtype, partial=planned.is_partial
    )
    for carried_file in carried(planned.info.place):
        expected[carried_file.name] = b"".join(carried_file.chunks())
    for name, data in expected.items():
        file = folder / name
        if not file.is_file():
            yield Difference("missing", name)
        elif file.read_bytes() != data:
            yield Difference("file", name, found="other bytes", expected="what convert writes")
    yield from _compare_state(folder)


def _compare_state(folder: Path) -> Iterator[Difference]:
    """The record must be there and readable; what it says is not believed here."""
    record = folder / RECORD_NAME
    if not record.is_file():
        yield Difference("missing", RECORD_NAME)
    elif not isinstance(_parsed(record.read_bytes()), dict):
        yield Difference("file", RECORD_NAME, found="no JSON object", expected="a record")
    if (folder / WORK_NAME).exists():
        yield Difference("unexpected", f"{WORK_NAME}, of an unfinished run")


def _parsed(index: bytes) -> Any:
    try:
        return strict_json.loads(index)
    except ValueError as error:
        return str(error)


class _Comparison:
    """The comparison of the data: its steps, and what they found."""

    def __init__(
        self, source: AnyCheckpoint, output: Checkpoint, on_bytes: Callable[[int], None]
    ) -> None:
        self.source = source
        self.output = output
        self.on_bytes = on_bytes
        self.stop = threading.Event()
        self.differences: dict[str, Difference] = {}
        self._noting = threading.Lock()
        self._steps: list[tuple[Task, Callable[[], Iterator[Extent]]]] = []
        """What each does, and what it reads of the source."""

    def take(self, tensors: list[OutputTensor], found: Mapping[str, RawTensor]) -> None:
        """Steps that cover every byte of the tensors."""
        for tensor in tensors:
            raw = found[tensor.name]
            if any(is_staged(part) for part in tensor.parts):
                self._take_blocks(tensor, raw)
                continue
            for begin in range(0, tensor.nbytes, SEGMENT_NBYTES):
                end = min(begin + SEGMENT_NBYTES, tensor.nbytes)
                self._steps.append(
                    (
                        partial(self._compare_segment, tensor, raw, begin, end),
                        partial(extents, tensor, begin, end),
                    )
                )
        self.source.schedule(
            Schedule(len(self._steps), lambda step: self._steps[step][1]()), self.stop
        )

    def tasks(self) -> Iterator[Task]:
        """Every step, as a task."""
        for number, (task, _) in enumerate(self._steps):
            yield partial(self._do, number, task)

    def _do(self, number: int, task: Task, buffer: Buffer) -> None:
        self.source.begin(number)
        task(buffer)
        self.source.end(number)

    def _compare_segment(
        self, tensor: OutputTensor, raw: RawTensor, begin: int, end: int, buffer: Buffer
    ) -> None:
        out = buffer[: end - begin]
        fill(tensor, begin, end, out, partial(make_pieces, reader=self.source))
        first = begin // tensor.dtype.itemsize
        expected = out.view(STORAGE[tensor.dtype])
        with self.output.read(raw, first, expected.shape) as found:
            unequal = _first_unequal(found, expected)
            if unequal is not None:
                self._note(tensor, raw, first + unequal, found[unequal], expected[unequal])
        self.on_bytes(end - begin)

    def _take_blocks(self, tensor: OutputTensor, raw: RawTensor) -> None:
        """A large transpose in blocks of the source's rows, each read once."""
        first = 0
        for part in tensor.parts:
            rows = part.rearrangement.unit_shape[-1]
            step = max(1, SEGMENT_NBYTES * rows // (part.elements * tensor.dtype.itemsize))
            for begin in range(0, rows, step):
                block = begin, min(begin + step, rows)
                self._steps.append(
                    (
                        partial(self._compare_block, tensor, raw, part, first, block),
                        partial(part.operand.extents, block),
                    )
                )
            first += part.elements

    def _compare_block(
        self,
        tensor: OutputTensor,
        raw: RawTensor,
        part: Part,
        first: int,
        block: tuple[int, int],
        buffer: Buffer,
    ) -> None:
        how = part.rearrangement
        begin, end = block
        shape = (how.units, *how.unit_shape[:-1], end - begin)
        nbytes = prod(shape) * tensor.dtype.itemsize
        expected = buffer[:nbytes].view(STORAGE[tensor.dtype]).reshape(shape)
        make_pieces(part, [Piece(0, expected)], tensor.dtype, self.source, block)
        expected = expected.reshape(-1, end - begin)
        width = how.unit_shape[-1]
        for line in range(0, len(expected), _LINES):
            lines = expected[line : line + _LINES]
            at = first + line * width
            with self.output.read(raw, at, (len(lines), width)) as whole:
                found = whole[:, begin:end]
                unequal = _first_unequal(found, lines)
                if unequal is not None:
                    row, column = divmod(unequal, end - begin)
                    element = at + row * width + begin + column
                    self._note(tensor, raw, element, found[row, column], lines[row, column])
        self.on_bytes(nbytes)

    def _note(
        self, tensor: OutputTensor, raw: RawTensor, element: int, found: Any, expected: Any
    ) -> None:
        index = tuple(int(i) for i in np.unravel_index(element, tensor.shape))
        values = _value(found, tensor.dtype), _value(expected, tensor.dtype)
        difference = Difference("value", tensor.name, raw.shard, *values, index)
        with self._noting:
            known = self.differences.get(tensor.name)
            if known is None or index < known.index:
                self.differences[tensor.name] = difference


def _first_unequal(found: Buffer, expected: Buffer) -> int | None:
    """The first element whose bits differ (equal NaNs are equal, 0.0 and -0.0 are not)."""
    integer = f"u{expected.itemsize}"
    unequal = (found.view(integer) != expected.view(integer)).reshape(-1)
    first = int(unequal.argmax())
    return first if unequal[first] else None


def _value(element: Any, dtype: DType) -> float | str:
    """A stored element as a number; what JSON has no number for as a word."""
    if dtype is DType.U8:
        return int(element)
    wide = np.empty(1, np.float32)
    cast(np.array([element], STORAGE[dtype]), dtype, wide, DType.F32)
    return float(wide[0]) if np.isfinite(wide[0]) else str(wide[0])
