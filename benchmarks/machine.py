"""Describes the machine that benchmarks run on: processor, memory, disk and versions."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measure import run
from trials import HERE

from gptoss_stream._utils.thread_pool import count_workers

PACKAGES = ("numpy", "torch", "numba", "safetensors", "transformers")


def described() -> dict[str, Any]:
    """Return the names and versions of what benchmarks depend on; memory in bytes.

    Virtual machines of one kind differ by some pages of memory and by the number of their kernel's
    build, which are left out.
    """
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": models[0] if models else platform.machine(),
        "processors": os.cpu_count(),
        "memory": memory >> 20 << 20,
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def disk(folder: Path, nbytes: int) -> dict[str, float]:
    """Return bytes in a second that `floor.py` only reads from a disk, and only writes to it.

    Args:
        folder: On the disk.
        nbytes: The size of the file that is written and read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed, file, nothing = (folder / f"disk.{kind}" for kind in ("reads", "data", "nothing"))
    command = [sys.executable, str(HERE / "floor.py"), str(listed)]
    threads = ["--threads", str(count_workers(None))]
    try:
        listed.write_text("[]")
        written = [
            run([*command, str(file), str(nbytes), *threads, *options]).wall
            for options in ([], ["--direct"])
        ]
        listed.write_text(json.dumps([(str(file), 0, nbytes)]))
        read = run([*command, str(nothing), "0", *threads]).wall
    finally:
        for path in (listed, file, nothing):
            path.unlink(missing_ok=True)
    return {"read": nbytes / read, "write": nbytes / min(written)}
