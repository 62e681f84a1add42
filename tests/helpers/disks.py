"""Temporary file systems: of a chosen size, and with simulated power losses.

They need Linux and root with the right to mount. Without it, tests are skipped.
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
    """Return the path of a program of the system; skip the test if it is missing."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[Path]:
    """Mount with these arguments of `mount` on a folder, and unmount at the end of the block."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run([tool("mount"), *arguments, str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.splitlines()[0]}")
    try:
        yield folder
    finally:
        subprocess.run([tool("umount"), str(folder)], check=True)


@contextmanager
def tmpfs(folder: Path, nbytes: int) -> Iterator[Path]:
    """Mount a file system in memory, of `nbytes` bytes."""
    with mounted(folder, "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs"):
        yield folder


def remount(folder: Path, options: str) -> None:
    """Change the size of a file system in memory, or make it read-only."""
    subprocess.run([tool("mount"), "-o", f"remount,{options}", str(folder)], check=True)


def ext4_image(file: Path, nbytes: int) -> Path:
    """Create a file with an empty, fully initialised ext4 file system."""
    with open(file, "wb") as opened:
        opened.truncate(nbytes)
    not_lazy = "lazy_itable_init=0,lazy_journal_init=0"
    subprocess.run(
        [tool("mkfs.ext4"), "-q", "-F", "-m", "0", "-E", not_lazy, str(file)], check=True
    )
    return file


@contextmanager
def ext4(image: Path, folder: Path, options: str = "") -> Iterator[Path]:
    """Mount the file system of an image; after a power loss its journal is replayed."""
    with mounted(folder, "-o", ",".join(filter(None, ("loop", options))), str(image)):
        yield folder


def lose_power(folder: Path, journal: int) -> None:
    """Shut a mounted ext4 down as a power loss does: what is not on the disk yet is lost.

    With `JOURNAL_FLUSHED` all changes of names and sizes reach the disk before that, but no data.
    With `JOURNAL_LOST` nothing does.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _FS_IOC_SHUTDOWN, struct.pack("I", journal))
    finally:
        os.close(descriptor)
