"""The state of a run: what identifies it, and the files that it writes.

While a run is unfinished its output holds the state as `.gptoss_stream/run.json`, afterwards as the
record `gptoss_stream.json`. A state is a JSON object: the run's identity (`planning.run_identity`),
whether checksums are written, and `files`, the names of all files that the run writes. The keys
`schema` (see `strict_json.SCHEMA`), `source`, `reference`, `adapters`, `listings`, and keys that
follow from others, identify no run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from .._utils import strict_json
from .._utils.messages import listed, short_repr
from .._utils.temporary_file import is_leftover
from ..checkpoint.small_files import RECORD_NAME
from ..checkpoint.source_card import CARD_NAME
from ..errors import OutputError
from ..storage.location import Location
from ..tensors.safetensors_header import INDEX_NAME

__all__ = [
    "RECORD_NAME",
    "RUN_NAME",
    "WORK_NAME",
    "check_schema",
    "differences",
    "fingerprint",
    "holds_run",
    "parse_state",
    "refuse_foreign_files",
    "refuse_other_run",
    "refuse_unfinished",
]

WORK_NAME = ".gptoss_stream"
RUN_NAME = f"{WORK_NAME}/run.json"
_HASH = re.compile(r"[0-9a-f]{64}")
_DERIVED = ("plan", "files", "unused")  # named only if nothing else differs
_IDENTIFY_NOTHING = (
    "schema",
    "source",
    "reference",
    "adapters",
    "listings",
)  # the same files under another path are the same


def holds_run(location: Location) -> bool:
    """Return whether an output says that a run on it is not done."""
    # Only a local folder can be there without a file in it.
    return location.has(WORK_NAME if location.is_local else RUN_NAME)


def refuse_unfinished(location: Location) -> None:
    """Refuse an output whose run has not finished: the index is its last file.

    Raises:
        OutputError: For an unfinished output.
        OSError: If reading a local folder fails.
    """
    if not location.has(INDEX_NAME) and holds_run(location):
        raise OutputError(f"{location}: an unfinished conversion; run the same convert again")


def check_schema(record: Mapping[str, Any], where: str) -> None:
    """Refuse a file of another version of this tool that this one cannot read.

    Args:
        record: What is in it. Versions that wrote no `schema` are read.
        where: What messages call the file.

    Raises:
        OutputError: For another `schema`.
    """
    found = record.get("schema", strict_json.SCHEMA)
    if found != strict_json.SCHEMA:
        raise OutputError(
            f"{where}: written by another version of gptoss_stream (schema {short_repr(found)}, "
            f"this version reads {strict_json.SCHEMA}); use that version, or name another output"
        )


def parse_state(data: bytes, where: str) -> dict[str, Any]:
    """Parse the text of a state.

    Args:
        data: The text.
        where: What messages call the file.

    Raises:
        OutputError: If it names no files, or files outside the output, or has another schema.
    """
    try:
        state = strict_json.loads(data)
        names = [PurePosixPath(name) for name in state["files"]]
        if not names or any(".." in name.parts or name.is_absolute() for name in names):
            raise ValueError("a file outside the folder")
    except (ValueError, TypeError, KeyError):
        raise OutputError(
            f"{where}: damaged, so that it is not clear which files are the tool's; "
            "delete the folder yourself or name another output"
        ) from None
    check_schema(state, where)
    return dict(state)


def fingerprint(state: Mapping[str, Any]) -> str:
    """Return a hash that differs for different states."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def refuse_foreign_files(where: str, found: Iterable[str], state: Mapping[str, Any] | None) -> None:
    """Refuse an output with files that no run of this tool wrote, but for a model card.

    Args:
        where: What messages call the output.
        found: The names in it.
        state: The state of the run that wrote it, if any.

    Raises:
        OutputError: Naming the foreign files.
    """
    files = state["files"] if state else ()
    own = {WORK_NAME, CARD_NAME, *(str(name).split("/")[0] for name in files)}
    names = {name.split("/")[0] for name in found if not is_leftover(name)}
    foreign = sorted(names - own)
    if foreign:
        raise OutputError(
            f"{where}: it holds files that are not this tool's ({listed(foreign)}); "
            "name an empty or new folder"
        )


def refuse_other_run(
    where: str, found: Mapping[str, Any], state: Mapping[str, Any], *, unfinished: bool
) -> None:
    """Refuse an output that belongs to another run.

    Args:
        where: What messages call the output.
        found: The state in the output.
        state: The state of this run.
        unfinished: Whether the other run is unfinished.

    Raises:
        OutputError: Saying what differs.
    """
    differing = list(differences(found, state))
    is_converted = "source_format" in found
    if differing and is_converted != ("source_format" in state):
        raise OutputError(
            f"{where}: it holds {'a conversion' if is_converted else 'what synth has written'}; "
            "name another output, or add --overwrite to replace it"
        )
    if differing:
        raise OutputError(
            f"{where}: it holds {'an unfinished' if unfinished else 'a finished'} run "
            f"that differs in {'; '.join(differing)}; "
            f"{'repeat that run to resume it, ' if unfinished else ''}"
            "add --overwrite to replace it, or name another output"
        )


def differences(found: Mapping[str, Any], state: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs between the state that was found and that of this run, with both values
    where they are short."""
    differing = [key for key in {**state, **found} if found.get(key) != state.get(key)]
    causes = [key for key in differing if key not in (*_IDENTIFY_NOTHING, *_DERIVED)]
    for key in causes or [key for key in differing if key not in _IDENTIFY_NOTHING]:
        old, new = found.get(key), state.get(key)
        if isinstance(old, dict) or isinstance(new, dict):
            yield f"{key} ({listed(_differing_names(old, new))})"
        elif isinstance(old, list) and isinstance(new, list):
            yield f"{key} ({listed(sorted({*map(str, old)} ^ {*map(str, new)}))})"
        elif _HASH.fullmatch(str(old)) or _HASH.fullmatch(str(new)):
            yield key
        else:
            yield f"{key} (was {str(old)[:24]}, now {str(new)[:24]})"


def _differing_names(old: Any, new: Any) -> list[str]:
    """Return what differs between two objects of a state, of which one may be absent.

    Of objects in both of them, also what differs in these: "adapter 1: scale".
    """
    one, other = (value if isinstance(value, dict) else {} for value in (old, new))
    names = []
    for name in sorted({**one, **other}):
        values = one.get(name), other.get(name)
        if values[0] != values[1]:
            inner = _differing_names(*values) if all(isinstance(v, dict) for v in values) else []
            names.append(f"{name}: {' and '.join(inner)}" if inner else name)
    return names
