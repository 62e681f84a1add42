"""Checkpoint formats, one file each: how it is recognised and which raw tensor holds what.

A new file here is a new format. A source is a module with
    NAME               what `inspect` calls it
    recognise(info)    why this checkpoint is of this format, or None
    read_config(json)  the model's numbers from config.json
    TENSORS            a `storage.StoredTable`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from .. import plugins
from ..checkpoint import CheckpointInfo
from ..errors import CheckpointError, ConfigError
from ..model import ModelConfig
from ..storage import StoredTable

__all__ = ["Source", "load", "names", "naming_config", "recognise"]


class Source(Protocol):
    """What a module of this folder offers."""

    NAME: str
    TENSORS: StoredTable

    def recognise(self, info: CheckpointInfo) -> str | None:
        """Why the checkpoint is of this format, or None where it is not."""
        ...

    def read_config(self, config: Mapping[str, Any]) -> ModelConfig:
        """The model's numbers from config.json; raises `ConfigError`."""
        ...


def names() -> tuple[str, ...]:
    """The formats that can be read, from the files of this folder."""
    return plugins.names(__path__)


def load(name: str) -> Source:
    """The format of that name; raises `OptionError` for a name that is none."""
    source: Source = plugins.load(__name__, __path__, name, "source format")
    return source


def recognise(info: CheckpointInfo) -> tuple[Source, str]:
    """The format of a checkpoint and why; raises `CheckpointError` saying what it looks like."""
    _refuse_mixed(info)
    for name in names():
        source = load(name)
        reason = source.recognise(info)
        if reason is not None:
            return source, reason
    raise CheckpointError(_looks_like(info))


@contextmanager
def naming_config(info: CheckpointInfo) -> Iterator[None]:
    """What is wrong with config.json, as errors that say where it is."""
    try:
        yield
    except ConfigError as error:
        where = info.place.at("config.json")
        raise ConfigError(str(error).replace("config.json", where, 1)) from None


def _refuse_mixed(info: CheckpointInfo) -> None:
    """Two versions of one tensor: nothing says which one counts."""
    for name, raw in info.tensors.items():
        plain = info.tensors.get(name.removesuffix("_blocks")) if name.endswith("_blocks") else None
        if plain is not None:
            raise CheckpointError(
                f"{info.place.at(raw.shard)}: tensor {name!r} is MXFP4, and {plain.name!r} in "
                f"{plain.shard} is the same unquantised; remove one of them"
            )


def _looks_like(info: CheckpointInfo) -> str:
    config = info.place.at("config.json")
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
    if any("gate_up_projs." in name for name in info.tensors):
        what = "experts unfused into modules (gate_up_projs)"
        return f"{info.place}: {what}; re-save it with fused ones"
    if model_type == "gpt_oss":
        return (
            f"{config}: no quantization_config, and tensors in MXFP4; take config.json from the "
            "same place as the tensors, or add --source-format hf-mxfp4"
        )
    return f"{config}: not of a gpt-oss checkpoint: it has the model type {model_type!r}"
