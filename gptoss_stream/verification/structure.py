"""Comparison of everything but the data of tensors.

That is headers; names, dtypes and shapes of tensors; the index; and the small files beside the
shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._utils import strict_json
from ..adapters import recorded_adapters
from ..checkpoint.metadata import CheckpointInfo, read_header
from ..errors import CheckpointError, OutputError
from ..model.pruning import ResolvedPruning
from ..model.selection import Selection
from ..planning.options import DEFAULT_FORMAT
from ..planning.output_files import determined_files
from ..planning.plan import Plan
from ..storage.local_folder import LocalFolder
from ..storage.location import FileInfo
from ..tensors.dtypes import KEEP, OUTPUT_DTYPES, DType
from ..tensors.raw_tensor import RawTensor
from ..tensors.safetensors_header import INDEX_NAME, METADATA, build_index
from ..transforms.output_tensor import OutputTensor
from ..writing.encoding_report import REPORT_NAME
from ..writing.run_state import RECORD_NAME, WORK_NAME
from ..writing.safetensors_check import find_problem
from .differences import Difference

__all__ = [
    "compare_record",
    "compare_structure",
    "is_comparable",
    "read_output",
    "recorded_options",
]


def read_output(folder: Path) -> tuple[CheckpointInfo, list[Difference]]:
    """Read the headers of all shards in an output folder.

    Returns:
        The tensors of the valid shards, and what is wrong with shards.

    Raises:
        OutputError: If there is no folder, or no shard in it.
        OSError: If reading fails.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: there is no such folder; name a converted output")
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        raise OutputError(f"{folder}: no .safetensors file in it; name a converted output")
    location = LocalFolder(folder)
    shards: list[FileInfo] = []
    tensors: dict[str, RawTensor] = {}
    differences = []
    for name in names:
        try:
            shard, found, metadata = read_header(location, name)
        except CheckpointError as error:
            differences.append(Difference("file", name, found=str(error), expected="a valid shard"))
            continue
        shards.append(shard)
        differences += _compare_header(folder / name, found, metadata)
        differences += [
            Difference("unexpected", tensor, f"{name}, a second time")
            for tensor in sorted(tensors.keys() & found.keys())
        ]
        tensors = {**found, **tensors}
    return CheckpointInfo(location, {}, tuple(shards), tensors), differences


def _compare_header(
    shard: Path, found: Mapping[str, RawTensor], metadata: Mapping[str, str]
) -> Iterator[Difference]:
    """Compare a shard's header with what safetensors' own reader reads, and its metadata."""
    problem = find_problem(shard, ((raw.name, raw.dtype, raw.shape) for raw in found.values()))
    if problem is not None:
        yield Difference("file", shard.name, "", problem, "a file that safetensors can read")
    if metadata != METADATA:
        yield Difference("file", shard.name, "", f"metadata {metadata}", METADATA)


def recorded_options(folder: Path, found: CheckpointInfo) -> dict[str, Any]:
    """Return the options of `plan` with which an output was written.

    Args:
        folder: The output folder.
        found: The tensors in it.

    Returns:
        `to`, `dtype`, `selection`, `mxfp4_rule`, `reference`, `keep_layers`, `keep_experts`,
        `adapters` and `merge_like_peft`, from the output's record. Without a valid record they are
        the defaults, but `dtype` follows from the tensors.
    """
    dtype, keeps_dtypes = _dtype_of_tensors(found)
    to, selection = DEFAULT_FORMAT, Selection()
    encoding: dict[str, str | None] = {"mxfp4_rule": None, "reference": None}
    kept: dict[str, Any] = {"keep_layers": None, "keep_experts": None}
    merged: dict[str, Any] = {"adapters": (), "merge_like_peft": False}
    try:
        record = strict_json.loads((folder / RECORD_NAME).read_bytes())
        to, keeps_dtypes = str(record["format"]), record["dtype"] == KEEP
        selection = Selection.from_dict(record["selection"])
        encoding = {key: _as_text(record.get(key)) for key in encoding}
        if "pruning" in record:
            kept["keep_layers"], kept["keep_experts"] = ResolvedPruning.options(record["pruning"])
        if "adapters" in record:
            merged = {
                "adapters": recorded_adapters(record["adapters"], record["merged"]),
                "merge_like_peft": record.get("merge_like_peft") is True,
            }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass  # compare_record reports it
    dtype = KEEP if keeps_dtypes else dtype
    return {"to": to, "dtype": dtype, "selection": selection, **encoding, **kept, **merged}


