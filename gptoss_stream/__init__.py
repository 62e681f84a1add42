"""Rewrite gpt-oss checkpoints into the format that other code loads, in little memory.

Data flows one way:

    places/      where files are: a folder here, a repository of the Hub, a bucket, a web server
    checkpoint   a checkpoint's files, opened: headers checked, tensors described, rows read
    streaming    the same of one that is far away: each block read once, ahead of its use
    formats/     how each checkpoint format stores the model's tensors: read and written
    mapping      what each tensor of one format is made of in another
    planner      both together: every shard, tensor, shape and size, before any data moves
    executor     makes the plan's shards, segment by segment, in bounded memory
    output       a folder from empty, or where an earlier run stopped, to finished
    remote_output  the same of a store: shard by shard through a staging folder
    jobs         a conversion in words that travel, and a shard of it made where they arrive
    cluster      shards made on the workers of a Dask cluster
    converter    plans and makes the output
    verifier     makes the output again and compares
    converted    what a converted folder is
    state_dict   a converted folder as a mapping to tensors, on the disk until they are touched
    hooked       a HookedTransformer made of these

and on the way: `safetensors_format` headers and index, `strict_json`, `dtypes`, `model` the model's
numbers and tensors, `tables` what the formats' tables are made of, `selection` which tensors are
wanted, `operands`, `patterns` and `recipe` an output tensor as a recipe, `mxfp4` and `cast` values,
`workers` threads, `blocks` what they read of far files, `shard_file`, `scratch` and `run_folder`
files being written, `run_state` what a run is, `far_folder` and `uploads` a store being written to,
`checksums` of files, `second_reader` a check by safetensors, `companions` small files beside them,
`regular_file`, `plugins` the formats there are, `memory` what there is of it, `errors`,
`synthesis` random checkpoints, `share` a task's part of a run, `examples`, `cli` the command line.

    >>> import gptoss_stream
    >>> report = gptoss_stream.convert("gpt-oss-20b", "gpt-oss-20b-tl")  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import formats
    from .conversion import Report, convert
    from .errors import GptOssStreamError
    from .loading.hooked_transformer import load_hooked_transformer
    from .loading.state_dict import StateDict, open_state_dict
    from .model.selection import Selection
    from .planning.plan import Plan, plan
    from .storage.open_location import open_location, open_writable_location
    from .synthesis import synth
    from .verification.differences import Difference, Verification
    from .verification.verify import verify, verify_checksums

__version__ = "0.1.0"

__all__ = [
    "Difference",
    "GptOssStreamError",
    "Plan",
    "Report",
    "Selection",
    "StateDict",
    "Verification",
    "__version__",
    "convert",
    "formats",
    "load_hooked_transformer",
    "open_location",
    "open_state_dict",
    "open_writable_location",
    "plan",
    "synth",
    "verify",
    "verify_checksums",
]

# Imported when first used, so that `--help` and usage errors come at once.
_HOMES = {
    "Difference": "verification.differences",
    "Verification": "verification.differences",
    "verify": "verification.verify",
    "verify_checksums": "verification.verify",
    "GptOssStreamError": "errors",
    "Plan": "planning.plan",
    "Report": "conversion",
    "Selection": "model.selection",
    "StateDict": "loading.state_dict",
    "convert": "conversion",
    "load_hooked_transformer": "loading.hooked_transformer",
    "open_location": "storage.open_location",
    "open_writable_location": "storage.open_location",
    "open_state_dict": "loading.state_dict",
    "plan": "planning.plan",
    "synth": "synthesis",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name == "formats":
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
