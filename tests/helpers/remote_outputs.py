"""Remote outputs that are verified: what may be wrong with one, and which bytes are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from loopback import Request
from runs import INDEX_NAME, WORK_NAME

UNFINISHED = "an unfinished conversion; run the same convert again"
RECORD = "gptoss_stream.json"
NOT_READ = {"SHA256SUMS", "README.md"}
"""Files that a comparison with the source does not need."""


def first_shard(output: Path) -> Path:
    return min(output.glob("*.safetensors"))


def flip(file: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def add_shard(output: Path) -> None:
    shutil.copy(first_shard(output), output / "more.safetensors")


DAMAGES = {
    "a flipped byte": (lambda o: flip(first_shard(o)), "value: "),
    "a missing shard": (lambda o: first_shard(o).unlink(), "missing: "),
    "another config.json": (lambda o: flip(o / "tl_config.json"), "file: tl_config.json"),
    "no record": (lambda o: (o / RECORD).unlink(), f"missing: {RECORD}"),
    "an extra shard": (add_shard, "more.safetensors, a second time"),
}


def make_unfinished(output: Path) -> None:
    """Leave what a run that was killed after its first shards leaves in a remote location."""
    (output / WORK_NAME).mkdir()
    (output / RECORD).rename(output / WORK_NAME / "run.json")
    (output / INDEX_NAME).unlink()
    max(output.glob("*.safetensors")).unlink()


def header_end(shard: Path) -> int:
    """Return where the data of a shard begins."""
    return 8 + int.from_bytes(shard.read_bytes()[:8], "little")


def assert_read_once(requests: Iterable[Request], folder: Path) -> None:
    """Check that every byte of every file of an output was sent, and none twice.

    But for the first bytes of a shard, which say how long its header is.
    """
    sent: dict[str, list[tuple[int, int]]] = {}
    for request in requests:
        if request.method == "GET" and (folder / request.name).is_file():
            found = request.headers.get("range", "").removeprefix("bytes=")
            nbytes = (folder / request.name).stat().st_size
            begin, last = map(int, found.split("-")) if found else (0, nbytes - 1)
            sent.setdefault(request.name, []).append((begin, last + 1))
    assert_covered(sent, folder)


def assert_covered(sent: dict[str, list[tuple[int, int]]], folder: Path) -> None:
    """Check that byte ranges are all of an output's files, each byte once (`assert_read_once`)."""
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    assert {*sent} == files - NOT_READ
    for name, found in sent.items():
        ranges = sorted(found)
        if name.endswith(".safetensors"):
            assert [begin for begin, _ in ranges[:2]] == [0, 8]
            assert ranges[1][1] == header_end(folder / name)
            ranges[:2] = [(0, header_end(folder / name))]
        assert ranges[0][0] == 0, name
        assert ranges[-1][1] == (folder / name).stat().st_size, name
        assert all(one[1] == other[0] for one, other in pairwise(ranges)), (name, ranges)


def result_of(printed: str) -> dict:
    return dict(json.loads(printed))
