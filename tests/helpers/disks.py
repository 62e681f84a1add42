"""File systems of the tests' own, mounted for a while: of a chosen size, and able to lose power.

All of this needs Linux and root with the right to mount; tests are skipped where that is missing.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

JOURNAL_FLUSHED, JOURNAL_LOST = 1, 2
_FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)


def tool(name: str) -> str:
    """The path of a system's program."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


@contextmanager
def mounted(folder: Path, *what: str) -> Iterator[Path]:
    """`mount` with the arguments `what` on a folder, until the block ends."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run([tool("mount"), *what, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.splitlines()[0]}")
    try:
        yield folder
    finally:
        subprocess.run([tool("umount"), str(folder)], check=True)


@contextmanager
def tmpfs(folder: Path, nbytes: int) -> Iterator[Path]:
    """A file system in memory, of a size."""
    with mounted(folder, "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs"):
        yield folder


def remount(folder: Path, options: str) -> None:
    """Change the size of a file system in memory, or make it read-only."""
    subprocess.run([tool("mount"), "-o", f"remount,{options}", str(folder)], check=True)


def ext4_image(file: Path, nbytes: int) -> Path:
    """A file that holds an empty ext4 file system, complete at once."""
    with open(file, "wb") as opened:
        opened.truncate(nbytes)
    now = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run([tool("mkfs.ext4"), "-q", "-F", "-m", "0", "-E", now, str(file)], check=True)
    return file


@contextmanager
def ext4(image: Path, folder: Path, options: str = "") -> Iterator[Path]:
    """The file system of an image; what a loss of power left of it is mended by its journal."""
    with mounted(folder, "-o", ",".join(filter(None, ("loop", options))), str(image)):
        yield folder


def lose_power(folder: Path, journal: int) -> None:
    """Cut a mounted ext4 off: what is not on the disk by now never will be.

    `JOURNAL_FLUSHED` lets all changes of names and sizes reach the disk before that, but no data;
    `JOURNAL_LOST` lets nothing.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", journal))
    finally:
        os.close(descriptor)
