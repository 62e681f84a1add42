"""Finds the auxiliary files of a checkpoint: tokenizer, chat templates, generation settings.

They are copied to the output as they are, so that it can be used without the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from ..storage.location import NEVER_STOP, File, FileInfo, Location, changed

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
    """An auxiliary file, which is copied byte for byte."""

    location: Location
    name: str
    info: FileInfo | None = None
    """What it was when it was found; None if any version of it will do."""

    def chunks(self) -> Iterator[bytes]:
        """Yield the file's bytes, at most 4 MiB at a time.

        Raises:
            CheckpointError: If the file has changed or changes, or its checksum is wrong.
        """
        digest = hashlib.sha256()
        with closing(self._open()) as file:
            for begin in range(0, file.info.nbytes, _BLOCK_NBYTES):
                block = bytearray(min(_BLOCK_NBYTES, file.info.nbytes - begin))
                file.read_into(memoryview(block), begin, NEVER_STOP)
                digest.update(block)
                yield bytes(block)
            if file.info.sha256 not in (None, digest.hexdigest()):
                raise changed(self.location.display_path(self.name))
            file.check_unchanged()

    def check(self) -> None:
        """Check that the file can be opened.

        Raises:
            CheckpointError: If it does not exist any more, or has changed.
            MachineError: If opening fails.
        """
        self._open().close()

    def _open(self) -> File:
        file = self.location.open(self.name)
        if self.info is not None and file.info != self.info:
            file.close()
            raise changed(self.location.display_path(self.name))
        return file


def find_auxiliary_files(location: Location) -> Iterator[CopiedFile]:
    """Yield the auxiliary files of a checkpoint that exist."""
    found = [name for name in _NAMES if location.has(name)]
    found += [f"{_TEMPLATES}/{n}" for n in location.names(_TEMPLATES) if n.endswith(".jinja")]
    for name in found:
        with closing(location.open(name)) as file:
            yield CopiedFile(location, name, file.info)
