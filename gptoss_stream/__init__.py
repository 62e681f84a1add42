"""Convert gpt-oss checkpoints between formats, in little memory.

    >>> import gptoss_stream
    >>> gptoss_stream.convert("gpt-oss-20b", "gpt-oss-20b-tl")  # doctest: +SKIP

Convert and check:

    plan              what a conversion would write: shards, tensors, shapes, sizes
    convert           convert a checkpoint; resumes an interrupted run
    verify            compare an output with its source, byte for byte
    verify_checksums  check the files of an output against its SHA256SUMS
    compare           compare a few values of each tensor with those of another checkpoint
    synth             write a random checkpoint, to try things with
    synth_adapter     write a random LoRA adapter for such a checkpoint

LoRA adapters are merged on the way (`adapters=`): name their locations, or an `Adapter` that says
more.

Use a checkpoint without converting it:

    open_state_dict          tensors by name, in any format
    load_hooked_transformer  a TransformerLens model whose weights stay in the checkpoint
    load_hf_model            transformers' own model, likewise

Name sources and outputs beyond paths and URLs:

    open_location, open_writable_location, formats.names()

Arguments are taken as you have them: layers and experts as texts, numbers or ranges
(`NumbersLike`, `ExpertsLike`), dtypes by name or as torch has them (`DTypeLike`), selections as
dicts (`SelectionLike`), locations as paths, URLs or repositories (`LocationLike`, `AdapterLike`).

Sources and outputs are local folders, repositories of the Hugging Face Hub, object stores and
(sources only) HTTP servers. Every error that a user can cause is a `GptOssStreamError`. Runs are
logged by `logging`, as "gptoss_stream".
"""

from __future__ import annotations

from importlib import import_module
from logging import NullHandler, getLogger
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers
    from . import formats as formats
    from .adapters.adapter import (
        Adapter as Adapter,
        AdapterLike as AdapterLike,
    )
    from .checkpoint.metadata import CheckpointInfo as CheckpointInfo
    from .conversion import convert as convert
    from .errors import (
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        GptOssStreamError as GptOssStreamError,
        HeaderError as HeaderError,
        MachineError as MachineError,
        MissingPackageError as MissingPackageError,
        OptionError as OptionError,
        OutputError as OutputError,
        TensorError as TensorError,
        VerificationError as VerificationError,
    )
    from .inference.hf_model import load_hf_model as load_hf_model
    from .inference.hooked_transformer import load_hooked_transformer as load_hooked_transformer
    from .loading.state_dict import (
        StateDict as StateDict,
        TensorSlice as TensorSlice,
        open_state_dict as open_state_dict,
    )
    from .model.config import ModelConfig as ModelConfig
    from .model.numbers import NumbersLike as NumbersLike
    from .model.pruning import ExpertsLike as ExpertsLike
    from .model.selection import (
        ResolvedSelection as ResolvedSelection,
        Selection as Selection,
        SelectionLike as SelectionLike,
    )
    from .planning.plan import (
        Plan as Plan,
        plan as plan,
    )
    from .planning.shards import PlannedShard as PlannedShard
    from .storage.location import (
        File as File,
        FileInfo as FileInfo,
        Location as Location,
        LocationLike as LocationLike,
        WritableLocation as WritableLocation,
    )
    from .storage.open_location import (
        open_location as open_location,
        open_writable_location as open_writable_location,
    )
    from .synthesis import (
        synth as synth,
        synth_adapter as synth_adapter,
    )
    from .tensors.dtypes import (
        DType as DType,
        DTypeLike as DTypeLike,
    )
    from .tensors.raw_tensor import RawTensor as RawTensor
    from .transforms.output_tensor import OutputTensor as OutputTensor
    from .verification.compare import compare as compare
    from .verification.differences import (
        Difference as Difference,
        Verification as Verification,
    )
    from .verification.relations import (
        Comparison as Comparison,
        Relation as Relation,
    )
    from .verification.verify import (
        verify as verify,
        verify_checksums as verify_checksums,
    )
    from .writing.output_spec import Resumption as Resumption
    from .writing.report import Report as Report

__version__ = "0.1.0"

getLogger(__name__).addHandler(NullHandler())  # who uses the library decides what is shown

# The module of each public name. It is imported when the name is first used, so that `--help` and
# usage errors come at once.
_MODULES = {
    "Adapter": "adapters.adapter",
    "AdapterLike": "adapters.adapter",
    "CheckpointError": "errors",
    "CheckpointInfo": "checkpoint.metadata",
    "Comparison": "verification.relations",
    "ConfigError": "errors",
    "DType": "tensors.dtypes",
    "DTypeLike": "tensors.dtypes",
    "Difference": "verification.differences",
    "ExpertsLike": "model.pruning",
    "File": "storage.location",
    "FileInfo": "storage.location",
    "GptOssStreamError": "errors",
    "HeaderError": "errors",
    "Location": "storage.location",
    "LocationLike": "storage.location",
    "MachineError": "errors",
    "MissingPackageError": "errors",
    "ModelConfig": "model.config",
    "NumbersLike": "model.numbers",
    "OptionError": "errors",
    "OutputError": "errors",
    "OutputTensor": "transforms.output_tensor",
    "Plan": "planning.plan",
    "PlannedShard": "planning.shards",
    "RawTensor": "tensors.raw_tensor",
    "Relation": "verification.relations",
    "Report": "writing.report",
    "ResolvedSelection": "model.selection",
    "Resumption": "writing.output_spec",
    "Selection": "model.selection",
    "SelectionLike": "model.selection",
    "StateDict": "loading.state_dict",
    "TensorError": "errors",
    "TensorSlice": "loading.state_dict",
    "Verification": "verification.differences",
    "VerificationError": "errors",
    "WritableLocation": "storage.location",
    "compare": "verification.compare",
    "convert": "conversion",
    "formats": "",
    "load_hf_model": "inference.hf_model",
    "load_hooked_transformer": "inference.hooked_transformer",
    "open_location": "storage.open_location",
    "open_state_dict": "loading.state_dict",
    "open_writable_location": "storage.open_location",
    "plan": "planning.plan",
    "synth": "synthesis",
    "synth_adapter": "synthesis",
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
