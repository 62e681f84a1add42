"""A journal that lies is not believed: all of the shard is made again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from killed_runs import CHUNK, JOURNAL, SHARD, child, killed_at, small_chunks, written
from runs import WORK_NAME, assert_clean_error, digests, run_in_process

import gptoss_stream

__all__ = ["small_chunks", "written"]


def edited(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change a journal's content, with its checksum as it was."""

    def edit(out: Path) -> None:
        content = json.loads((out / JOURNAL).read_text())
        change(content)
        (out / JOURNAL).write_text(json.dumps(content))

    return edit


def rewritten(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change a journal's content, with the checksum that it should have then."""

    def edit(out: Path) -> None:
        from gptoss_stream.writing.shard_journal import _digest

        content = json.loads((out / JOURNAL).read_text())
        del content["sha256"]
        change(content)
        (out / JOURNAL).write_text(json.dumps({**content, "sha256": _digest(content)}))

    return edit


def copied(kept: Path, out: Path) -> None:
    """Copy a killed run, so that its journal is believed."""
    shutil.copytree(kept, out)
    names = {file.stat().st_ino: file.name for file in (kept / WORK_NAME).iterdir()}

    def name(content: dict) -> None:
        files = [out / WORK_NAME / names[inode] for inode in content["inodes"]]
        content["inodes"] = [file.stat().st_ino for file in files]

    rewritten(name)(out)


def of_an_empty_file(out: Path) -> None:
    os.truncate(out / WORK_NAME / SHARD, 0)


def of_a_shorter_file(out: Path) -> None:
    os.truncate(out / WORK_NAME / SHARD, json.loads((out / JOURNAL).read_text())["written"] - 1)


def without_scales(out: Path) -> None:
    files = [*(out / WORK_NAME).glob("*.scales-*")]
    assert files
    for file in files:
        file.unlink()


def linked(link: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """Replace the partial file by a link to a file outside."""

    def replace(out: Path) -> None:
        file, outside = out / WORK_NAME / SHARD, out.with_name("outside")
        shutil.copy(file, outside)
        file.unlink()
        link(file, outside)
        inode = file.lstat().st_ino
        rewritten(lambda j: j.update(inodes=[inode, *j["inodes"][1:]]))(out)

    return replace


LIES = {
    "more is written": edited(lambda j: j.update(written=j["written"] + CHUNK)),
    "less is written": edited(lambda j: j.update(written=j["written"] - CHUNK)),
    "another run": rewritten(lambda j: j.update(run="0" * 64)),
    "another shard": rewritten(lambda j: j.update(header="0" * 64)),
    "another chunk": rewritten(lambda j: j.update(chunk=4096)),
    "no whole chunk": rewritten(lambda j: j.update(written=j["written"] - 1)),
    "more than the shard": rewritten(lambda j: j.update(written=1 << 40)),
    "a negative size": rewritten(lambda j: j.update(written=-CHUNK)),
    "a size that is no number": rewritten(lambda j: j.update(written="all")),
    "losses that are none": rewritten(lambda j: j.update(losses={"x": {"blocks": -1}})),
    "something more": rewritten(lambda j: j.update(version=2)),
    "no JSON": lambda out: (out / JOURNAL).write_bytes(b"\0" * 100),
    "an empty journal": lambda out: os.truncate(out / JOURNAL, 0),
    "of an empty file": of_an_empty_file,
    "of a shorter file": of_a_shorter_file,
    "without its scales": without_scales,
    "a symbolic link": linked(lambda file, outside: file.symlink_to(outside)),
    "a hard link": linked(lambda file, outside: file.hardlink_to(outside)),
}


@pytest.fixture(scope="module")
def killed(checkpoints, tmp_path_factory):
    """A killed run that encodes, with scales in a spill file, and what it should have written."""
    folder = checkpoints(format="hf", layers=2)
    kept = tmp_path_factory.mktemp("killed")
    command = ("convert", folder, "out", "--to", "hf-mxfp4", "--workers=1")
    done = child("", *command[:2], kept / "whole", *command[3:])
    assert done.returncode == 0, done.stderr
    [shard] = gptoss_stream.plan(folder, to="hf-mxfp4").shards
    blocks, scales = max(shard.encoded_pairs(), key=lambda pair: pair[0].nbytes)
    middle = (shard.begin_of(blocks) + shard.begin_of(scales)) // 2
    killed_at(middle // CHUNK + 1, *command[:2], kept / "out", *command[3:])
    assert shard.begin_of(blocks) < middle // CHUNK * CHUNK <= middle < shard.begin_of(scales)
    return command, kept, digests(kept / "whole")


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_journal_that_lies_is_not_believed(lie, killed, tmp_path, written):
    """All of the shard is made again, and nothing outside the folder changes."""
    command, kept, whole = killed
    out = tmp_path / "out"
    copied(kept / "out", out)
    lie(out)
    outside = digests(tmp_path, "outside")
    done = run_in_process(*command[:2], out, *command[3:])
    assert done.returncode == 0, done.stderr
    assert min(written) == 0
    assert digests(out) == whole
    assert digests(tmp_path, "outside") == outside


def test_a_journal_with_any_bit_flipped_is_not_believed(killed, tmp_path, written):
    """Its own checksum does not match then. Without a flip it is believed: the control."""
    command, kept, whole = killed
    out, random = tmp_path / "out", Random(1)
    for number in range(7):
        copied(kept / "out", out)
        text = (out / JOURNAL).read_bytes()
        flipped = bytearray(text)
        if number:
            flipped[random.randrange(len(text))] ^= 1 << random.randrange(7)
        (out / JOURNAL).write_bytes(flipped)
        written.clear()
        assert run_in_process(*command[:2], out, *command[3:]).returncode == 0
        same = json_of(flipped) == json_of(text)
        assert (min(written) > 0) == same
        assert same or number
        assert digests(out) == whole
        shutil.rmtree(out)


def test_a_journal_beside_copies_is_not_believed(killed, tmp_path, written):
    """A copy of a running folder may have a spill file that is older than its journal."""
    command, kept, whole = killed
    for number in (0, 1):
        out = tmp_path / "out"
        copied(kept / "out", out)
        inode = json.loads((out / JOURNAL).read_text())["inodes"][number]
        [file] = [f for f in (out / WORK_NAME).iterdir() if f.stat().st_ino == inode]
        shutil.copy(file, tmp_path / "copy")
        (tmp_path / "copy").replace(file)
        written.clear()
        assert run_in_process(*command[:2], out, *command[3:]).returncode == 0
        assert min(written) == 0
        assert digests(out) == whole
        shutil.rmtree(out)


def json_of(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_another_source_is_refused_and_another_command_begins_anew(killed, tmp_path, written):
    """The run's state differs, before any journal is read."""
    command, kept, _ = killed
    out = tmp_path / "out"
    copied(kept / "out", out)
    done = run_in_process(*command[:2], out, *command[3:], "--dtype", "float32")
    assert_clean_error(done, 2)
    done = run_in_process("convert", command[1], out, "--to", "hf", "--overwrite", "--quiet")
    assert done.returncode == 0, done.stderr
    assert min(written) == 0
    assert not (out / WORK_NAME).exists()
