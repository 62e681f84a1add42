"""Shared by the tests of the Hub: names, faults and checks."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from hub_runs import environment
from runs import INDEX_NAME, WORK_NAME, digests
from stand_in_hub import Fault, StandInHub

NAME = "openai/gpt-oss-tiny"


OUT = "tester/out"


RECORD = "gptoss_stream.json"


ADDED_BY_HUB = (".gitattributes", "README.md")


SIZE = ("--max-shard-size", "150KB")


DATA = r"cdn GET .*/lfs/"


PUT = r"cdn PUT"


COMMIT = r"hub POST .*/commit/"


AUXILIARY_FILES = {
    "tokenizer.json": b'{"version": "1.0"}' * 500,
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}


def finished(output: Path) -> dict[str, str]:
    """Return the finished files of an output, without those that say where the source was."""
    found = digests(output)
    others = (RECORD, "README.md")
    return {n: d for n, d in found.items() if n not in others and not n.startswith(f"{WORK_NAME}/")}


def assert_nothing_wrong(output: Path, whole: Mapping[str, str]) -> None:
    """Check that finished files are right, and that all exist if there is an index."""
    found = finished(output)
    assert found.items() <= whole.items(), sorted(n for n in found if found[n] != whole.get(n))
    if INDEX_NAME in found:
        assert found == whole


def python(hub: StandInHub, home: Path, *words: str, seconds: float = 60, **more: str):
    """Run a command in a new interpreter, for what it reads at its start."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=home,
        env=environment(hub.endpoint, home, **more),
    )


def small_nbytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.suffix != ".safetensors")


NOW = {"Retry-After": "0"}


def named(name: str) -> str:
    """Return the name of the repository for a case."""
    return "openai/" + re.sub(r"\W+", "-", name)


OF_LATER_DATA = (21, "cdn GET /lfs/REPO/")


OF_LATER_ADDRESSES = (2, "hub HEAD /REPO/resolve/")


LASTING = {
    "500 from the first": (Fault("status", 500), (0, "cdn GET /lfs/REPO/"), 3, "answers 500"),
    "500 of the data": (Fault("status", 500), OF_LATER_DATA, 3, "the server answers 500"),
    "403 of the data": (Fault("status", 403), OF_LATER_DATA, 3, "refuses its own signed address"),
    "404 of the data": (Fault("status", 404), OF_LATER_DATA, 2, "it does not exist (404)"),
    "416 of the data": (Fault("status", 416), OF_LATER_DATA, 2, "it is shorter than it was"),
    "an end at once": (Fault("drop_after", 0), OF_LATER_DATA, 3, "check the network"),
    "no answer": (Fault("lose_reply"), OF_LATER_DATA, 3, "check the network"),
    "half": (Fault("wrong_length"), OF_LATER_DATA, 3, "the server sends"),
    "the whole file": (Fault("ignore_range"), OF_LATER_DATA, 3, "does not honour byte ranges"),
    "other bytes": (Fault("shift_range", 1), OF_LATER_DATA, 3, "the server sends bytes"),
    "gzip": (Fault("gzip"), OF_LATER_DATA, 3, "with the coding 'gzip'"),
    "a page for the data": (Fault("html"), OF_LATER_DATA, 3, "does not honour byte ranges"),
    "503 of an address": (Fault("status", 503, NOW), OF_LATER_ADDRESSES, 3, "the Hub answers 503"),
    "404 of an address": (Fault("status", 404), OF_LATER_ADDRESSES, 2, "the Hub answers 404"),
    "403 of an address": (Fault("status", 403), OF_LATER_ADDRESSES, 2, "no access (403)"),
    "no answer for an address": (
        Fault("lose_reply"),
        OF_LATER_ADDRESSES,
        3,
        "the Hub cannot be reached",
    ),
    "a page for an address": (Fault("html"), OF_LATER_ADDRESSES, 3, "not one of the Hub"),
    "another ETag of the data": (
        Fault("wrong_etag"),
        OF_LATER_DATA,
        2,
        "it changed while it was being read",
    ),
    "no commit": (Fault("no_commit_header"), OF_LATER_ADDRESSES, 3, "it names no commit"),
    "another checksum": (
        Fault("wrong_etag"),
        OF_LATER_ADDRESSES,
        2,
        "it changed while it was being read",
    ),
    "another size": (
        Fault("wrong_size"),
        OF_LATER_ADDRESSES,
        2,
        "it changed while it was being read",
    ),
}


