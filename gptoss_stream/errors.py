"""The errors of this package: everything that can be wrong with an input, an output or the system.

    GptOssStreamError         exit code 2: the request cannot be carried out
     ├ OptionError            an argument is wrong: unknown format, size that does not parse
     ├ CheckpointError        the source cannot be used
     │  ├ HeaderError         a safetensors header breaks a rule of the format
     │  ├ ConfigError         config.json is missing, damaged or of another model
     │  └ TensorError         a tensor is missing, has an unexpected dtype or shape, or a value that
     │                        cannot be converted
     ├ OutputError            the output cannot be used: foreign files, a finished run
     │  └ VerificationError   it is not what the conversion of its source writes
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
    "VerificationError",
]


class GptOssStreamError(Exception):
    """Base class of all errors of this package: catch it to catch every expected failure."""

    exit_code = 2
    """What the command line exits with: 2, or 3 for a system error."""


class OptionError(GptOssStreamError):
    """An argument has a value that cannot be used: an unknown format, a size that does not parse.

    Exit code 2.
    """


class CheckpointError(GptOssStreamError):
    """The source is not a checkpoint that can be converted, or it changed during the run.

    Catch this for every fault of the source; the subclasses say which. Exit code 2.
    """


class HeaderError(CheckpointError):
    """A safetensors file or its index is damaged or truncated: download it again.

    Exit code 2.
    """


class ConfigError(CheckpointError):
    """config.json is missing, damaged, or does not describe a gpt-oss model that is supported.

    Exit code 2.
    """


class TensorError(CheckpointError):
    """A tensor is missing, has an unexpected dtype or shape, or a value that cannot be converted.

    Such a value is a NaN scale, or a number too large for the output dtype. Exit code 2.
    """


class OutputError(GptOssStreamError):
    """The output cannot be written to, or is not an output of this package.

    It has files of another origin or of another conversion, is in use by another run, or is
    incomplete or damaged. Exit code 2.
    """


class VerificationError(OutputError):
    """An output is not what the conversion of its source writes, or not as its checksums say.

    Only `Verification.raise_for_differences` raises it. Exit code 2.
    """


class MissingPackageError(GptOssStreamError, ImportError):
    """An optional package is not installed, or its version cannot be used.

    The message has the command that installs it. Exit code 2.
    """


class MachineError(GptOssStreamError):
    """A system error: disk full, I/O error, no permission, no connection.

    Finished shards stay: correct the cause and run again to resume. Exit code 3.
    """

    exit_code = 3
