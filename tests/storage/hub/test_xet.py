"""Uploads by the real hf_xet, which stores what it would send in a local folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from hub_cases import NAME, OUT, SIZE, commits, contents, python, requested, shards
from hub_runs import environment
from runs import assert_clean_error, run_in_process, wait_for
from stand_in_hub import Fault

from gptoss_stream import synth

hf_xet = pytest.importorskip("hf_xet")

READ_BACK = """
import json, sys
import hf_xet
endpoint, folder, *files = sys.argv[1:]
found = hf_xet.hash_files(files)
with hf_xet.XetSession().new_file_download_group(endpoint=endpoint) as group:
    for number, info in enumerate(found):
        wanted = hf_xet.XetFileInfo(info.hash, info.filesize)
        group.start_download_file(wanted, f"{folder}/{number}")
"""


@pytest.fixture
def started():
    """Start processes, which are killed at the end."""
    with ExitStack() as stack:

        def start(command, folder, variables) -> subprocess.Popen:
            process = stack.enter_context(subprocess.Popen(command, cwd=folder, env=variables))
            stack.callback(process.kill)
            return process

        yield start


@pytest.fixture
def xet(hub, tmp_path):
    """The folder of hf_xet's uploads."""
    hub.xet = tmp_path / "cas"
    hub.xet.mkdir()
    yield hub.xet
    hub.xet = None


def assert_stored(hub, xet: Path, local: Path, tmp_path: Path) -> None:
    """Assert that the folder has the shards of a local output, read back by hf_xet."""
    shards = sorted(local.glob("*.safetensors"))
    back = tmp_path / "back"
    back.mkdir()
    done = python(hub, tmp_path, "-c", READ_BACK, f"local://{xet}", str(back), *map(str, shards))
    assert done.returncode == 0, done.stderr
    for number, shard in enumerate(shards):
        assert (back / str(number)).read_bytes() == shard.read_bytes()


@pytest.fixture
def local(released, tmp_path) -> Path:
    """The same output in a local folder."""
    command = ("convert", released, tmp_path / "local", *SIZE, "--quiet")
    assert run_in_process(*command).returncode == 0
    return tmp_path / "local"


def command_line(*words: str) -> tuple[str, ...]:
    return ("-m", "gptoss_stream", "convert", *words, *SIZE, "--quiet")


