"""What a format is: a module with a table and a few functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..checkpoint.metadata import CheckpointInfo
from ..model.config import ModelConfig
from ..tensors.dtypes import DType
from ._table import Table

__all__ = [
    "Format",
    "default_dtype",
    "ignored",
    "library",
    "loading",
    "notes",
    "warning",
]

_LOADED_HERE = """import gptoss_stream

model = gptoss_stream.load_hf_model(folder)"""


class Format(Protocol):
    """What the module of a format defines.

    It may also define `IGNORED`, `WARNING`, `DEFAULT_DTYPE`, `LIBRARY`, `LOADING` and a function
    `notes`: see `ignored`, `warning`, `default_dtype`, `library`, `loading` and `notes`.
    """

    TABLE: Table
    """What is stored, in the order in which the tensors are written."""

    def detect(self, info: CheckpointInfo) -> str | None:
        """Return why a checkpoint is of this format, or None if it is not.

        Raises:
            CheckpointError: If it looks like this format but cannot be read.
        """
        ...

    def read_model(self, info: CheckpointInfo) -> ModelConfig:
        """Return the model that the configuration files of a checkpoint describe.

        Raises:
            ConfigError: If they describe none, or contradict each other. The message begins with
                "config.json: " or the name of another file (see `naming_config`).
        """
        ...

    def check(self, model: ModelConfig) -> None:
        """Check that programs that load this format compute what the model computes.

        Raises:
            ConfigError: If they would compute something else.
        """
        ...

    def files(
        self, model: ModelConfig, config: Mapping[str, Any], dtype: DType, *, partial: bool
    ) -> dict[str, bytes]:
        """Return the configuration files to write, by name.

        Args:
            model: The model as it is written.
            config: The source's configuration, Hugging Face's or OpenAI's; empty without one.
            dtype: The dtype of most dense elements.
            partial: Whether only some of the model's tensors are written.
        """
        ...


def ignored(module: Format) -> tuple[str, ...]:
    """Return the stored names of a format that hold no tensor of the model.

    The names have `{l}` for the layer. A source may have such tensors; no output does.
    """
    return tuple(getattr(module, "IGNORED", ()))


def warning(module: Format) -> str:
    """Return what users who write a format should know; empty if there is nothing."""
    return str(getattr(module, "WARNING", ""))


def notes(module: Format, info: CheckpointInfo) -> list[str]:
    """Return what users should know about how a checkpoint's configuration was read."""
    function = getattr(module, "notes", None)
    return [] if function is None else list(function(info))


def default_dtype(module: Format) -> str:
    """Return the dtype to write by default if a format is the source: a torch name or "keep"."""
    return str(getattr(module, "DEFAULT_DTYPE", "bfloat16"))


def library(module: Format) -> str:
    """Return the package that loads a format, as the Hub calls it."""
    return str(getattr(module, "LIBRARY", "gptoss_stream"))


def loading(module: Format) -> str:
    """Return Python that loads a format from `folder`, for people to copy."""
    return str(getattr(module, "LOADING", _LOADED_HERE))
