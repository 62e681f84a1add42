"""The small files beside the weights that an output's users need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from ..storage.location import NEVER, Location, changed

__all__ = ["CopiedFile", "find_auxiliary_files"]


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


_CHUNK_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file of a place that is copied byte for byte."""

    location: Location
    name: str

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, a few at a time; raises what reading it raises."""
        file = self.location.open(self.name)
        found = hashlib.sha256()
        try:
            for at in range(0, file.info.nbytes, _CHUNK_NBYTES):
                chunk = bytearray(min(_CHUNK_NBYTES, file.info.nbytes - at))
                file.read_into(memoryview(chunk), at, NEVER)
                found.update(chunk)
                yield bytes(chunk)
            if file.info.sha256 not in (None, found.hexdigest()):
                raise changed(self.location.display_path(self.name))
            file.check_unchanged()
        finally:
            file.close()

    def check(self) -> None:
        """Raise what reading it would, if it cannot be read."""
        self.location.open(self.name).close()


def find_auxiliary_files(location: Location) -> Iterator[CopiedFile]:
    """The files of a checkpoint that are copied: tokenizer, chat template and generation
    settings."""
    for name in _NAMES:
        if location.has(name):
            yield CopiedFile(location, name)
    for name in location.names(_TEMPLATES):
        if name.endswith(".jinja"):
            yield CopiedFile(location, f"{_TEMPLATES}/{name}")
