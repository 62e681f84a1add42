"""What a conversion takes for each GB that it writes (see cores.py), and what the machine gives.

    python benchmarks/costs.py SOURCE TINY OUTPUT --to hf --threads 3 --compiled

Converts TINY, so that everything is imported, and then SOURCE. Prints what the latter took.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trials
from contention import Work

import gptoss_stream
from gptoss_stream.random_checkpoint import PRESETS
from gptoss_stream.tensors import compiled
from gptoss_stream.transforms.output_tensor import element_ranges

_COPIES = 8


@dataclass(frozen=True)
class Case:
    """A conversion, and whether MXFP4 is decoded by compiled code."""

    source: str
    target: str
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.source} to {self.target}{', compiled' if self.compiled else ''}"


DEFAULT = Case("hf-mxfp4", "transformer-lens")
CASES = (
    DEFAULT,
    Case("hf-mxfp4", "transformer-lens", compiled=True),
    Case("hf-mxfp4", "hf"),
    Case("hf-mxfp4", "hf", compiled=True),
    Case("hf", "hf-mxfp4"),
    Case("hf", "hf"),
)


@dataclass(frozen=True)
class Conversion:
    """Seconds of one conversion, and of the processors."""

    seconds: float
    user: float
    system: float


def checkpoint(
    folder: Path, preset: str, layers: int, source: str, prefix: str = "cores"
) -> AbstractContextManager[Path]:
    """Write a checkpoint with the proportions of the preset; deletes it afterwards."""
    whole = PRESETS[preset]
    vocabulary = max(64, whole.vocab_size * layers // whole.layers // 64 * 64)
    return trials.checkpoint(
        folder, preset, layers, source, prefix=f"{prefix}-", vocabulary=vocabulary
    )


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoint to convert, and a tiny one that is converted before."""

    source: Path
    tiny: Path


@contextmanager
def checkpoints(folder: Path, preset: str, layers: int, source: str) -> Iterator[Checkpoints]:
    """Write a checkpoint and a tiny one in a format; deletes them afterwards."""
    with (
        checkpoint(folder, preset, layers, source) as large,
        checkpoint(folder, "tiny", 1, source, "cores-first") as tiny,
    ):
        yield Checkpoints(large, tiny)


def convert(
    case: Case,
    inputs: Checkpoints,
    threads: int,
    *,
    environment: Mapping[str, str] | None = None,
    groups: Sequence[Path] = (),
) -> Conversion:
    """Convert in a process of its own, and delete the output.

    Args:
        case: The conversion.
        inputs: The checkpoints.
        threads: The number of threads.
        environment: More variables of the environment.
        groups: Control groups for the process.
    """
    output = inputs.source.with_name(f"{inputs.source.name}-out")
    join = "".join(f"echo $$ > {group}/cgroup.procs; " for group in groups)
    command = ["sh", "-c", f'{join}exec "$@"', "sh", sys.executable, __file__]
    command += [
        str(inputs.source),
        str(inputs.tiny),
        str(output),
        "--to",
        case.target,
        "--threads",
        str(threads),
    ]
    command += ["--compiled"] if case.compiled else []
    try:
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env={**os.environ, **(environment or {})}
        )
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return Conversion(**json.loads(done.stdout))


def built_lock(folder: Path) -> Path:
    """Compile lock.c."""
    built = folder / "lock.so"
    source = trials.HERE / "lock.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", built, "-ldl"], check=True)
    return built


def work(case: Case, inputs: Checkpoints, lock: Path, runs: int) -> tuple[Work, list[Conversion]]:
    """Measure what one thread does.

    Args:
        case: The conversion.
        inputs: The checkpoints.
        lock: The library built from lock.c.
        runs: The number of runs.

    Returns:
        The run with the least processor time, and all runs.
    """
    planned = gptoss_stream.plan(inputs.source, to=case.target)
    file = lock.with_suffix(".bin")
    environment = {"LD_PRELOAD": str(lock), "LOCK_FILE": str(file)}
    found, times = [], []
    for _ in range(runs):
        found.append(convert(case, inputs, 1, environment=environment))
        times.append(np.fromfile(file, np.float32).reshape(-1, 2).astype(float))
    held, free = min(times, key=lambda pairs: float(pairs.sum())).T.tolist()
    copied = sum(
        element_range.byte_range[1]
        for shard in planned.shards
        for tensor in shard.tensors
        for element_range in element_ranges(tensor, 0, tensor.nbytes)
    )
    read = planned.source_nbytes / planned.nbytes
    traffic = read + copied / planned.nbytes + 3
    return Work(held, free, planned.nbytes / 1e9, read, traffic), found


def wake(turns: int = 2000) -> float:
    """Measure how long a thread that sleeps takes to run once another one wakes it, in seconds.

    Two threads wake each other in turns; returns the median of half a turn.
    """
    ours, theirs = threading.Lock(), threading.Lock()
    ours.acquire()
    theirs.acquire()

    def answer() -> None:
        for _ in range(turns):
            theirs.acquire()
            ours.release()

    other = threading.Thread(target=answer)
    other.start()
    seconds = []
    for _ in range(turns):
        begin = time.perf_counter()
        theirs.release()
        ours.acquire()
        seconds.append(time.perf_counter() - begin)
    other.join()
    return statistics.median(seconds) / 2


def copy_speed(threads: int, nbytes: int = 1 << 28) -> float:
    """Return GB/s that threads read and write together when they copy arrays."""
    pairs = [(np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)) for _ in range(threads)]
    workers = [threading.Thread(target=_copy, args=pair) for pair in pairs]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 2 * _COPIES * threads * nbytes / 1e9 / (time.perf_counter() - begin)


def _copy(source: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    for _ in range(_COPIES):
        np.copyto(out, source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("source", "tiny", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--to", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    if arguments.compiled:
        compiled.enable()
    for source in (arguments.tiny, arguments.source):
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        gptoss_stream.convert(
            source, arguments.output, to=arguments.to, workers=arguments.threads, overwrite=True
        )
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    found = Conversion(seconds, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
