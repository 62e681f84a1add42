"""Comparison of names, dtypes and shapes of tensors, of the index, and of the small files.

Headers are compared when they are read (`stored_output`), data in `data`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..adapters import recorded_adapters
from ..checkpoint.metadata import CheckpointInfo
from ..errors import OptionError
from ..model.pruning import ResolvedPruning
from ..model.selection import Selection
from ..planning.options import DEFAULT_FORMAT
from ..planning.output_files import determined_files
from ..planning.plan import Plan
from ..storage.location import Location
from ..tensors.dtypes import KEEP, OUTPUT_DTYPES, DType
from ..tensors.raw_tensor import RawTensor
from ..tensors.safetensors_header import INDEX_NAME, build_index
from ..transforms.output_tensor import OutputTensor
from ..writing.encoding_report import REPORT_NAME
from ..writing.run_state import RECORD_NAME, WORK_NAME, check_schema, holds_run
from .differences import Difference
from .stored_output import StoredOutput, parse, read_file

__all__ = [
    "compare_record",
    "compare_structure",
    "is_comparable",
    "recorded_options",
]

_MAX_FILE_NBYTES = 64 << 20
"""A small file that is larger is not read; tokenizer.json of gpt-oss has 28 MB."""


def recorded_options(output: StoredOutput) -> dict[str, Any]:
    """Return the options of `plan` with which an output was written.

    Returns:
        `to`, `dtype`, `selection`, `mxfp4_rule`, `reference`, `keep_layers`, `keep_experts`,
        `adapters` and `merge_like_peft`, from the output's record. Without a valid record they are
        the defaults, but `dtype` follows from the tensors.

    Raises:
        OutputError: If another version wrote a record that this one cannot read.
    """
    dtype, keeps_dtypes = _dtype_of_tensors(output.info)
    to, selection = DEFAULT_FORMAT, Selection()
    encoding: dict[str, str | None] = {"mxfp4_rule": None, "reference": None}
    kept: dict[str, Any] = {"keep_layers": None, "keep_experts": None}
    merged: dict[str, Any] = {"adapters": (), "merge_like_peft": False}
    try:
        record = parse(output.record)
        check_schema(record, output.location.display_path(RECORD_NAME))
        to, keeps_dtypes = str(record["format"]), record["dtype"] == KEEP
        selection = Selection.of(record["selection"])
        encoding = {key: _as_text(record.get(key)) for key in encoding}
        if "pruning" in record:
            kept["keep_layers"], kept["keep_experts"] = ResolvedPruning.options(record["pruning"])
        if "adapters" in record:
            merged = {
                "adapters": recorded_adapters(record["adapters"], record["merged"]),
                "merge_like_peft": record.get("merge_like_peft") is True,
            }
    except (ValueError, TypeError, KeyError, AttributeError, OptionError):
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
    output: StoredOutput, expected: Mapping[str, OutputTensor], plan: Plan
) -> Iterator[Difference]:
    """Compare an output, except for the data of its tensors, with what is expected.

    Args:
        output: The output.
        expected: The tensors that should be in it, by name.
        plan: The plan that they are from.

    Raises:
        CheckpointError: If an auxiliary file of the source cannot be used.
        MachineError: If reading fails, as does `OSError`.
    """
    location = output.location
    yield from _compare_tensors(output.info.tensors, expected)
    yield from _compare_index(output)
    yield from _compare_small_files(output, plan)
    if plan.mxfp4_rule is not None:
        yield from _check_object(REPORT_NAME, read_file(location, REPORT_NAME))
    yield from compare_record(location, output.record)


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


def _compare_index(output: StoredOutput) -> Iterator[Difference]:
    """Compare the index with the tensors that are in the shards."""
    if isinstance(output.index, Difference):
        yield Difference(
            "index", INDEX_NAME, found=output.index.found or "no file", expected="an index"
        )
        return
    found = output.info.tensors
    expected = build_index(
        sum(raw.nbytes for raw in found.values()),
        {name: raw.shard for name, raw in found.items()},
    )
    if parse(output.index) != parse(expected):
        yield Difference("index", INDEX_NAME, found="another index", expected="that of the shards")


def _compare_small_files(output: StoredOutput, plan: Plan) -> Iterator[Difference]:
    """Compare the configuration and the files that are copied from the source.

    Not the model card: users edit it, and it says whether the source was on the Hub.
    """
    location = output.location
    for name, data in determined_files(plan).items():
        expected = data if isinstance(data, bytes) else b"".join(data.chunks())
        found = read_file(location, name, max(_MAX_FILE_NBYTES, len(expected)))
        if isinstance(found, Difference):
            yield found
        elif found != expected:
            yield Difference("file", name, found="other bytes", expected="what convert writes")


def compare_record(location: Location, record: bytes | Difference) -> Iterator[Difference]:
    """Check that the record is a JSON object and that no run is unfinished.

    What the record says is not checked.
    """
    yield from _check_object(RECORD_NAME, record)
    if holds_run(location):
        yield Difference("unexpected", f"{WORK_NAME}, of an unfinished run")


def _check_object(name: str, data: bytes | Difference) -> Iterator[Difference]:
    """Check that a file is there and holds a JSON object."""
    if isinstance(data, Difference):
        yield data
    elif not isinstance(parse(data), dict):
        yield Difference("file", name, found="no JSON object", expected="a JSON object")
