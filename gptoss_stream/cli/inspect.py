"""The command `inspect`: describe a checkpoint or a converted output, or compare two of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._utils.messages import counted, listed, sized
from ._adapter_page import print_adapter
from ._command import Arguments, command, option
from ._comparison import print_comparison
from ._locations import open_source
from ._options import json_option, remote_source_options, source_argument, source_format_option
from ._printing import (
    describe_format,
    describe_model,
    describe_selection,
    print_json,
    print_tensors,
)
from ._tensor_kinds import print_kinds
from ._values import PATH

if TYPE_CHECKING:
    from ..checkpoint.metadata import CheckpointInfo
    from ..formats import SourceModel
    from ..loading.output_info import OutputInfo
    from ..storage.location import Location

__all__ = ["inspect"]


@command(
    "inspect",
    short_help="describe a checkpoint, converted output or adapter, or compare with another",
    description="Describe a checkpoint or a converted output: its format, model and kinds of "
    "tensors. Describe a LoRA adapter: its kind, rank, targets, layers, and how it is read. "
    "Or, with --against, compare a few values of each tensor with those of another checkpoint: "
    "this finds what no shape shows, such as square matrices that are transposed. The exit "
    "code is 1 if all tensors of a kind are transposed, or have gate and up in another order.",
    examples=(
        "openai/gpt-oss-20b",
        "gpt-oss-20b-tl --tensors",
        "fine-tune --against openai/gpt-oss-20b",
    ),
)
@source_argument("checkpoint, converted output or LoRA adapter")
@source_format_option
@option("--tensors", is_flag=True, help="list every tensor instead of the kinds of tensors")
@option(
    "--against",
    type=PATH,
    metavar="REFERENCE",
    help="checkpoint of the same model, or of the model that SOURCE was trained from, in any "
    "format: a folder, a Hub repository or a URL",
)
@json_option
@remote_source_options()
def inspect(arguments: Arguments) -> int:
    """Run the command; return the exit code."""
    if arguments.against is not None:
        return _compare(arguments)
    from ..adapters import is_adapter
    from ..loading.output_info import read_output_info

    location = open_source(arguments)
    if is_adapter(location):
        _inspect_adapter(location, arguments)
        return 0
    output = read_output_info(location)
    if output is None:
        _inspect_checkpoint(location, arguments)
    elif arguments.json:
        print_json(output.as_dict())
    else:
        _print_output(output, arguments)
    return 0


def _compare(arguments: Arguments) -> int:
    """Compare SOURCE with REFERENCE; return the exit code, which is 1 for rearranged tensors."""
    from ..storage.open_location import is_repository
    from ..verification.compare import compare

    reference = Arguments(
        **{**vars(arguments), "source": arguments.against, "revision": None, "subfolder": None}
    )
    if not is_repository(arguments.against):
        reference.token = None
    elif not is_repository(arguments.source):
        arguments.token = None  # it is for the reference
    result = compare(
        open_source(arguments),
        open_source(reference),
        source_format=arguments.source_format,
    )
    if arguments.json:
        print_json(result.as_dict())
    else:
        print_comparison(result)
    return 1 if result.rearranged else 0


def _inspect_adapter(location: Location, arguments: Arguments) -> None:
    """Read a LoRA adapter and print what it is."""
    from ..adapters import Adapter, describe, read_adapter

    found = describe(read_adapter(Adapter(location)))
    if arguments.json:
        print_json(found)
    else:
        print_adapter(found)


def _inspect_checkpoint(location: Location, arguments: Arguments) -> None:
    """Read the metadata of a checkpoint and print them."""
    from ..checkpoint.metadata import read_metadata
    from ..formats import read_source

    info = read_metadata(location)
    source = read_source(info, arguments.source_format)
    if arguments.json:
        print_json(_checkpoint_as_dict(info, source))
        return
    total = sum(raw.nbytes for raw in info.tensors.values())
    print(
        f"{info.location}: {source.name} ({source.detected_by})\n"
        f"{describe_model(source.model)}\n"
        f"{counted(len(info.tensors), 'tensor')}, {sized(total)} in "
        f"{counted(len(info.shards), 'shard')}"
    )
    for note in source.notes:
        print(f"note: {note}")
    if arguments.tensors:
        print_tensors(info.tensors)
    else:
        print_kinds(source.info.tensors, source.table)


def _checkpoint_as_dict(info: CheckpointInfo, source: SourceModel) -> dict[str, Any]:
    """Return a checkpoint's metadata as JSON types; sizes and offsets are in bytes."""
    return {
        "path": str(info.location),
        "format": source.name,
        "detected_by": source.detected_by,
        "notes": list(source.notes),
        "model": source.model.dimensions,
        "config": dict(info.config),
        "shards": {shard.name: shard.nbytes for shard in info.shards},
        "tensors": {
            raw.name: {
                "dtype": raw.dtype.code,
                "shape": list(raw.shape),
                "shard": raw.shard,
                "offset": raw.offset,
                "bytes": raw.nbytes,
            }
            for raw in info.tensors.values()
        },
    }


def _print_output(info: OutputInfo, arguments: Arguments) -> None:
    """Print what a converted output is, where it comes from, and whether it is complete."""
    from .. import formats

    if info.complete:
        state = "complete"
    else:
        state = "incomplete" if info.finished else "unfinished"
        if info.missing:
            state += f", {listed(info.missing)} missing"
        state += "; run the same convert command again"
    total = sum(raw.nbytes for raw in info.tensors.values())
    shards = {raw.shard for raw in info.tensors.values()}
    merged = "".join(f"merged {adapter}\n" for adapter in info.adapters)
    print(
        f"{info.path}: converted, {describe_format(info.format, info.dtype)}"
        f"{describe_selection(info.selection)}\n"
        f"from {info.source} ({info.source_format}) by gptoss_stream {info.version}\n"
        f"{merged}"
        f"{counted(len(info.tensors), 'tensor')}, {sized(total)} in "
        f"{counted(len(shards), 'shard')}: {state}"
    )
    if arguments.tensors:
        print_tensors(info.tensors)
    else:
        print_kinds(info.tensors, formats.load(info.format).TABLE)
