"""Checkpoint formats, one file each: a table that is read and written, and the files beside it.

A new file here is a new format; its name is the file's, with `-` for `_`. A format is a module with
    TABLE              a tuple of `tables.Row`, in the order the tensors are written
    detect(info)       why a checkpoint is of this format, or None
    read_model(info)   the model from the configuration files of a checkpoint
    check(model)       raises where readers of this format would compute something else
    files(model, …)    the configuration files that its readers need, as {name: bytes}
and, where there is something to say,
    IGNORED            names of stored tensors that hold nothing of the model
    WARNING            what everybody who writes this format should know
    DEFAULT_DTYPE      the dtype of what is made of it by default, if not bfloat16
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ..checkpoint.metadata import CheckpointInfo
from ..errors import CheckpointError, ConfigError
from ..model.config import ModelConfig
from ..tensors.dtypes import DType
from . import _registry
from ._check import names_present, read_table
from ._table import Table

__all__ = [
    "Format",
    "SourceModel",
    "default_dtype",
    "detect_format",
    "ignored",
    "load",
    "names",
    "naming_config",
    "read_source",
    "warning",
]


class Format(Protocol):
    """What a module of this folder offers."""

    TABLE: Table

    def detect(self, info: CheckpointInfo) -> str | None:
        """Return why the checkpoint is of this format, or None where it is not.

        Raises:
            CheckpointError: If it looks like this format and cannot be read.
        """
        ...

    def read_model(self, info: CheckpointInfo) -> ModelConfig:
        """Return the model that the configuration files describe.

        Raises:
            ConfigError: If they do not describe one, or contradict each other.
        """
        ...

    def check(self, model: ModelConfig) -> None:
        """Check that the readers of this format compute what the model computes.

        Raises:
            ConfigError: If they would compute something else.
        """
        ...

    def files(
        self, model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
    ) -> dict[str, bytes]:
        """Return the configuration files for a model, by name.

        Args:
            model: The model as it is written.
            config: The source's config.json, Hugging Face's or OpenAI's; empty without one.
            dtype: The dtype of most dense elements.
            partial: Whether only a part of the model's tensors is written.
        """
        ...


def names() -> tuple[str, ...]:
    """Return the names of all formats, from the files of this folder."""
    return _registry.module_names(__path__)


def load(name: str) -> Format:
    """Return the format of that name.

    Raises:
        OptionError: If there is no such format.
    """
    found: Format = _registry.load_module(__name__, __path__, name, "format")
    return found


def ignored(format_: Format) -> tuple[str, ...]:
    """Return the stored names that hold nothing of the model, with `{l}` for each layer."""
    return tuple(getattr(format_, "IGNORED", ()))


def warning(format_: Format) -> str:
    """Return what somebody who writes a format should know; empty where there is nothing."""
    return str(getattr(format_, "WARNING", ""))


def default_dtype(format_: Format) -> str:
    """Return the dtype of what is made of a format, where none is asked for."""
    return str(getattr(format_, "DEFAULT_DTYPE", "bfloat16"))


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A checkpoint's format and the model that it stores."""

    name: str
    """The format's name."""
    detected_by: str
    """Why the checkpoint is of that format."""
    format: Format
    table: Table
    """The format's table with the names that the checkpoint uses."""
    model: ModelConfig
    """The model with the tensors that are stored."""


def read_source(info: CheckpointInfo, source_format: str | None) -> SourceModel:
    """Read the model of a checkpoint from its configuration and its tensors' names.

    Args:
        info: The checkpoint.
        source_format: The format's name; None to detect it.

    Raises:
        CheckpointError: If the format is unknown.
        ConfigError: If the configuration does not describe a model.
        TensorError: If tensors are stored under two names.
    """
    name, reason = (source_format, "as asked") if source_format else detect_format(info)
    found = load(name)
    with naming_config(info):
        table, model = read_table(found.TABLE, found.read_model(info), info)
    return SourceModel(name, reason, found, table, model)


def detect_format(info: CheckpointInfo) -> tuple[str, str]:
    """Return the name of a checkpoint's format, and why it is that.

    Where several formats could be meant, it is the one whose names the tensors have.

    Raises:
        CheckpointError: If it is of no known format, saying what it looks like.
    """
    _refuse_mixed(info)
    reasons = {name: load(name).detect(info) for name in names()}
    claims = [name for name, reason in reasons.items() if reason is not None]
    if not claims:
        raise CheckpointError(_looks_like(info))
    present = {name: names_present(load(name).TABLE, info.tensors) for name in names()}
    name = max(claims, key=lambda name: len(present[name]))
    _refuse_others(info, name, present)
    return name, str(reasons[name])


def _refuse_others(info: CheckpointInfo, name: str, present: Mapping[str, set[str]]) -> None:
    """Refuse tensors of another format beside those of one: nothing says which count."""
    for other, theirs in present.items():
        more = sorted(theirs - present[name])
        if more:
            raise CheckpointError(
                f"{info.location.display_path(info.tensors[more[0]].shard)}: tensor {more[0]!r} is one of "
                f"{other}, beside those of {name}; remove the ones that do not count"
            )


@contextmanager
def naming_config(info: CheckpointInfo) -> Iterator[None]:
    """Say in each `ConfigError` which file of which checkpoint is meant."""
    try:
        yield
    except ConfigError as error:
        name, _, what = str(error).partition(": ")
        file = info.config_name if name == "config.json" else name
        raise ConfigError(f"{info.location.display_path(file)}: {what}") from None


def _refuse_mixed(info: CheckpointInfo) -> None:
    """Refuse two versions of one tensor: nothing says which one counts."""
    for name, raw in info.tensors.items():
        plain = info.tensors.get(name.removesuffix("_blocks")) if name.endswith("_blocks") else None
        if plain is not None:
            raise CheckpointError(
                f"{info.location.display_path(raw.shard)}: tensor {name!r} is MXFP4, and {plain.name!r} in "
                f"{plain.shard} is the same unquantised; remove one of them"
            )


def _looks_like(info: CheckpointInfo) -> str:
    if info.config_name != "config.json":
        file = info.location.display_path("config.json")
        return f"{file}: missing; what stands here is a part of a model, which is not converted"
    config = info.location.display_path(info.config_name)
    model_type = info.config.get("model_type")
    if model_type not in (None, "gpt_oss"):
        found = str(model_type)[:40]
        return f"{config}: a checkpoint of model type {found!r}; only gpt_oss is converted"
    quantization = info.config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        return f"{config}: quantization_config is not an object"
    if quantization is not None and quantization.get("quant_method") != "mxfp4":
        method = str(quantization.get("quant_method"))[:40]
        return f"{config}: quantised by {method!r}; only mxfp4 is converted"
    if model_type == "gpt_oss":
        return (
            f"{config}: no quantization_config, and tensors in MXFP4; take config.json from the "
            "same place as the tensors, or add --from hf-mxfp4"
        )
    return f"{config}: not of a gpt-oss checkpoint: it has the model type {model_type!r}"
