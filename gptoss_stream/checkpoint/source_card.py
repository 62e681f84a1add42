"""Reads what a checkpoint's model card (README.md) says of its license and of what it is made of.

Source of the keys: the Hub's documentation of model cards. What cannot be understood says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..storage.location import Location
from .small_files import read_small_file

__all__ = ["CARD_NAME", "RELATIONS", "SourceCard", "read_source_card"]

CARD_NAME = "README.md"
RELATIONS = ("adapter", "finetune", "merge", "quantized")
"""The values of `base_model_relation`."""
_LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
_MAX_NBYTES = 1_000_000
_MAX_BASES = 20
_APACHE = re.compile(r"\s*Apache License\s+Version 2\.0, January 2004\s")
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class SourceCard:
    """What a model card says."""

    license: str | None = None
    """The Hub's name of the license."""
    license_name: str | None = None
    """The name of a license that the Hub has no name for."""
    license_link: str | None = None
    """Where that license is."""
    base_models: tuple[str, ...] = ()
    """The repositories that the checkpoint is made of."""
    relation: str | None = None
    """How it is made of them (see `RELATIONS`)."""


def read_source_card(location: Location) -> SourceCard:
    """Read the model card of a checkpoint and, if that names no license, its license file.

    Raises:
        MachineError: If reading fails.
    """
    found = _front_matter(_read_text(location, CARD_NAME))
    named = _text(found.get("license"), r"[a-z0-9][a-z0-9.+-]*")
    if named is None:
        texts = (_read_text(location, name) for name in _LICENSE_FILES)
        named = "apache-2.0" if any(_APACHE.match(text) for text in texts) else None
    bases = found.get("base_model")
    bases = bases if isinstance(bases, list) else [bases]
    relation = found.get("base_model_relation")
    return SourceCard(
        license=named,
        license_name=_text(found.get("license_name"), r"[\w .+-]+"),
        license_link=_text(found.get("license_link"), r"https?://[^\s@]+"),
        base_models=tuple(b for b in bases[:_MAX_BASES] if _text(b, _REPOSITORY.pattern)),
        relation=relation if relation in RELATIONS else None,
    )


def _read_text(location: Location, name: str) -> str:
    """Return a file's text; empty if there is none that can be used."""
    with suppress(CheckpointError, PermissionError):
        if location.has(name):
            return read_small_file(location, name, _MAX_NBYTES).decode(errors="replace")
    return ""


def _front_matter(card: str) -> Mapping[str, Any]:
    """Return the metadata at the beginning of a model card."""
    import yaml  # of huggingface_hub, which reads cards with it

    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", card, re.S | re.M)
    with suppress(yaml.YAMLError, ValueError, RecursionError):
        found = yaml.safe_load(match[1]) if match else None
        if isinstance(found, dict):
            return found
    return {}


def _text(value: Any, pattern: str) -> str | None:
    """Return a value that is a text of some form; None for another."""
    is_text = isinstance(value, str) and len(value) <= 200 and re.fullmatch(pattern, value, re.A)
    return value if is_text else None
