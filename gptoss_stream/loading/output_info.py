"""The description of a converted output: its record, its shards, and whether it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._utils import strict_json
from .._utils.failures import machine_error
from .._utils.regular_file import NotRegularError, open_regular
from ..checkpoint.metadata import read_header
from ..errors import CheckpointError, OutputError
from ..storage.local_folder import LocalFolder
from ..storage.open_location import local_path
from ..tensors.raw_tensor import RawTensor
from ..writing.run_state import RECORD_NAME, RUN_NAME

__all__ = ["OutputInfo", "read_output_info"]


@dataclass(frozen=True, slots=True)
class OutputInfo:
    """A converted output, finished or not, by its record and the headers of its shards."""

    path: Path
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

    @property
    def complete(self) -> bool:
        """Whether the conversion ended and no file is missing."""
        return self.finished and not self.missing

    def as_dict(self) -> dict[str, Any]:
        """Return the description as JSON types, with each tensor's dtype, shape and shard."""
        return {
            **asdict(self),
            "path": str(self.path),
            "adapters": list(self.adapters),
            "missing": list(self.missing),
            "complete": self.complete,
            "tensors": {
                raw.name: {"dtype": raw.dtype.code, "shape": list(raw.shape), "shard": raw.shard}
                for raw in self.tensors.values()
            },
        }


def read_output_info(path: str | os.PathLike[str]) -> OutputInfo | None:
    """Read the description of a converted output.

    Args:
        path: A local folder.

    Returns:
        The description, or None if the folder is not a converted output.

    Raises:
        OutputError: If the record or a shard is damaged.
        MachineError: If reading fails.
    """
    folder = local_path(path)
    unfinished, finished = folder / RUN_NAME, folder / RECORD_NAME
    try:
        with _as_output_errors(folder):
            file = unfinished if unfinished.is_file() else finished
            if not file.is_file():
                return None
            with open(open_regular(file), "rb") as opened:
                record = strict_json.loads(opened.read())
            if "source_format" not in record:
                return None  # a random checkpoint from synth has a record too
            return _from_record(folder, record, is_finished=file == finished)
    except (NotRegularError, ValueError, TypeError, KeyError):
        raise OutputError(f"{file}: its record is damaged; run verify, or convert again") from None


@contextmanager
def _as_output_errors(folder: Path) -> Iterator[None]:
    """Raise the errors of reading a folder as errors about an output.

    It is read with the functions that read checkpoints, whose errors are about a source.
    """
    try:
        yield
    except OSError as error:
        raise machine_error(error, f"reading {folder}") from error
    except CheckpointError as error:
        raise OutputError(f"{error}; run verify, or convert again") from None


def _from_record(folder: Path, record: Mapping[str, Any], *, is_finished: bool) -> OutputInfo:
    """Return the description of the output that a record belongs to."""
    names = [str(name) for name in record["files"]]
    missing = [name for name in names if not (folder / name).is_file()]
    location = LocalFolder(folder)
    tensors: dict[str, RawTensor] = {}
    for name in names:
        if name.endswith(".safetensors") and name not in missing:
            tensors |= read_header(location, name)[1]
    return OutputInfo(
        path=folder,
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
