"""The errors of this package: everything that can be wrong with an input, an output or the system.

    GptOssStreamError         exit code 2: the request cannot be carried out
     ├ OptionError            an argument is wrong: unknown format, size that does not parse
     ├ CheckpointError        the source cannot be used
     │  ├ HeaderError         a safetensors header breaks a rule of the format
     │  ├ ConfigError         config.json is missing, damaged or of another model
     │  └ TensorError         a tensor is missing, has an unexpected dtype or shape, or a value that
     │                        cannot be converted
     ├ OutputError            the output cannot be used: foreign files, a finished run
     ├ MissingPackageError    an optional package is not installed
     └ MachineError           exit code 3: disk full, I/O error, no permission, no connection

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
    """Base class of all errors of this package; `exit_code` is that of the command line."""

    exit_code = 2


class OptionError(GptOssStreamError):
    """An argument has a value that cannot be used."""


class CheckpointError(GptOssStreamError):
    """The source is not a checkpoint that can be converted."""


class HeaderError(CheckpointError):
    """A safetensors header breaks a rule of the format."""


class ConfigError(CheckpointError):
    """config.json is missing, damaged, or does not describe a gpt-oss model."""


class TensorError(CheckpointError):
    """A tensor is missing, has an unexpected dtype or shape, or holds an unusable value."""


class OutputError(GptOssStreamError):
    """The output cannot be written to, or is not what it should be."""


class MissingPackageError(GptOssStreamError, ImportError):
    """An optional package is not installed, or its version cannot be used."""


class MachineError(GptOssStreamError):
    """A system error: disk full, I/O error, no permission, no connection."""

    exit_code = 3
