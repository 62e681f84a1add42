"""Convert gpt-oss checkpoints between formats, in little memory.

    >>> import gptoss_stream
    >>> gptoss_stream.convert("gpt-oss-20b", "gpt-oss-20b-tl")  # doctest: +SKIP

Convert and check:

    plan              what a conversion would write: shards, tensors, shapes, sizes
    convert           convert a checkpoint; resumes an interrupted run
    verify            compare an output with its source, byte for byte
    verify_checksums  check the files of an output against its SHA256SUMS
    synth             write a random checkpoint, to try things with

Load an output:

    open_state_dict          tensors by name, memory-mapped
    load_hooked_transformer  a TransformerLens model whose weights stay on the disk

Name sources and outputs beyond paths and URLs:

    open_location, open_writable_location, formats.names()

Sources and outputs are local folders, repositories of the Hugging Face Hub, object stores and
(sources only) HTTP servers. Every error that a user can cause is a `GptOssStreamError`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers
    from . import formats as formats
    from .checkpoint.metadata import CheckpointInfo as CheckpointInfo
    from .checkpoint.metadata import RawTensor as RawTensor
    from .conversion import (
        Report as Report,
    )
    from .conversion import (
        convert as convert,
    )
    from .errors import (
        CheckpointError as CheckpointError,
    )
    from .errors import (
        ConfigError as ConfigError,
    )
    from .errors import (
        GptOssStreamError as GptOssStreamError,
    )
    from .errors import (
        HeaderError as HeaderError,
    )
    from .errors import (
        MachineError as MachineError,
    )
    from .errors import (
        MissingPackageError as MissingPackageError,
    )
    from .errors import (
        OptionError as OptionError,
    )
    from .errors import (
        OutputError as OutputError,
    )
    from .errors import (
        TensorError as TensorError,
    )
    from .loading.hooked_transformer import load_hooked_transformer as load_hooked_transformer
    from .loading.state_dict import (
        StateDict as StateDict,
    )
    from .loading.state_dict import (
        open_state_dict as open_state_dict,
    )
    from .model.config import ModelConfig as ModelConfig
    from .model.selection import (
        ResolvedSelection as ResolvedSelection,
    )
    from .model.selection import (
        Selection as Selection,
    )
    from .planning.plan import (
        Plan as Plan,
    )
    from .planning.plan import (
        plan as plan,
    )
    from .planning.shards import PlannedShard as PlannedShard
    from .storage.location import (
        File as File,
    )
    from .storage.location import (
        FileInfo as FileInfo,
    )
    from .storage.location import (
        Location as Location,
    )
    from .storage.location import (
        LocationLike as LocationLike,
    )
    from .storage.location import (
        WritableLocation as WritableLocation,
    )
    from .storage.open_location import (
        open_location as open_location,
    )
    from .storage.open_location import (
        open_writable_location as open_writable_location,
    )
    from .synthesis import synth as synth
    from .tensors.dtypes import DType as DType
    from .transforms.output_tensor import OutputTensor as OutputTensor
    from .verification.differences import (
        Difference as Difference,
    )
    from .verification.differences import (
        Verification as Verification,
    )
    from .verification.verify import (
        verify as verify,
    )
    from .verification.verify import (
        verify_checksums as verify_checksums,
    )

__version__ = "0.1.0"

# The module of each public name. It is imported when the name is first used, so that `--help` and
# usage errors come at once.
_MODULES = {
    "CheckpointError": "errors",
    "CheckpointInfo": "checkpoint.metadata",
    "ConfigError": "errors",
    "DType": "tensors.dtypes",
    "Difference": "verification.differences",
    "File": "storage.location",
    "FileInfo": "storage.location",
    "GptOssStreamError": "errors",
    "HeaderError": "errors",
    "Location": "storage.location",
    "LocationLike": "storage.location",
    "MachineError": "errors",
    "MissingPackageError": "errors",
    "ModelConfig": "model.config",
    "OptionError": "errors",
    "OutputError": "errors",
    "OutputTensor": "transforms.output_tensor",
    "Plan": "planning.plan",
    "PlannedShard": "planning.shards",
    "RawTensor": "checkpoint.metadata",
    "Report": "conversion",
    "ResolvedSelection": "model.selection",
    "Selection": "model.selection",
    "StateDict": "loading.state_dict",
    "TensorError": "errors",
    "Verification": "verification.differences",
    "WritableLocation": "storage.location",
    "convert": "conversion",
    "formats": "",
    "load_hooked_transformer": "loading.hooked_transformer",
    "open_location": "storage.open_location",
    "open_state_dict": "loading.state_dict",
    "open_writable_location": "storage.open_location",
    "plan": "planning.plan",
    "synth": "synthesis",
    "verify": "verification.verify",
    "verify_checksums": "verification.verify",
}

__all__ = ["__version__", *_MODULES]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "formats":
        return import_module(f"{__name__}.formats")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
