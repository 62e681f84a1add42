"""The files of an adapter: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .._utils.failures import machine_error
from ..checkpoint.metadata import CheckpointInfo, read_header
from ..checkpoint.small_files import read_config, read_small_file
from ..errors import CheckpointError
from ..storage.location import Location
from ..storage.open_location import open_location
from ..tensors.dtypes import DType
from .adapter import Adapter
from .lora_config import LoraConfig, parse_config

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "AdapterFile", "ModelCard", "is_adapter", "read_adapter"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_FLOATS = (DType.F32, DType.BF16, DType.F16)
_MAX_CARD_NBYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an adapter's README.md says about the programs that saved it."""

    peft: str | None = None
    """PEFT's version."""
    transformers: str | None = None
    """The version of transformers."""
    is_unsloth: bool = False
    """Whether it names unsloth."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter that was read, without its data."""

    adapter: Adapter
    """What the user says about it."""
    info: CheckpointInfo
    """Its files and tensors."""
    config: LoraConfig
    card: ModelCard


def is_adapter(location: Location) -> bool:
    """Return whether an adapter is at a location, and no weights of a whole checkpoint."""
    try:
        if not location.has(CONFIG_NAME):
            return False
        names = {
            name for name in location.names() if name.endswith((".safetensors", ".index.json"))
        }
        return names <= {WEIGHTS_NAME}
    except OSError as error:
        raise machine_error(error, f"reading {location}") from error


def read_adapter(adapter: Adapter, number: int = 0) -> AdapterFile:
    """Read an adapter's configuration and the header of its weights.

    Args:
        adapter: The adapter.
        number: Its tensors' number in `RawTensor.checkpoint`.

    Raises:
        CheckpointError: If there is no adapter, or one that cannot be merged.
        MachineError: If reading fails.
    """
    location = open_location(adapter.location)
    try:
        location.check()
        _check_files(location)
        values = read_config(location, CONFIG_NAME)
        config = parse_config(values, location.display_path(CONFIG_NAME))
        shard, tensors, _ = read_header(location, WEIGHTS_NAME)
        card = _read_card(location)
    except OSError as error:
        raise machine_error(error, f"reading {location}") from error
    where = location.display_path(WEIGHTS_NAME)
    if not tensors:
        raise CheckpointError(f"{where}: no tensors in it; save or download the adapter again")
    for raw in tensors.values():
        if raw.dtype not in _FLOATS:
            raise CheckpointError(
                f"{where}: tensor {raw.name!r} is {raw.dtype}; an adapter's tensors must be F32, "
                "BF16 or F16"
            )
    raws = {name: replace(raw, checkpoint=number) for name, raw in tensors.items()}
    info = CheckpointInfo(location, {CONFIG_NAME: values}, (shard,), raws)
    return AdapterFile(adapter, info, config, card)


def _check_files(location: Location) -> None:
    """Refuse a location without an adapter, saying what is there instead."""
    if not location.has(CONFIG_NAME):
        reason = "missing; an adapter folder needs it"
        if location.has("config.json"):
            reason = "missing; this is a whole checkpoint and no adapter: convert it by itself"
        raise CheckpointError(f"{location.display_path(CONFIG_NAME)}: {reason}")
    if not location.has(WEIGHTS_NAME):
        where = location.display_path(WEIGHTS_NAME)
        if location.has(_PICKLE_NAME):
            raise CheckpointError(
                f"{location.display_path(_PICKLE_NAME)}: a pickle, which can run any code and is "
                "never opened; save the adapter as safetensors"
            )
        raise CheckpointError(f"{where}: missing; save or download the adapter again")


def _read_card(location: Location) -> ModelCard:
    """Return what README.md says; nothing if there is none, or it cannot be understood."""
    if not location.has("README.md"):
        return ModelCard()
    try:
        text = read_small_file(location, "README.md", _MAX_CARD_NBYTES).decode(errors="replace")
    except CheckpointError:
        return ModelCard()
    versions = {}
    for name in ("PEFT", "Transformers"):
        found = re.search(rf"^[-*\s]*{name}\W{{1,4}}v?(\d+(?:\.\d+)+)", text, re.I | re.M)
        versions[name] = found[1] if found else None
    tags = re.search(r"^---\s*$(.*?)^---\s*$", text, re.M | re.S)
    is_unsloth = bool(tags and re.search(r"^\s*-\s*unsloth\s*$", tags[1], re.I | re.M))
    return ModelCard(versions["PEFT"], versions["Transformers"], is_unsloth)