TOKEN = "hf_" + "Right" * 7


WRONG = "hf_" + "Wrong" * 7


def assert_no_secret(done: subprocess.CompletedProcess[str], *folders: Path) -> None:
    """Check that no token and no signature is in the output or in a file."""
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
    assert not folders or files
    for text in (done.stdout.encode(), done.stderr.encode(), *(f.read_bytes() for f in files)):
        for secret in (TOKEN, WRONG, "X-Amz"):
            assert secret.encode() not in text


MISSING_SOURCES = [
    ("openai/nothing", [], "no local folder and no repository of the Hub that you can see"),
    ("hf://openai/nothing", [], "no repository of the Hub that you can see"),
    (NAME, ["--revision", "v9"], "there is no such revision; check --revision"),
    (f"hf://{NAME}@v9", [], "there is no such revision"),
    (f"hf://{NAME}@main", ["--revision", "v9"], "it names another revision than --revision v9"),
    (NAME, ["--subfolder", "nothing"], "/nothing: there are no files in it; check the name"),
    (f"hf://{NAME}/nothing", [], "/nothing: there are no files in it"),
    (NAME, ["--subfolder", "additional_chat_templates"], "config.json: missing"),
    ("hf://datasets/openai/x", [], "name a model as hf://user/name@revision/folder"),
    ("hf://openai", [], "name a model as hf://user/name@revision/folder"),
    ("hf://", [], "name a model as hf://user/name@revision/folder"),
    ("hf://openai/x--y..z", [], "not a name that a repository can have"),
    ("openai/of-datasets", [], "config.json: missing; a checkpoint folder needs it"),
    ("openai/in-part", [], "3 of its 4 shards do not exist"),
]


def contents(hub: StandInHub, name: str = OUT) -> dict[str, str]:
    """Return the SHA-256 of each file of a repository, without the record and the Hub's own
    files."""
    found = {path: content.sha256 for path, content in hub.files(name).items()}
    return {path: digest for path, digest in found.items() if path not in (RECORD, *ADDED_BY_HUB)}


def commits(hub: StandInHub, name: str = OUT) -> list[tuple[set[str], set[str]]]:
    """Return the files that each commit added and deleted."""
    states = [set(files) for files in hub.repos[name].commits.values()]
    return [(now - before, before - now) for before, now in itertools.pairwise(states)]


def shards(hub: StandInHub, name: str = OUT) -> dict[str, int]:
    """Return the shards of a repository, with their sizes."""
    with hub.lock:
        found = hub.files(name) if name in hub.repos else {}
    return {n: content.nbytes for n, content in found.items() if n.endswith(".safetensors")}


def staged(tmp_path: Path, machine: str = "this") -> list[Path]:
    """Return the files in the staging folder of a machine."""
    return [f for f in (tmp_path / machine).rglob("*") if f.is_file()]


def requested(hub: StandInHub) -> list[str]:
    """Return origin and method of each request."""
    return [f"{request.origin} {request.method}" for request in hub.requests]


UPLOAD_FAULTS = {
    "commits that are not answered": (Fault("lose_reply"), COMMIT),
    "commits of another user": (Fault("status", 412), COMMIT),
    "503 of commits": (Fault("status", 503, NOW), COMMIT),
    "an upload that breaks off": (Fault("drop_after", 10), PUT),
    "an upload that is not answered": (Fault("lose_reply"), PUT),
    "requests before an upload that are not answered": (
        Fault("lose_reply"),
        r"POST .*(batch|preupload)",
    ),
    "503 of the listing": (Fault("status", 503), r"GET .*/tree/"),
}
