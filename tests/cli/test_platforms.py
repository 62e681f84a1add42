"""Systems other than Linux, as far as they can be imitated: what they lack is taken away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, assert_clean_error, convert_command, digests, run

MISSING = {
    "darwin": "preadv pwritev fdatasync posix_fadvise posix_fallocate sched_getaffinity O_DIRECT "
    "POSIX_FADV_WILLNEED POSIX_FADV_DONTNEED POSIX_FADV_RANDOM POSIX_FADV_SEQUENTIAL",
    "win32": "preadv pread pwritev pwrite fdatasync posix_fadvise posix_fallocate O_DIRECT uname "
    "sched_getaffinity O_NONBLOCK O_CLOEXEC register_at_fork fork statvfs geteuid getuid readlink "
    "POSIX_FADV_WILLNEED POSIX_FADV_DONTNEED POSIX_FADV_RANDOM POSIX_FADV_SEQUENTIAL",
}
IMITATED = """
import os, signal, sys
import click, einops, fsspec, huggingface_hub, numpy, safetensors.numpy, tqdm  # not what is tested
import http.client, multiprocessing, pathlib, tempfile, urllib.request, uuid
system, missing, action = sys.argv[1:4]
sys.platform = system
for name in missing.split():
    vars(os).pop(name, None)
if system == "win32":
    for name in ("fcntl", "resource", "termios", "pwd", "grp"):
        sys.modules[name] = None
    for name in ("SIGALRM", "SIGPIPE", "SIGKILL", "SIGHUP", "SIGSTOP", "setitimer"):
        vars(signal).pop(name, None)
"""
IMPORT_ALL = """
import importlib, pkgutil, gptoss_stream
for module in pkgutil.walk_packages(gptoss_stream.__path__, "gptoss_stream."):
    if module.name != "gptoss_stream.__main__" and not module.name.startswith(
        ("gptoss_stream.inference.", "gptoss_stream.distributed.", "gptoss_stream.examples.")
    ):
        importlib.import_module(module.name)
print("imported")
"""
COMMAND = """
from gptoss_stream.cli.main import main
sys.exit(main(sys.argv[4:]))
"""


def imitate(system: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process that thinks that it runs on another system."""
    command = [sys.executable, "-c", IMITATED + code, system, MISSING[system], ""]
    return run([*command, *map(str, arguments)])


@pytest.mark.parametrize("system", MISSING)
def test_importing(system):
    """Modules that import torch or dask at once are left out."""
    done = imitate(system, IMPORT_ALL)
    assert (done.stdout, done.stderr) == ("imported\n", "")


@pytest.mark.parametrize("system", MISSING)
@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["--version"]])
def test_help(system, arguments):
    done = imitate(system, COMMAND, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


@pytest.mark.parametrize("command", ["convert", "inspect", "synth"])
def test_windows_is_refused(command, checkpoints, tmp_path):
    places = [checkpoints(), tmp_path / "out"][command == "synth" :]
    done = imitate("win32", COMMAND, command, *places[: 1 if command in ("inspect", "plan") else 2])
    assert_clean_error(done, 3)
    assert "Windows" in done.stderr
    assert "WSL" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("call", ["convert(sys.argv[4], sys.argv[5])", "plan(sys.argv[4])"])
def test_windows_is_refused_in_the_library(call, checkpoints, tmp_path):
    code = f"import gptoss_stream\ntry: gptoss_stream.{call}\n"
    code += "except gptoss_stream.MachineError as error: print(error)"
    done = imitate("win32", code, checkpoints(), tmp_path / "out")
    assert "WSL" in done.stdout, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_macos_converts(quiet, checkpoints, tmp_path):
    """Without direct writing and reading at offsets; the bytes are the same."""
    source, size = checkpoints(), ["--max-shard-size", "300KB"]
    done = imitate("darwin", COMMAND, "convert", source, tmp_path / "a", *size, *quiet)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("note: macOS writes") == (not quiet)
    assert run(convert_command(source, tmp_path / "b")).returncode == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    done = imitate("darwin", COMMAND, "verify", source, tmp_path / "a")
    assert done.returncode == 0, done.stderr


def test_modules_for_one_system_are_imported_where_they_are_used():
    for file in (ROOT / "gptoss_stream").rglob("*.py"):
        for line in Path(file).read_text().splitlines():
            assert not line.startswith(("import fcntl", "import resource", "from fcntl")), file
