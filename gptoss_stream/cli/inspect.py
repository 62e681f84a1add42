"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .._utils.messages import counted, listed, sized
from .options import open_source
from .printing import format_line, model_line, print_tensors, selection_line

if TYPE_CHECKING:
    from ..checkpoint.metadata import CheckpointInfo
    from ..loading.output_info import OutputInfo

__all__ = []


def _inspect(arguments: argparse.Namespace) -> None:
    from ..checkpoint.metadata import read_metadata
    from ..formats import detect_format, load, naming_config
    from ..formats._check import read_table
    from ..loading.output_info import read_output_info
    from ..storage.local_folder import LocalFolder

    location = open_source(arguments)
    converted = read_output_info(location.path) if isinstance(location, LocalFolder) else None
    if converted is not None:
        _inspect_converted(converted, arguments.json)
        return
    info = read_metadata(location)
    name, reason = arguments.source_format, "as asked"
    if name is None:
        name, reason = detect_format(info)
    found = load(name)
    with naming_config(info):
        _, model = read_table(found.TABLE, found.read_model(info), info)
    if arguments.json:
        print(json.dumps(_info_as_dict(info, name, reason, model.dimensions), indent=2))
        return
    total = sum(raw.nbytes for raw in info.tensors.values())
    print(
        f"{info.location}: {name} ({reason})\n"
        f"{model_line(model)}\n"
        f"{counted(len(info.tensors), 'tensor')}, {sized(total)} in "
        f"{counted(len(info.shards), 'shard')}"
    )
    print_tensors(info.tensors)


def _inspect_converted(info: OutputInfo, as_json: bool) -> None:
    if as_json:
        print(json.dumps(info.as_dict(), indent=2))
        return
    state = "complete"
    if info.missing:
        state = f"{'incomplete' if info.finished else 'unfinished'}, without {listed(info.missing)}"
    elif not info.finished:
        state = "unfinished"
    if not info.complete:
        state += "; run the same convert again"
    total = sum(raw.nbytes for raw in info.tensors.values())
    shards = {raw.shard for raw in info.tensors.values()}
    print(
        f"{info.path}: converted, {format_line(info.format, info.dtype)}{selection_line(info.selection)}\n"
        f"from {info.source} ({info.source_format}) by gptoss_stream {info.version}\n"
        f"{counted(len(info.tensors), 'tensor')}, {sized(total)} in "
        f"{counted(len(shards), 'shard')}: {state}"
    )
    print_tensors(info.tensors)


def _info_as_dict(
    info: CheckpointInfo, name: str, reason: str, dimensions: dict[str, int]
) -> dict[str, Any]:
    return {
        "path": str(info.location),
        "format": name,
        "recognised_by": reason,
        "model": dimensions,
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
