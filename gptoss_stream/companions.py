"""The small files beside the weights that an output's users need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["carried"]

_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_TEMPLATES = "additional_chat_templates"


def carried(folder: Path) -> Iterator[str]:
    """The files of a checkpoint folder that are copied byte for byte: tokenizer, chat template
    and generation settings."""
    for name in _NAMES:
        if (folder / name).is_file():
            yield name
    for file in sorted((folder / _TEMPLATES).glob("*.jinja")):
        yield f"{_TEMPLATES}/{file.name}"
