"""What a converted folder is: its record, its shards, and whether all of it is there."""

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
from ..checkpoint.metadata import RawTensor, read_header
from ..errors import CheckpointError, OutputError
from ..storage.local_folder import LocalFolder
from ..storage.open_location import local_path
from ..writing.run_state import RECORD_NAME, RUN_NAME

__all__ = ["OutputInfo", "read_output_info", "reading_output"]


@dataclass(frozen=True, slots=True)
class OutputInfo:
    """A converted folder, by its record and the headers of the shards that are there."""

    path: Path
    format: str
    dtype: str
    selection: Mapping[str, Any]
    source: str
    source_format: str
    version: str
    finished: bool
    missing: tuple[str, ...]
    """Files that the record names and that are not there."""
    tensors: Mapping[str, RawTensor]

    @property
    def complete(self) -> bool:
        """Whether the conversion ended and all that it made is there."""
        return self.finished and not self.missing

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON types, tensors by dtype, shape and shard."""
        tensors = {
            raw.name: {"dtype": raw.dtype.code, "shape": list(raw.shape), "shard": raw.shard}
            for raw in self.tensors.values()
        }
        plain = {**asdict(self), "path": str(self.path), "missing": list(self.missing)}
        return {**plain, "complete": self.complete, "tensors": tensors}


def read_output_info(path: str | os.PathLike[str]) -> OutputInfo | None:
    """What a converted folder is, finished or not; None for a folder that is none.

    Raises `OutputError` for a damaged record or shard, `MachineError` where reading fails.
    """
    folder = local_path(path)
    unfinished, finished = folder / RUN_NAME, folder / RECORD_NAME
    try:
        with reading_output(folder):
            file = unfinished if unfinished.is_file() else finished
            if not file.is_file():
                return None
            with open(open_regular(file), "rb") as opened:
                record = strict_json.loads(opened.read())
            if "source_format" not in record:
                return None  # of a checkpoint that synth made
            files = [str(name) for name in record["files"]]
            shards = [name for name in files if name.endswith(".safetensors")]
            tensors: dict[str, RawTensor] = {}
            for name in shards:
                if (folder / name).is_file():
                    tensors |= read_header(LocalFolder(folder), name)[1]
            return OutputInfo(
                path=folder,
                format=str(record["format"]),
                dtype=str(record["dtype"]),
                selection=dict(record["selection"]),
                source=str(record["source"]),
                source_format=str(record["source_format"]),
                version=str(record["version"]),
                finished=file == finished,
                missing=tuple(name for name in files if not (folder / name).is_file()),
                tensors=tensors,
            )
    except (NotRegularError, ValueError, TypeError, KeyError):
        raise OutputError(f"{file}: its record is damaged; run verify, or convert again") from None


@contextmanager
def reading_output(where: Path) -> Iterator[None]:
    """What a reader of checkpoints finds wrong with files of an output, as errors of the output."""
    try:
        yield
    except OSError as error:
        raise machine_error(error, f"reading {where}") from error
    except CheckpointError as error:
        raise OutputError(f"{error}; run verify, or convert again") from None
