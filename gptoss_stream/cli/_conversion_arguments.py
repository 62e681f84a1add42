"""The arguments of the library's `plan` and `convert` that options stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._utils.paths import user_path
from ..errors import OptionError, OutputError
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
        OptionError: If OUTPUT is a checkpoint, and SOURCE does not exist or, unlike OUTPUT, is the
            output of a conversion.
    """
    from ..loading.output_info import read_output_info
    from ..storage.local_folder import LocalFolder
    from ..storage.open_location import is_repository

    if "://" in source or "://" in output:
        return
    one, other = user_path(source), user_path(output)
    if not any((other / name).exists() for name in ("config.json", "tl_config.json")):
        return
    why = ""
    if not one.exists() and not is_repository(source):
        why = "does not exist"
    elif not _was_converted(other) and (info := read_output_info(LocalFolder(one))):
        why = f"is already a converted output ({info.format})"
    if why:
        raise OptionError(
            f"{source} {why}, and {output} is a checkpoint; did you swap SOURCE and OUTPUT?"
        )


def _was_converted(folder: Path) -> bool:
    """Return whether a folder is an output of `convert`, finished or not."""
    from ..writing.run_state import RECORD_NAME, WORK_NAME, parse_state

    file = folder / RECORD_NAME
    try:
        return (folder / WORK_NAME).exists() or (
            "source_format" in parse_state(file.read_bytes(), str(file))
        )
    except FileNotFoundError:
        return False
    except (OSError, OutputError):
        return True  # what is wrong with it is said later
