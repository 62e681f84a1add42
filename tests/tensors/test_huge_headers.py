"""Time and memory for headers as large as is allowed, each read in its own process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from runs import ROOT

CHILD = """
import sys, time
from gptoss_stream.checkpoint.metadata import read_header
from gptoss_stream.errors import HeaderError
from gptoss_stream._utils.memory import peak_rss_nbytes
from gptoss_stream.storage.local_folder import LocalFolder
from pathlib import Path
begun = time.perf_counter()
try: print(len(read_header(LocalFolder(Path(sys.argv[1])), "x.safetensors")[1]), "tensors")
except HeaderError as error: print(error)
print(time.perf_counter() - begun, peak_rss_nbytes())
"""


def many(nbytes: int) -> bytes:
    """A valid header of that size with as many tensors as possible."""
    entry = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    names = b",".join(entry % number for number in range((nbytes - 2) // 65))
    return (b"{" + names + b"}").ljust(nbytes)


def listing(item: bytes, nbytes: int) -> bytes:
    """A header of that size that repeats one item."""
    count = (nbytes - 20) // (len(item) + 1)
    return (b'{"a":[' + b",".join([item] * count) + b"]}").ljust(nbytes)


HUGE = {
    "many tensors": many,
    "one string": lambda nbytes: b'{"__metadata__":{"a":"' + b"a" * (nbytes - 25) + b'"}}',
    "spaces": lambda nbytes: b"{}".ljust(nbytes),
    "deep arrays": lambda nbytes: b"[" * nbytes,
    "deep objects": lambda nbytes: (b'{"a":' * (nbytes // 5)).ljust(nbytes),
    "one number": lambda nbytes: b"9" * nbytes,
    "many numbers": lambda nbytes: listing(b"1", nbytes),
    "many arrays": lambda nbytes: listing(b"[]", nbytes),
    "many objects": lambda nbytes: listing(b"{}", nbytes),
}


@pytest.mark.parametrize("header", HUGE.values(), ids=HUGE.keys())
@pytest.mark.parametrize(
    ("nbytes", "seconds", "memory"),
    [(4_000_000, 10, 200e6), pytest.param(25_000_000, 40, 0.75e9, marks=pytest.mark.slow)],
)
def test_a_huge_header_takes_little_time_and_memory(header, nbytes, seconds, memory, tmp_path):
    """25 MB is the largest that is allowed: it takes seconds, and less than 0.75 GB."""
    with open(tmp_path / "x.safetensors", "wb") as file:
        file.write(nbytes.to_bytes(8, "little"))
        file.write(header(nbytes)[:nbytes])
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    said, (took, used) = done.stdout.splitlines()[0], map(float, done.stdout.split()[-2:])
    print(said[:200], f"{took:.1f} s, {used / 1e6:.0f} MB")
    assert len(said) < 1500
    assert took < seconds
    assert used < memory
