"""Checkpoint formats, one file each.

Does: say what each format stores, detect a checkpoint's format, read and write its configuration.
May import: model, checkpoint, tensors, errors, _utils.
Must not know: how tensors are converted, split into shards and written.

A new file here is a new format, with no other change. Its name is the file's, with `-` for `_`.
What it defines is in `Format`: a table, `detect`, `read_model`, `check` and `files`. Files with a
leading underscore are not formats.
"""

from __future__ import annotations

from ._check_tensors import check_tensors
from ._format import Format, default_dtype, ignored, library, loading, warning
from ._hugging_face_config import pruned_config, stale_entries
from ._registry import load, names
from ._source import SourceModel, naming_config, read_source
from ._table import Row, Table, TensorSpec, mxfp4_tensors, rows_by_name, table_specs

__all__ = [
    "Format",
    "Row",
    "SourceModel",
    "Table",
    "TensorSpec",
    "check_tensors",
    "default_dtype",
    "ignored",
    "library",
    "load",
    "loading",
    "mxfp4_tensors",
    "names",
    "naming_config",
    "pruned_config",
    "read_source",
    "rows_by_name",
    "stale_entries",
    "table_specs",
    "warning",
]


def __dir__() -> list[str]:
    return __all__
