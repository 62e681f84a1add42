"""Checkpoints as people have them, each with what is right for it: tensors, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from field_models import Change, Tensors, config, model, packed, save, save_shards, write

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """How a checkpoint is made of a model.

    Args:
        stored: What programs did to the tensors.
        config: Entries of config.json that are other than a released model's; `...` removes one.
        mxfp4: Whether the experts' matrices are in MXFP4.
        model: Entries of the model, such as other sizes.
        outer: What is done to config.json as a whole; None for no config.json.
        file: The name of the file with the tensors; empty for no such file.
        shards: The number of files, with an index.
        files: Further files by name.
        foreign: Files with the tensors of another model, by name.
    """

    stored: Change = lambda tensors: tensors
    config: dict = field(default_factory=dict)
    mxfp4: bool = False
    sizes: dict = field(default_factory=dict)
    outer: Callable[[dict], dict | None] = lambda found: found
    file: str = "model.safetensors"
    shards: int = 0
    files: dict = field(default_factory=dict)
    foreign: tuple[str, ...] = ()

    def write(self, folder: Path) -> Tensors:
        """Write the checkpoint; return the model in it."""
        folder.mkdir(parents=True)
        plain = model(**self.sizes)
        stored, plain = packed(plain) if self.mxfp4 else (plain, plain)
        stored = self.stored(stored)
        for name in self.foreign:
            save(folder / name, model(7, **self.sizes))
        if self.shards:
            write(folder, {INDEX: save_shards(folder, stored, self.shards)})
        elif self.file:
            save(folder / self.file, stored)
        found = self.outer(config(**{**self.sizes, **self.config}))
        if found is not None:
            write(folder, {"config.json": found})
        write(folder, self.files)
        return plain


@dataclass(frozen=True)
class Converted:
    """A checkpoint that is converted.

    Args:
        source: The checkpoint.
        notes: Words of the notes, each of which must be in one of them.
        without: Tensors of the model that the output does not have.
        config: Entries of the output's config.json.
        unmapped: The number of stored tensors that are not used.
        same_as_transformers: Whether transformers loads the source with every tensor.
    """

    source: Source
    notes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)
    unmapped: int = 0
    same_as_transformers: bool = False


@dataclass(frozen=True)
class Refused:
    """A checkpoint that is refused.

    Args:
        source: The checkpoint.
        words: What the line must say.
        never: What it must not say, since it would mislead.
    """

    source: Source
    words: tuple[str, ...]
    never: tuple[str, ...] = ()
