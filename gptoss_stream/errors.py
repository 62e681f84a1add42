"""Every error that a user can cause or meet.

GptOssStreamError            exit code 2: what was asked for cannot be done as asked
 ├ OptionError               an argument is wrong (unknown format, size that does not parse)
 ├ CheckpointError           the source cannot be used
 │  ├ HeaderError            a safetensors header breaks a rule of the format
 │  ├ ConfigError            config.json is missing, damaged or of another model
 │  └ TensorError            a tensor is missing, of another dtype or shape, or holds a value
 │                           that cannot be converted
 ├ OutputError               the output folder cannot be used (foreign files, a finished run)
 ├ MissingPackageError       a part of this tool needs a package that is not installed
 └ MachineError              exit code 3: the disk is full, an I/O error, no permission

A message is one line: what is wrong, in which file or tensor, and what to do.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ConfigError",
    "GptOssStreamError",
    "HeaderError",
    "MachineError",
    "MissingPackageError",
    "OptionError",
    "OutputError",
    "TensorError",
]


class GptOssStreamError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line exits with."""

    exit_code = 2


class OptionError(GptOssStreamError):
    """An argument has a value that cannot be used."""


class CheckpointError(GptOssStreamError):
    """The source is not a checkpoint that can be converted."""


class HeaderError(CheckpointError):
    """A safetensors header breaks a rule of the format."""


class ConfigError(CheckpointError):
    """config.json is missing, damaged, or describes something else than a gpt-oss model."""


class TensorError(CheckpointError):
    """A tensor is missing, has an unexpected dtype or shape, or holds an unusable value."""


class OutputError(GptOssStreamError):
    """The output folder cannot be written to without harm."""


class MissingPackageError(GptOssStreamError, ImportError):
    """An optional package is not installed, or in a version that cannot be used."""


class MachineError(GptOssStreamError):
    """The machine failed: disk full, I/O error, no permission."""

    exit_code = 3