def _as_text(value: Any) -> str | None:
    """Return a value that is a text or None.

    Raises:
        TypeError: For another value.
    """
    if value is None or isinstance(value, str):
        return value
    raise TypeError


def _dtype_of_tensors(found: CheckpointInfo) -> tuple[str, bool]:
    """Return the most frequent float dtype as a torch name, and whether `--dtype keep` is likely.

    It is if there are several float dtypes, or if there are MXFP4 tensors beside floats that are
    not bfloat16.
    """
    dtypes = [raw.dtype for raw in found.tensors.values()]
    counts = {name: dtypes.count(dtype) for name, dtype in OUTPUT_DTYPES.items()}
    most_frequent = max(counts, key=lambda name: counts[name])
    has_several = sum(count > 0 for count in counts.values()) > 1
    has_mxfp4 = DType.U8 in dtypes
    return most_frequent, has_several or (has_mxfp4 and most_frequent != "bfloat16")


def compare_structure(
    folder: Path,
    found: Mapping[str, RawTensor],
    expected: Mapping[str, OutputTensor],
    plan: Plan,
) -> Iterator[Difference]:
    """Compare an output, except for the data of its tensors, with what is expected.

    Args:
        folder: The output folder.
        found: The tensors in it, by name.
        expected: The tensors that should be in it, by name.
        plan: The plan that they are from.

    Raises:
        CheckpointError: If an auxiliary file of the source cannot be used.
        OSError: If reading fails.
    """
    yield from _compare_tensors(found, expected)
    yield from _compare_index(folder, found)
    yield from _compare_small_files(folder, plan)
    if plan.mxfp4_rule is not None:
        yield from _check_object(folder / REPORT_NAME)
    yield from compare_record(folder)


def _compare_tensors(
    found: Mapping[str, RawTensor], expected: Mapping[str, OutputTensor]
) -> Iterator[Difference]:
    """Compare names, dtypes and shapes."""
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
    """Return whether a tensor is in an output, with the expected dtype and shape."""
    raw = found.get(tensor.name)
    return raw is not None and raw.dtype is tensor.dtype and raw.shape == tensor.shape


def _compare_index(folder: Path, found: Mapping[str, RawTensor]) -> Iterator[Difference]:
    """Compare the index with the tensors that are in the shards."""
    file = folder / INDEX_NAME
    if not file.is_file():
        yield Difference("index", INDEX_NAME, found="no file", expected="an index")
        return
    expected = build_index(
        sum(raw.nbytes for raw in found.values()),
        {name: raw.shard for name, raw in found.items()},
    )
    if _parse(file.read_bytes()) != _parse(expected):
        yield Difference("index", INDEX_NAME, found="another index", expected="that of the shards")


def _compare_small_files(folder: Path, plan: Plan) -> Iterator[Difference]:
    """Compare the configuration and the files that are copied from the source.

    Not the model card: users edit it, and it says whether the source was on the Hub.
    """
    for name, data in determined_files(plan).items():
        expected = data if isinstance(data, bytes) else b"".join(data.chunks())
        file = folder / name
        if not file.is_file():
            yield Difference("missing", name)
        elif file.read_bytes() != expected:
            yield Difference("file", name, found="other bytes", expected="what convert writes")


def compare_record(folder: Path) -> Iterator[Difference]:
    """Check that the record is a JSON object and that no run is unfinished.

    What the record says is not checked.
    """
    yield from _check_object(folder / RECORD_NAME)
    if (folder / WORK_NAME).exists():
        yield Difference("unexpected", f"{WORK_NAME}, of an unfinished run")


def _check_object(file: Path) -> Iterator[Difference]:
    """Check that a file is there and holds a JSON object."""
    if not file.is_file():
        yield Difference("missing", file.name)
    elif not isinstance(_parse(file.read_bytes()), dict):
        yield Difference("file", file.name, found="no JSON object", expected="a JSON object")


def _parse(data: bytes) -> Any:
    """Return the value of a JSON text, or the error message for a text that is not JSON."""
    try:
        return strict_json.loads(data)
    except ValueError as error:
        return str(error)
