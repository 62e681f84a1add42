"""Sums of an output's files: written while it is made, checked without its source."""

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

SUMS = "SHA256SUMS"


@pytest.fixture(scope="module")
def summed(checkpoints, tmp_path_factory):
    output = tmp_path_factory.mktemp("summed") / "out"
    gptoss_stream.convert(checkpoints(), output, max_shard_size="300KB", checksums=True)
    return output


def test_sha256sum_reads_the_sums_and_finds_every_file(summed):
    done = subprocess.run(
        ["sha256sum", "--strict", "-c", SUMS], cwd=summed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(parse_checksums((summed / SUMS).read_bytes())) == set(digests(summed)) - {SUMS}


def test_the_files_are_those_that_are_made_without_sums(summed, checkpoints, tmp_path):
    gptoss_stream.convert(checkpoints(), tmp_path / "out", max_shard_size="300KB")
    plain = digests(tmp_path / "out")
    assert {n: d for n, d in digests(summed).items() if n.endswith(".safetensors")}.items() <= (
        plain.items()
    )


@pytest.mark.parametrize("workers", [1, 4])
def test_an_interrupted_run_keeps_the_sums_of_what_was_finished(
    workers, checkpoints, summed, tmp_path
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
    assert len(kept) == 2 or (workers > 1 and 2 < len(kept) < 5)  # another thread was as far
    assert main(command) == 0
    assert {file: file.stat().st_ino for file in kept} == kept
    assert digests(out) == digests(summed)


def test_verify_checksums_tells_every_change(summed, tmp_path, capsys):
    assert main(["verify", "--checksums", str(summed)]) == 0
    assert "equal" in capsys.readouterr().out
    for name in sorted(digests(summed)):
        copy = shutil.copytree(summed, tmp_path / "copy")
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 4
        (copy / name).write_bytes(data)
        (difference, *others) = gptoss_stream.verify_checksums(copy).differences
        assert difference.kind in ("checksum", "missing")
        assert name in (SUMS, difference.name) or others
        assert main(["verify", str(copy), "--checksums"]) == 1
        assert name == SUMS or name in capsys.readouterr().out
        (copy / name).unlink()
        if name == SUMS:
            with pytest.raises(OutputError, match="no SHA256SUMS"):
                gptoss_stream.verify_checksums(copy)
        else:
            kinds = {(d.kind, d.name) for d in gptoss_stream.verify_checksums(copy).differences}
            assert ("missing", name) in kinds
        shutil.rmtree(copy)


def test_sums_without_form(summed, tmp_path, capsys):
    copy = shutil.copytree(summed, tmp_path / "copy")
    (copy / SUMS).write_text("no sum")
    assert main(["verify", str(copy), "--checksums"]) == 1
    assert "expected a checksum on each line" in capsys.readouterr().out


def test_a_shard_that_has_no_sum_is_unexpected(summed, tmp_path):
    copy = shutil.copytree(summed, tmp_path / "copy")
    shutil.copy(min(copy.glob("*.safetensors")), copy / "model-00009-of-00009.safetensors")
    (difference,) = gptoss_stream.verify_checksums(copy).differences
    assert (difference.kind, difference.name) == (
        "unexpected",
        "model-00009-of-00009.safetensors",
    )


@pytest.mark.parametrize("arguments", [["out"], ["source", "out", "--checksums"]])
def test_verify_takes_a_source_or_sums(arguments, capsys):
    assert main(["verify", *arguments]) == 2
    assert "either SOURCE and OUTPUT, or OUTPUT and --checksums" in capsys.readouterr().err


def test_segments_from_many_threads_are_added_in_order():
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
def test_sums_that_are_none(text):
    with pytest.raises(ValueError, match=r"line|ends|decode"):
        parse_checksums(text)
