"""Revisions that move between or during runs."""

from __future__ import annotations

import json
import time
from pathlib import Path

from hub_cases import DATA, NAME, RECORD, SIZE, finished
from hub_runs import after
from runs import WORK_NAME, assert_clean_error, digests
from stand_in_hub import Fault, Request, StandInHub


def stop_midway(hub: StandInHub, convert, output: Path) -> None:
    """Start a conversion, and let its source fail permanently once a shard is finished."""
    late = after(12, Fault("status", 500), DATA)

    def fail(request: Request) -> Fault | None:
        fault = late(request)
        # The first shard may need this request: then it is answered after a while.
        for _ in range(400 if fault is not None else 0):
            if any(output.glob("*.safetensors")):
                return fault
            time.sleep(0.005)
        return None

    hub.faults.append(fail)
    done = convert(NAME, output.name, "--workers", "1")
    assert_clean_error(done, 3)
    hub.faults.clear()


def test_a_resumed_run_reads_the_commit_that_it_began_with(
    hub, convert, cli, released, another, whole, tmp_path
):
    began = hub.add_folder(NAME, released)
    stop_midway(hub, convert, tmp_path / "out")
    assert 1 <= len(list((tmp_path / "out").glob("*.safetensors"))) < len(whole(released)) - 5
    hub.add_folder(NAME, another)
    done = cli("convert", NAME, "out", *SIZE)
    assert done.returncode == 0, done.stderr
    assert f"reading hf://{NAME}@{began[:12]}, the commit recorded by the" in done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["source"] == f"hf://{NAME}@{began}"


def test_a_new_run_reads_the_newest_commit(hub, convert, released, another, whole, tmp_path):
    hub.add_folder(NAME, released)
    assert convert(NAME, "before").returncode == 0
    hub.add_folder(NAME, another)
    assert convert(NAME, "after").returncode == 0
    assert finished(tmp_path / "after") == whole(another)
    refused = convert(NAME, "before")
    assert_clean_error(refused, 2)
    assert "a finished run that differs in source_files" in refused.stderr
    assert convert(NAME, "before", "--overwrite").returncode == 0
    assert finished(tmp_path / "before") == whole(another)


def test_a_commit_during_the_run_changes_nothing(hub, convert, released, another, whole, tmp_path):
    hub.add_folder(NAME, released)
    turns = iter(range(1000))

    def move(request):
        if next(turns) in range(3, 60, 9):
            hub.add_folder(NAME, another)

    hub.faults.append(move)
    assert convert(NAME, "out").returncode == 0
    assert finished(tmp_path / "out") == whole(released)


def test_a_commit_of_other_files_changes_nothing(hub, convert, released, whole, tmp_path):
    hub.add_folder(NAME, released)
    stop_midway(hub, convert, tmp_path / "out")
    files = {f.relative_to(released).as_posix(): f for f in released.rglob("*") if f.is_file()}
    hub.add_repo(NAME, {**files, "README.md": b"# Another text"})
    assert convert(NAME, "out").returncode == 0
    assert finished(tmp_path / "out") == whole(released)
    hub.add_repo(NAME, {**files, "README.md": b"# Still another"})
    assert convert(NAME, "out").returncode == 0  # nothing was left to do


def test_another_revision_is_refused(hub, convert, released, another, tmp_path):
    hub.add_folder(NAME, released)
    hub.add_folder(NAME, another, branch="next")
    stop_midway(hub, convert, tmp_path / "out")
    before = digests(tmp_path / "out")
    done = convert(NAME, "out", "--revision", "next")
    assert_clean_error(done, 2)
    assert "an unfinished run that differs in source_revision (was main, now next)" in done.stderr
    after = digests(tmp_path / "out")
    assert {n: d for n, d in before.items() if n != f"{WORK_NAME}/lock"}.items() <= after.items()


def test_a_deleted_commit_is_reported(hub, convert, released, another, whole, tmp_path):
    """A branch was rewritten, and its old commit deleted."""
    began = hub.add_folder(NAME, released)
    stop_midway(hub, convert, tmp_path / "out")
    hub.add_folder(NAME, another)
    del hub.repos[NAME].commits[began]
    done = convert(NAME, "out")
    assert_clean_error(done, 2)
    assert "--overwrite" in done.stderr
    assert convert(NAME, "out", "--overwrite").returncode == 0
    assert finished(tmp_path / "out") == whole(another)


def test_a_run_that_overwrites_reads_the_newest_commit(
    hub, convert, released, another, whole, tmp_path
):
    hub.add_folder(NAME, released)
    stop_midway(hub, convert, tmp_path / "out")
    hub.add_folder(NAME, another)
    assert convert(NAME, "out", "--overwrite").returncode == 0
    assert finished(tmp_path / "out") == whole(another)
