"""Holds an output against its source: every byte made again and compared. Or against its sums.

Trusts neither record nor state of the run that made the output. Headers, index, names, dtypes and
shapes first; then the data, segment by segment, in bounded memory. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import formats
from .._utils import strict_json
from ..checkpoint.auxiliary_files import find_auxiliary_files
from ..checkpoint.metadata import CheckpointInfo, RawTensor, read_header
from ..errors import CheckpointError, OutputError
from ..model.selection import Selection
from ..planning.plan import DEFAULT_FORMAT, Plan
from ..storage.local_folder import LocalFolder
from ..storage.location import FileInfo
from ..tensors.dtypes import KEEP, OUTPUT_DTYPES, DType
from ..tensors.safetensors_header import INDEX_NAME, METADATA, build_index
from ..transforms.output_tensor import OutputTensor
from ..writing.run_state import RECORD_NAME, WORK_NAME
from ..writing.safetensors_check import find_problem
from .differences import Difference

__all__ = [
    "compare_auxiliary_files",
    "compare_index",
    "compare_names",
    "compare_record",
    "is_comparable",
    "read_output",
    "read_record",
]


def read_output(folder: Path) -> tuple[CheckpointInfo, list[Difference]]:
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
            shard, found, metadata = read_header(LocalFolder(folder), name)
        except CheckpointError as error:
            differences.append(Difference("file", name, found=str(error), expected="a sound shard"))
            continue
        shards.append(shard)
        described = ((raw.name, raw.dtype, raw.shape) for raw in found.values())
        seen = find_problem(folder / name, described)
        if seen is not None:
            differences.append(Difference("file", name, "", seen, "what safetensors can read"))
        if metadata != METADATA:
            differences.append(Difference("file", name, "", f"metadata {metadata}", METADATA))
        differences += [
            Difference("unexpected", twice, f"{name}, a second time")
            for twice in sorted(tensors.keys() & found.keys())
        ]
        tensors = {**found, **tensors}
    return CheckpointInfo(LocalFolder(folder), {}, tuple(shards), tensors), differences


def read_record(folder: Path, found: CheckpointInfo) -> dict[str, Any]:
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


def compare_names(
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


def is_comparable(tensor: OutputTensor, found: Mapping[str, RawTensor]) -> bool:
    raw = found.get(tensor.name)
    return raw is not None and raw.dtype is tensor.dtype and raw.shape == tensor.shape


def compare_index(folder: Path, found: Mapping[str, RawTensor]) -> Iterator[Difference]:
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


def compare_auxiliary_files(folder: Path, planned: Plan) -> Iterator[Difference]:
    """The small files beside the weights, and whether a run is still unfinished."""
    expected = formats.load(planned.to).files(
        planned.model, planned.info.config, planned.main_dtype, partial=planned.is_partial
    )
    for carried_file in find_auxiliary_files(planned.info.location):
        expected[carried_file.name] = b"".join(carried_file.chunks())
    for name, data in expected.items():
        file = folder / name
        if not file.is_file():
            yield Difference("missing", name)
        elif file.read_bytes() != data:
            yield Difference("file", name, found="other bytes", expected="what convert writes")
    yield from compare_record(folder)


def compare_record(folder: Path) -> Iterator[Difference]:
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
