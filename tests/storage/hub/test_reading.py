"""Reading from the Hub: the bytes are right and each is sent once."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hub_cases import NAME, RECORD, SIZE, finished, python, small_nbytes
from runs import assert_clean_error
from stand_in_hub import Fault, Request, StandInHub, first


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return done.stderr.splitlines()


@pytest.mark.parametrize(
    ("source", "options", "folder", "at"),
    [
        (NAME, [], "main", ""),
        (NAME, ["--subfolder", "original"], "original", "/original"),
        (f"hf://{NAME}/original", [], "original", "/original"),
        (NAME, ["--revision", "next"], "next", ""),
        (f"hf://{NAME}@next", [], "next", ""),
        (f"hf://{NAME}@COMMIT/in/it", [], "in it", "/in/it"),
    ],
)
def test_the_output_is_the_same_as_from_a_local_folder(
    source, options, folder, at, hub, cli, released, another, whole, tmp_path
):
    first_commit = hub.add_folder(NAME, released)
    files = {f.relative_to(another).as_posix(): f for f in another.rglob("*") if f.is_file()}
    inner = {f"in/it/{name}": file for name, file in files.items()}
    next_commit = hub.add_repo(NAME, files | inner, branch="next")
    commit = first_commit if folder in ("main", "original") else next_commit
    local = {"main": released, "original": released / "original"}.get(folder, another)
    options = [option.replace("COMMIT", commit) for option in options]
    done = cli("convert", source.replace("COMMIT", commit), "out", *SIZE, *options)
    assert done.returncode == 0, done.stderr
    assert lines(done) == [f"gptoss_stream: reading hf://{NAME}@{commit[:12]}{at}"]
    assert finished(tmp_path / "out") == whole(local)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 4
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["source"] == f"hf://{NAME}@{commit}{at}"


def test_the_command_as_a_user_runs_it(hub, released, whole, tmp_path):
    """From a fresh interpreter, with no setting changed."""
    commit = hub.add_folder(NAME, released)
    from_hub = f"gptoss_stream: reading hf://{NAME}@{commit[:12]}\n"
    for words, said in (
        (["inspect", NAME], "hf-mxfp4"),
        (["convert", NAME, "out", *SIZE], "90 tensors"),
        (["verify", NAME, "out"], "out: equal"),
    ):
        done = python(hub, tmp_path, "-m", "gptoss_stream", *words)
        assert (done.returncode, done.stderr) == (0, from_hub)
        assert said in done.stdout
    assert finished(tmp_path / "out") == whole(released)


def test_a_local_folder_has_priority(hub, cli, another, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    shutil.copytree(another, tmp_path / NAME)
    done = cli("convert", NAME, "out", *SIZE)
    assert done.returncode == 0
    assert lines(done) == [
        f"gptoss_stream: reading the local folder {NAME}, not a repository of that name"
    ]
    assert finished(tmp_path / "out") == whole(another)
    assert hub.requests == []
    refused = cli("convert", NAME, "out2", "--revision", "main")
    assert_clean_error(refused, 2)
    assert "--revision is only for a repository of the Hub" in refused.stderr
    assert cli("convert", f"hf://{NAME}", "out3", *SIZE).returncode == 0
    assert finished(tmp_path / "out3") == whole(released)


def header_nbytes(folder: Path) -> int:
    return sum(
        8 + int.from_bytes(shard.read_bytes()[:8], "little")
        for shard in folder.glob("*.safetensors")
    )


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ([], 1),
        (["--layers", "1", "--only", "experts"], 0.4),
        (["--only", "router", "--only", "norms"], 0.02),
    ],
)
def test_needed_bytes_are_read_once(options, share, hub, cli, released, tmp_path):
    hub.add_folder(NAME, released)
    done = cli("convert", NAME, "out", *SIZE, *options, "--json")
    assert done.returncode == 0
    needed = json.loads(done.stdout)["bytes_in"]
    weights = sum(file.stat().st_size for file in released.glob("*.safetensors"))
    assert needed <= share * weights
    headers, small = header_nbytes(released), small_nbytes(released)
    assert needed <= hub.bytes_sent - headers <= 1.02 * needed + small
    assert_no_byte_twice(hub, released)


def assert_no_byte_twice(hub: StandInHub, folder: Path) -> None:
    """Except the first bytes of each file, which contain the length of its header."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for request in hub.requests:
        if request.origin == "cdn":
            assert request.range is not None, "a whole shard was requested"
            begin, last = request.range.removeprefix("bytes=").split("-")
            if begin != "0":
                ranges.setdefault(request.path, []).append((int(begin), int(last)))
    assert len(ranges) == len(list(folder.glob("*.safetensors")))
    for found in ranges.values():
        found.sort()
        assert all(one[1] < other[0] for one, other in itertools.pairwise(found))
    small = [r.path for r in hub.requests if r.origin == "hub" and r.method == "GET"]
    assert len(small) == len(set(small))


def is_of_a_block(request: Request) -> bool:
    """Return whether data was requested, and not a header."""
    return request.origin == "cdn" and len(request.range or "") > len("bytes=8-99999")


def test_large_blocks_are_read_once(hub, tmp_path, checkpoints, whole):
    """Blocks of the default size, up to 16 MiB. A block that breaks off is resumed, and less than a
    MiB is sent twice."""
    source = checkpoints(layers=1, vocab_size=160_000, hidden_size=64)
    hub.add_folder(NAME, source)
    breaks = 2
    hub.faults.append(first(breaks, Fault("drop_after", 5_500_000), is_of_a_block))
    options = ["--max-shard-size", "30MB", "--json"]
    done = python(hub, tmp_path, "-m", "gptoss_stream", "convert", NAME, "out", *options)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(source, *options[:2])
    needed = json.loads(done.stdout)["bytes_in"]
    assert 35_000_000 < needed <= hub.bytes_sent <= 1.02 * needed + breaks * (1 << 20)
    blocks = [request for request in hub.requests if is_of_a_block(request)]
    assert 3 + breaks <= len(blocks) <= 6 + breaks
