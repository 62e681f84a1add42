"""The description of a converted output: its record, its shards, and whether it is complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from .._utils import strict_json
from .._utils.failures import machine_error
from .._utils.messages import counted, summary
from ..checkpoint.metadata import read_header
from ..checkpoint.small_files import read_small_file
from ..errors import CheckpointError, OutputError
from ..storage.location import Location
from ..tensors.raw_tensor import RawTensor
from ..writing.run_state import RECORD_NAME, RUN_NAME, check_schema

__all__ = ["OutputInfo", "read_output_info"]

_MAX_RECORD_NBYTES = 25_000_000


@dataclass(frozen=True, slots=True)
class OutputInfo:
    """A converted output, finished or not, by its record and the headers of its shards."""

    path: str
    """Where it is: a path or a URL."""
    format: str
    dtype: str
    """A torch name, or "keep"."""
    selection: Mapping[str, Any]
    """As from `ResolvedSelection.as_dict`."""
    source: str
    source_format: str
    adapters: tuple[str, ...]
    """The LoRA adapters that were merged, in order."""
    version: str
    """The version of this package that wrote it."""
    finished: bool
    """Whether the conversion ended."""
    missing: tuple[str, ...]
    """Files that the record names and that do not exist."""
    tensors: Mapping[str, RawTensor]
    """The tensors of the shards that exist, by name."""

    def __repr__(self) -> str:
        return summary(
            self,
            f"{counted(len(self.tensors), 'tensor')}, {self.format}, {self.dtype}, "
            f"{'complete' if self.complete else 'not complete'}, {self.path}, of {self.source}",
        )

    @property
    def complete(self) -> bool:
        """Whether the conversion ended and no file is missing."""
        return self.finished and not self.missing

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON types, with each tensor's dtype, shape and shard."""
        return {
            "schema": strict_json.SCHEMA,
            **asdict(self),
            "adapters": list(self.adapters),
            "missing": list(self.missing),
            "complete": self.complete,
            "tensors": {
                raw.name: {"dtype": raw.dtype.code, "shape": list(raw.shape), "shard": raw.shard}
                for raw in self.tensors.values()
            },
        }


def read_output_info(location: Location) -> OutputInfo | None:
    """Read the description of a converted output.

    Args:
        location: Where it is, already opened.

    Returns:
        The description, or None if there is no converted output.

    Raises:
        OutputError: If the record or a shard is damaged.
        MachineError: If reading fails.
    """
    with _as_output_errors(location):
        name = RUN_NAME if location.has(RUN_NAME) else RECORD_NAME
        if not location.has(name):
            return None
        data = read_small_file(location, name, _MAX_RECORD_NBYTES)
        try:
            record = strict_json.loads(data)
            if "source_format" not in record:
                return None  # a random checkpoint from synth has a record too
            check_schema(record, location.display_path(name))
            return _from_record(location, record, is_finished=name == RECORD_NAME)
        except (ValueError, TypeError, KeyError):
            raise OutputError(
                f"{location.display_path(name)}: its record is damaged; run verify, or convert "
                "again"
            ) from None


@contextmanager
def _as_output_errors(location: Location) -> Iterator[None]:
    """Raise the errors of reading a location as errors about an output.

    It is read with the functions that read checkpoints, whose errors are about a source.
    """
    try:
        yield
    except OSError as error:
        raise machine_error(error, f"reading {location}") from error
    except CheckpointError as error:
        raise OutputError(f"{error}; run verify, or convert again") from None


def _from_record(location: Location, record: Mapping[str, Any], *, is_finished: bool) -> OutputInfo:
    """Return the description of the output that a record belongs to."""
    names = [str(name) for name in record["files"]]
    missing = [name for name in names if not location.has(name)]
    tensors: dict[str, RawTensor] = {}
    for name in names:
        if name.endswith(".safetensors") and name not in missing:
            tensors |= read_header(location, name)[1]
    return OutputInfo(
        path=str(location),
        format=str(record["format"]),
        dtype=str(record["dtype"]),
        selection=dict(record["selection"]),
        source=str(record["source"]),
        source_format=str(record["source_format"]),
        adapters=tuple(str(one["adapter"]) for one in record.get("adapters", ())),
        version=str(record["version"]),
        finished=is_finished,
        missing=tuple(missing),
        tensors=tensors,
    )
