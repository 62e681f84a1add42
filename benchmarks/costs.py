"""What a conversion takes for each GB that it writes (see cores.py), and what the machine gives."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trials
from contention import Cost

import gptoss_stream
from gptoss_stream.random_checkpoint import PRESETS
from gptoss_stream.transforms.output_tensor import element_ranges

MAIN = "from gptoss_stream.cli.main import main; raise SystemExit(main())"
_COPIES = 8
COMPILED = f"import numba; from gptoss_stream.tensors import compiled; compiled.enable(); {MAIN}"


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
    """One run: seconds of the conversion and of the processors, and of the lock if measured."""

    seconds: float
    user: float
    system: float
    lock: float = 0.0
    holds: float = 0.0

    def without(self, other: Conversion) -> Conversion:
        """Return the run without what another one took."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return Conversion(*(max(0.0, a - b) for a, b in pairs))


@contextmanager
def checkpoint(folder: Path, preset: str, layers: int, source: str) -> Iterator[Path]:
    """Write a checkpoint with the proportions of the preset; deletes it afterwards."""
    whole = PRESETS[preset]
    vocabulary = max(64, whole.vocab_size * layers // whole.layers // 64 * 64)
    where = folder / f"cores-{preset}-{layers}-{source}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield gptoss_stream.synth(
            where, preset, layers=layers, vocab_size=vocabulary, format=source, overwrite=True
        )
    finally:
        shutil.rmtree(where, ignore_errors=True)


def convert(
    case: Case, source: Path, threads: int, *, lock: Path | None = None, groups: Sequence[Path] = ()
) -> Conversion:
    """Convert in a process of its own, and delete the output.

    Args:
        case: The conversion.
        source: The checkpoint.
        threads: The number of threads.
        lock: The library built from lock.c, to measure the lock.
        groups: Control groups for the process.
    """
    output, held = source.with_name(f"{source.name}-out"), source.with_name(f"{source.name}-lock")
    code = COMPILED if case.compiled else MAIN
    command = [sys.executable, "-c", code, "convert", str(source), str(output), "--to", case.target]
    command += ["--workers", str(threads), "--json", "--quiet"]
    join = "".join(f"echo $$ > {group}/cgroup.procs; " for group in groups)
    preload = {"LD_PRELOAD": str(lock), "LOCK_FILE": str(held)} if lock else {}
    process = subprocess.Popen(
        ["sh", "-c", f'{join}exec "$@"', "sh", *command],
        stdout=subprocess.PIPE,
        env={**os.environ, **preload},
    )
    assert process.stdout is not None
    try:
        with process.stdout:
            report = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}")
        seconds = json.loads(report)["seconds"]
        found = held.read_text().split() if held.exists() else ["0", "0"]
        return Conversion(seconds, usage.ru_utime, usage.ru_stime, *map(float, found))
    finally:
        held.unlink(missing_ok=True)
        shutil.rmtree(output, ignore_errors=True)


def built_lock(folder: Path) -> Path:
    """Compile lock.c."""
    built = folder / "lock.so"
    source = trials.HERE / "lock.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", built, "-ldl"], check=True)
    return built


def median(runs: Sequence[Conversion]) -> Conversion:
    """Return the median of each measurement."""
    columns = zip(*(asdict(run).values() for run in runs), strict=True)
    return Conversion(*map(statistics.median, columns))


def costs(case: Case, source: Path, tiny: Path, lock: Path, runs: int) -> dict[str, Any]:
    """Return what a conversion takes for each GB written, and the cost for the model."""
    planned = gptoss_stream.plan(source, to=case.target)
    written = planned.nbytes / 1e9
    turns = [
        convert(case, source, 1, lock=lock).without(convert(case, tiny, 1, lock=lock))
        for _ in range(runs)
    ]
    run = median(turns)
    copied = sum(
        element_range.byte_range[1]
        for shard in planned.shards
        for tensor in shard.tensors
        for element_range in element_ranges(tensor, 0, tensor.nbytes)
    )
    read = planned.source_nbytes / planned.nbytes
    cost = Cost(
        cpu=(run.user + run.system) / written,
        lock=run.lock / written,
        holds=run.holds / written,
        read=read,
        traffic=read + copied / planned.nbytes + 3,
    )
    return {
        "case": str(case),
        "bytes_out": planned.nbytes,
        "user": run.user / written,
        "system": run.system / written,
        "runs": [asdict(turn) for turn in turns],
        "cost": asdict(cost),
    }


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
