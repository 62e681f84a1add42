"""What a run is, as its output tells: in `.gptoss_stream/run.json` while it is under way, in the
record `gptoss_stream.json` when it is done.

A state is a JSON object: what two runs must have in common to be the same run, and `files`, all
that the run makes. `source` and what follows from other keys is only for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from .._utils import strict_json
from .._utils.messages import listed
from ..errors import OutputError

__all__ = [
    "RECORD_NAME",
    "RUN_NAME",
    "WORK_NAME",
    "differences",
    "fingerprint",
    "parse_state",
    "refuse_foreign",
    "refuse_other_run",
]


RECORD_NAME = "gptoss_stream.json"


WORK_NAME = ".gptoss_stream"


RUN_NAME = f"{WORK_NAME}/run.json"


_CONSEQUENCES = ("plan", "files", "unused")  # said only where nothing else differs


def parse_state(data: bytes, where: str) -> dict[str, Any]:
    """A state from its text; raises `OutputError` for one that names no files, or files outside
    the output."""
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
    return dict(state)


def fingerprint(state: Mapping[str, Any]) -> str:
    """What tells a state from others."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def refuse_foreign(where: str, found: Iterable[str], known: Mapping[str, Any] | None) -> None:
    """Raise `OutputError` if names in an output are not those of the run that it belongs to."""
    files = known["files"] if known else ()
    ours = {WORK_NAME, *(str(name).split("/")[0] for name in files)}
    foreign = sorted({name.split("/")[0] for name in found} - ours)
    if foreign:
        raise OutputError(
            f"{where}: it holds files that are not this tool's ({listed(foreign)}); "
            "name an empty or new folder"
        )


def refuse_other_run(
    where: str, known: Mapping[str, Any], state: Mapping[str, Any], *, unfinished: bool
) -> None:
    """Raise `OutputError`, saying what differs, if an output belongs to another run."""
    differing = list(differences(known, state))
    if differing:
        raise OutputError(
            f"{where}: it holds {'an unfinished' if unfinished else 'a finished'} run "
            f"that differs in {'; '.join(differing)}; "
            f"{'repeat that run to resume it, ' if unfinished else ''}"
            "add --overwrite to replace it, or name another output"
        )


def differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What two states differ in, with both values where these say something."""
    differing = [key for key in {**now, **known} if known.get(key) != now.get(key)]
    causes = [key for key in differing if key not in ("source", *_CONSEQUENCES)]
    for key in causes or [key for key in differing if key != "source"]:
        there, here = known.get(key), now.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            names = sorted(n for n in {**there, **here} if there.get(n) != here.get(n))
            yield f"{key} ({listed(names)})"
        elif isinstance(there, list) and isinstance(here, list):
            yield f"{key} ({listed(sorted({*map(str, there)} ^ {*map(str, here)}))})"
        else:
            yield f"{key} ({str(there)[:24]} there, {str(here)[:24]} now)"
