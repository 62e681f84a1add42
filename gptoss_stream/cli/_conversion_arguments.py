"""The arguments of the library's `plan` and `convert` that options stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._utils.paths import user_path
from ..errors import OptionError
from ._command import Arguments
from ._locations import parse_selection
from ._pruning_options import parse_keep_experts

__all__ = ["conversion_arguments", "refuse_swapped"]


def conversion_arguments(arguments: Arguments) -> dict[str, Any]:
    """Return the arguments that need no location, so that they are checked before one is opened.

    Raises:
        OptionError: For a value that cannot be used.
    """
    from ..planning.shards import DEFAULT_SHARD_SIZE

    return {
        "to": arguments.to,
        "source_format": arguments.source_format,
        "dtype": arguments.dtype,
        "max_shard_size": arguments.max_shard_size or DEFAULT_SHARD_SIZE,
        "selection": parse_selection(arguments),
        "mxfp4_rule": arguments.mxfp4_rule,
        "keep_layers": arguments.keep_layers,
        "keep_experts": parse_keep_experts(arguments),
        "merge_like_peft": bool(arguments.merge_like_peft),
    }


def refuse_swapped(source: str, output: str) -> None:
    """Refuse a SOURCE and an OUTPUT that are probably the other way round.

    Raises:
        OptionError: If OUTPUT is a checkpoint that this tool did not write, and SOURCE is none or
            an output of this tool.
    """
    from ..loading.output_info import read_output_info
    from ..storage.local_folder import LocalFolder
    from ..writing.run_state import RECORD_NAME, WORK_NAME

    if "://" in source or "://" in output:
        return
    one, other = user_path(source), user_path(output)
    if not _has(other, "config.json", "tl_config.json") or _has(other, RECORD_NAME, WORK_NAME):
        return
    if not one.exists():
        why = "does not exist"
    elif info := read_output_info(LocalFolder(one)):
        why = f"is already a converted output ({info.format})"
    else:
        return
    raise OptionError(
        f"{source} {why}, and {output} is a checkpoint that this tool did not write; did you swap "
        "SOURCE and OUTPUT?"
    )


def _has(folder: Path, *names: str) -> bool:
    """Return whether a folder has one of these."""
    return any((folder / name).exists() for name in names)