def test_from_repository_to_repository(hub, xet, released, whole, local, tmp_path):
    """No shard goes by Git LFS, and the folder has their bytes; few commits are made."""
    hub.add_folder(NAME, released)
    done = python(hub, tmp_path, *command_line(NAME, f"hf://{OUT}"), HF_HUB_DISABLE_XET="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(hub) == whole(released)
    assert "cdn PUT" not in requested(hub)
    assert_stored(hub, xet, local, tmp_path)
    assert len(commits(hub)) <= 5


def test_xet_can_be_switched_off(hub, xet, released, whole, tmp_path):
    done = python(hub, tmp_path, *command_line(str(released), f"hf://{OUT}"))
    assert done.returncode == 0, done.stderr
    assert contents(hub) == whole(released)
    assert "cdn PUT" in requested(hub)
    assert not any(xet.iterdir())


def test_what_a_killed_run_has_uploaded_is_committed(
    started, hub, xet, released, whole, local, tmp_path
):
    """It is neither made nor uploaded again."""
    variables = environment(hub.endpoint, tmp_path, HF_HUB_DISABLE_XET="0")
    command = [sys.executable, *command_line(str(released), f"hf://{OUT}", "--workers=1")]
    process = started(command, tmp_path, variables)
    receipts = []

    def has_receipts() -> bool:
        found = [*(tmp_path / "cache").glob("gptoss_stream/*/.gptoss_stream/*.receipt")]
        receipts[:] = [json.loads(file.read_bytes().partition(b"\n")[2]) for file in found]
        return len(receipts) >= 2

    wait_for(has_receipts)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = len(commits(hub))
    hub.reset_counts()
    done = python(hub, tmp_path, *command_line(str(released), f"hf://{OUT}"), "--json",
                  HF_HUB_DISABLE_XET="0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert contents(hub) == whole(released)
    assert json.loads(done.stdout)["bytes_resumed"] >= sum(one["size"] for one in receipts)
    assert len(commits(hub)) - before <= 5
    assert_stored(hub, xet, local, tmp_path)


@pytest.mark.slow
def test_memory_at_real_size(hub, xet, tmp_path):
    """From repository to repository, 2 layers of the 20b's shapes in shards of 1 GB."""
    source = synth(tmp_path / "source", "20b", layers=2)
    hub.add_folder(NAME, source)
    words = (
        "-m",
        "gptoss_stream",
        "convert",
        NAME,
        f"hf://{OUT}",
        "--to",
        "hf",
        "--quiet",
        "--json",
    )
    done = python(hub, tmp_path, *words, "--max-shard-size", "1GB", seconds=500,
                  HF_HUB_DISABLE_XET="0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sum(shards(hub).values()) > 5_000_000_000
    assert json.loads(done.stdout)["peak_rss"] < 600_000_000


@pytest.mark.slow
def test_receipts_that_the_hub_does_not_know(started, hub, released, whole, tmp_path):
    """The shards are made and uploaded again."""
    slow, some = Fault("slow", 60_000), len(hub.uploads) + 3
    hub.faults.append(lambda r: slow if r.method == "PUT" and len(hub.uploads) > some else None)
    command = [sys.executable, *command_line(str(released), f"hf://{OUT}", "--workers=1")]
    run = started(command, tmp_path, environment(hub.endpoint, tmp_path))
    work = tmp_path / "cache/gptoss_stream"
    wait_for(lambda: len([*work.glob("*/.gptoss_stream/*.receipt")]) >= 1)
    run.kill()
    run.wait()
    hub.faults.clear()
    known = {entry.sha256 for entry in hub.files(OUT).values()}
    objects = hub.repos[OUT].objects
    for oid in [oid for oid in objects if oid not in known]:
        del objects[oid]
    done = python(hub, tmp_path, *command_line(str(released), f"hf://{OUT}"))
    assert done.returncode == 0, done.stderr
    assert contents(hub) == whole(released)


@pytest.mark.parametrize(
    "url",
    ["local:///proc/nothing", pytest.param("http://127.0.0.1:9", marks=pytest.mark.slow)],
)
def test_an_upload_that_fails_is_one_line(url, hub, xet, released, tmp_path):
    """Which names the shard, not the disk."""
    hub.xet = Path(url.removeprefix("local://")) if url.startswith("local") else url
    done = python(hub, tmp_path, *command_line(str(released), f"hf://{OUT}"),
                  HF_HUB_DISABLE_XET="0", HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1")  # fmt: skip
    assert_clean_error(done, 3)
    assert f"hf://{OUT}/model-0000" in done.stderr
    assert "check the network and run the same command again" in done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "2 1"),
        ({"HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "8"}, "8 1"),
        ({"HF_XET_HIGH_PERFORMANCE": "1"}, "None None"),
        ({"HF_XET_FIXED_UPLOAD_CONCURRENCY": "4"}, "None None"),
    ],
)
def test_settings_of_the_user_count(given, expected):
    code = """
import os
import gptoss_stream
gptoss_stream.open_writable_location("hf://user/name")
names = "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY", "TOKIO_WORKER_THREADS"
print(*(os.environ.get(name) for name in names))
"""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TOKIO_"))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables | given
    )
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize(("status", "word"), [(403, "no access (403)"), (401, "no access (401)")])
def test_what_the_hub_refuses_to_hf_xet(status, word, hub, xet, released, tmp_path):
    """hf_xet calls it a connection error; the message says what it is."""
    hub.faults.append(lambda r: Fault("status", status) if "xet-write-token" in r.path else None)
    words = command_line(str(released), f"hf://{OUT}")
    done = python(hub, tmp_path, *words, HF_HUB_DISABLE_XET="0")
    assert_clean_error(done, 2)
    assert word in done.stderr


def test_a_staged_shard_that_has_changed_is_not_committed(hub, xet, released, whole, tmp_path):
    """hf_xet computes the checksum of what it reads from the disk."""
    hub.faults.append(lambda r: Fault("status", 403) if "xet-write-token" in r.path else None)
    words = command_line(str(released), f"hf://{OUT}")
    assert python(hub, tmp_path, *words, HF_HUB_DISABLE_XET="0").returncode == 2
    hub.faults.clear()
    shard = next((tmp_path / "cache").glob("gptoss_stream/*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = python(hub, tmp_path, *words, HF_HUB_DISABLE_XET="0")
    assert_clean_error(done, 3)
    assert "it is not what was written to it" in done.stderr
    assert shard.name not in contents(hub)
