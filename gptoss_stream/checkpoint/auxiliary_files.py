"""The small files beside the weights that users of an output need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from ..storage.location import NEVER_STOP, Location, changed

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
_BLOCK_NBYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class CopiedFile:
    """A file that is copied byte for byte."""

    location: Location
    name: str

    def chunks(self) -> Iterator[bytes]:
        """Yield the file's bytes, at most 4 MiB at a time.

        Raises:
            CheckpointError: If the file changes meanwhile, or its checksum is wrong.
        """
        digest = hashlib.sha256()
        with closing(self.location.open(self.name)) as file:
            for begin in range(0, file.info.nbytes, _BLOCK_NBYTES):
                block = bytearray(min(_BLOCK_NBYTES, file.info.nbytes - begin))
                file.read_into(memoryview(block), begin, NEVER_STOP)
                digest.update(block)
                yield bytes(block)
            if file.info.sha256 not in (None, digest.hexdigest()):
                raise changed(self.location.display_path(self.name))
            file.check_unchanged()

    def check(self) -> None:
        """Raise what reading the file would raise if it cannot be opened."""
        self.location.open(self.name).close()


def find_auxiliary_files(location: Location) -> Iterator[CopiedFile]:
    """Yield the files that are copied: tokenizer, chat templates and generation settings."""
    for name in _NAMES:
        if location.has(name):
            yield CopiedFile(location, name)
    for name in location.names(_TEMPLATES):
        if name.endswith(".jinja"):
            yield CopiedFile(location, f"{_TEMPLATES}/{name}")
