"""A checkpoint's format and model, read from its configuration and its tensors' names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ..checkpoint.metadata import CheckpointInfo
from ..errors import ConfigError
from ..model.config import ModelConfig
from ._check_tensors import read_table
from ._detection import detect_format
from ._format import Format, notes
from ._mxfp4_views import mxfp4_views
from ._names import unwrap
from ._quantization import quantization_notes
from ._registry import load, names
from ._table import Table, mxfp4_tensors

__all__ = ["SourceModel", "naming_config", "read_source"]


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A checkpoint, its format and the model that it stores."""

    info: CheckpointInfo
    """The checkpoint. The keys of its tensors are names of the format; `RawTensor.name` is the
    stored name, which can have a wrapper's name before it."""
    name: str
    """The format's name."""
    detected_by: str
    """Why the checkpoint is of that format."""
    format: Format
    table: Table
    """The format's table with the names and the orders of axes that the checkpoint uses."""
    model: ModelConfig
    """The model with the tensors that are stored."""
    notes: tuple[str, ...] = ()
    """What users should know about how the checkpoint was read."""
    doubt: str = ""
    """Why it is not certain in which order the values are stored, so that they cannot be converted;
    empty if it is."""
    outside: tuple[str, ...] = ()
    """Stored names of tensors that are not part of the gpt-oss."""


def read_source(info: CheckpointInfo, source_format: str | None) -> SourceModel:
    """Read the format and the model of a checkpoint.

    Args:
        info: The checkpoint.
        source_format: The format's name; None to detect it.

    Raises:
        OptionError: If there is no format of that name.
        CheckpointError: If the format cannot be detected.
        ConfigError: If the configuration does not describe a model.
        TensorError: If a tensor is stored under two names.
    """
    if source_format is not None:
        load(source_format)  # raises if there is none of that name
    modules = {name: load(name) for name in names()}
    info, outside = unwrap(info, {name: module.TABLE for name, module in modules.items()})
    if source_format is None:
        name, reason = detect_format(info, modules)
    else:
        name, reason = source_format, "as asked"
    module = modules[name]
    with naming_config(info):
        model = module.read_model(info)
        read = read_table(module.TABLE, model, info)
    info = replace(info, tensors=mxfp4_views(read.table, read.model, info.tensors))
    found = (
        *info.notes,
        *quantization_notes(info, is_mxfp4=bool(mxfp4_tensors(read.table))),
        *notes(module, info),
        *read.notes,
    )
    return SourceModel(
        info, name, reason, module, read.table, read.model, found, read.doubt, outside
    )


@contextmanager
def naming_config(info: CheckpointInfo) -> Iterator[None]:
    """Give each `ConfigError` the full path of the file that it is about.

    Formats raise it as "config.json: …", whichever file the configuration was read from.
    """
    try:
        yield
    except ConfigError as error:
        name, _, what = str(error).partition(": ")
        file = info.config_name if name == "config.json" else name
        raise ConfigError(f"{info.location.display_path(file)}: {what}") from None
