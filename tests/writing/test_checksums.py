"""Checksums of an output's files: computed while it is written, verified without its source."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from runs import OPTIONS, ROOT, digests

import gptoss_stream
from gptoss_stream.cli.main import main
from gptoss_stream.errors import OutputError
from gptoss_stream.writing.checksums import RunningChecksum, parse_checksums

CHECKSUMS = "SHA256SUMS"


@pytest.fixture(scope="module")
def with_checksums(checkpoints, tmp_path_factory):
    output = tmp_path_factory.mktemp("checksums") / "out"
    gptoss_stream.convert(checkpoints(), output, max_shard_size="300KB", checksums=True)
    return output


def test_sha256sum_verifies_every_file(with_checksums):
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", CHECKSUMS],
        cwd=with_checksums,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(parse_checksums((with_checksums / CHECKSUMS).read_bytes())) == set(
        digests(with_checksums)
    ) - {CHECKSUMS}


def test_checksums_do_not_change_the_shards(with_checksums, checkpoints, tmp_path):
    gptoss_stream.convert(checkpoints(), tmp_path / "out", max_shard_size="300KB")
    without = digests(tmp_path / "out")
    shards = digests(with_checksums, "*.safetensors")
    assert shards.items() <= without.items()


@pytest.mark.parametrize("workers", [1, 4])
def test_an_interrupted_run_keeps_the_checksums_of_finished_shards(
    workers, checkpoints, with_checksums, tmp_path
):
    out = tmp_path / "out"
    dying = (
        "import os, sys\n"
        "from gptoss_stream.cli import main\n"
        "rename, done = os.rename, []\n"
        "def dying(source, target):\n"
        "    rename(source, target)\n"
        "    done.append(str(target).endswith('.safetensors'))\n"
        "    if sum(done) == 2: os.kill(os.getpid(), 9)\n"
        "os.rename = dying\n"
        "main.main(sys.argv[1:])"
    )
    options = [*OPTIONS, "--checksums", "--workers", str(workers)]
    command = ["convert", str(checkpoints()), str(out), *options]
    killed = subprocess.run([sys.executable, "-c", dying, *command], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    kept = {file: file.stat().st_ino for file in out.glob("*.safetensors")}
    assert len(kept) == 2 or (
        workers > 1 and 2 < len(kept) < 5
    )  # other threads had finished theirs
    assert main(command) == 0
    assert {file: file.stat().st_ino for file in kept} == kept
    assert digests(out) == digests(with_checksums)


def test_verify_checksums_reports_every_change(with_checksums, tmp_path, capsys):
    assert main(["verify", "--checksums", str(with_checksums)]) == 0
    assert "equal" in capsys.readouterr().out
    for name in sorted(digests(with_checksums).keys() - {"README.md"}):  # which users edit
        copy = shutil.copytree(with_checksums, tmp_path / "copy")
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 4
        (copy / name).write_bytes(data)
        (difference, *others) = gptoss_stream.verify_checksums(copy).differences
        assert difference.kind in ("checksum", "missing")
        assert name in (CHECKSUMS, difference.name) or others
        assert main(["verify", str(copy), "--checksums"]) == 1
        assert name == CHECKSUMS or name in capsys.readouterr().out
        (copy / name).unlink()
        if name == CHECKSUMS:
            with pytest.raises(OutputError, match="no SHA256SUMS"):
                gptoss_stream.verify_checksums(copy)
        else:
            kinds = {(d.kind, d.name) for d in gptoss_stream.verify_checksums(copy).differences}
            assert ("missing", name) in kinds
        shutil.rmtree(copy)


def test_an_invalid_checksum_file_is_reported(with_checksums, tmp_path, capsys):
    copy = shutil.copytree(with_checksums, tmp_path / "copy")
    (copy / CHECKSUMS).write_text("no checksum")
    assert main(["verify", str(copy), "--checksums"]) == 1
    assert "expected a checksum on each line" in capsys.readouterr().out


def test_a_checksum_file_without_a_line(with_checksums, tmp_path):
    """Whatever has been done to that file is not known then."""
    lines = (with_checksums / CHECKSUMS).read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        name = line.split("  ")[1].strip()
        copy = shutil.copytree(with_checksums, tmp_path / f"copy-{number}")
        (copy / CHECKSUMS).write_text("".join(lines[:number] + lines[number + 1 :]))
        found = gptoss_stream.verify_checksums(copy)
        assert found.equal == (name == "README.md")  # which users edit


def test_a_shard_without_a_checksum_is_unexpected(with_checksums, tmp_path):
    copy = shutil.copytree(with_checksums, tmp_path / "copy")
    shutil.copy(min(copy.glob("*.safetensors")), copy / "model-00009-of-00009.safetensors")
    (difference,) = gptoss_stream.verify_checksums(copy).differences
    assert (difference.kind, difference.name) == (
        "unexpected",
        "model-00009-of-00009.safetensors",
    )


@pytest.mark.parametrize("arguments", [["out"], ["source", "out", "--checksums"]])
def test_verify_takes_a_source_or_checksums(arguments, capsys):
    assert main(["verify", *arguments]) == 2
    assert "either SOURCE and OUTPUT, or OUTPUT and --checksums" in capsys.readouterr().err


def test_chunks_from_many_threads_are_added_in_order():
    data = np.frombuffer(os.urandom(1 << 20), np.uint8)
    total, stop = RunningChecksum(), threading.Event()
    starts = list(range(0, len(data), 1 << 16))
    threads = [
        threading.Thread(target=total.add, args=(begin, data[begin : begin + (1 << 16)], stop))
        for begin in reversed(starts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total.hexdigest() == hashlib.sha256(data.data).hexdigest()


@pytest.mark.parametrize(
    "text",
    [b"", b"x\n", b"0" * 64 + b"  a", b"0" * 63 + b"  a\n", b"0" * 64 + b"  ../a\n", b"\xff\n"],
)
def test_invalid_checksums_are_refused(text):
    with pytest.raises(ValueError, match=r"line|ends|decode"):
        parse_checksums(text)
