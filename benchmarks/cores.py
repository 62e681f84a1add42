"""How a conversion would grow to many cores: costs of a GB, a model, and trials of it here.

    python benchmarks/cores.py --folder /some/disk --json cores.json

Converts from and to memory (`--memory`), so that no disk is in the way. The checkpoint has
`--layers` layers of the preset and as large a part of its vocabulary, so that its parts have the
proportions of the whole model. Of `--runs` runs the fastest counts: what else a machine does only
slows them.

Costs, by one thread, the start of the process left out: seconds of a processor, seconds that
Python's lock is held and how often it is taken (`lock.c`; needs a C compiler), and bytes. Memory
traffic is counted from the plan: what is read goes from the disk to the page cache, and each read
copies it from there; a chunk is written, for which the processor reads it first, and read by the
disk. Tiles stay in the processor's cache.

The model is in `contention.py`. What it predicts is compared with conversions that are throttled:
by a quota of the processors' time, by the speed of the disk in `--folder` and by the number of
threads. This needs root and control groups, version 1; without them it is left out. Then the model
predicts for 16 and 64 processors, with a disk that reads 7 and writes 5 GB/s and memory of 100 and
200 GB/s.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import costs
import tables
import trials
from contention import Machine, Work, best_threads, bounds, rate
from costs import DEFAULT, Case, Checkpoints, Conversion

from gptoss_stream._utils.parallel import num_processors
from gptoss_stream.tensors.compiled import is_available

GROUPS = Path("/sys/fs/cgroup")
PERIOD = 100_000
"""Of a quota, in microseconds."""
THREADS = (1, 2, 3, 4, 8)
QUOTAS = (0.25, 0.5, 1.0)
DISKS = ((1.0, 0.4), (0.1, 1.0))
"""Limits of reading and writing, in GB/s."""
SERVERS = {
    16: Machine(16, 0, read=7, write=5, memory=100),
    64: Machine(64, 0, read=7, write=5, memory=200),
}
MAX_WORKERS = 8
"""The most threads by default."""


def can_throttle() -> bool:
    """Return whether the processors and the disk can be throttled."""
    needed = ("cpu/cpu.cfs_quota_us", "blkio/blkio.throttle.read_bps_device")
    return os.geteuid() == 0 and all((GROUPS / name).exists() for name in needed)


@contextmanager
def group(controller: str, limits: dict[str, str]) -> Iterator[Path]:
    """Create a control group with limits; removes it afterwards."""
    folder = GROUPS / controller / "gptoss_stream_cores"
    folder.mkdir(exist_ok=True)
    try:
        for name, limit in limits.items():
            (folder / f"{controller}.{name}").write_text(limit)
        yield folder
    finally:
        folder.rmdir()


def processors_limit(quota: float) -> dict[str, str]:
    """Return the limits of a quota of the processors' time."""
    return {"cfs_period_us": str(PERIOD), "cfs_quota_us": str(int(quota * PERIOD))}


def disk_limit(folder: Path, read: float, write: float) -> dict[str, str]:
    """Return the limits of the disk that a folder is on, in GB/s."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return {
        f"throttle.{kind}_bps_device": f"{number} {int(limit * 1e9)}"
        for kind, limit in (("read", read), ("write", write))
    }


def drop_cached(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def finite(number: float) -> float | None:
    """Return a number, or None, as JSON has no infinity."""
    return number if math.isfinite(number) else None


def compared(
    case: Case,
    inputs: Checkpoints,
    work: Work,
    machine: Machine,
    runs: int,
    groups: Sequence[Path] = (),
) -> list[dict[str, Any]]:
    """Measure a conversion with some numbers of threads beside what the model predicts.

    Args:
        case: The conversion.
        inputs: The checkpoints.
        work: What one thread does.
        machine: This machine, as it is throttled.
        runs: The runs of each number of threads.
        groups: Control groups that throttle it.
    """
    rows = []
    for threads in THREADS:
        found = []
        for _ in range(runs):
            drop_cached(inputs.source)
            found.append(costs.convert(case, inputs, threads, groups=groups))
        rows.append(
            {
                "case": str(case),
                "processors": machine.processors,
                "read": finite(machine.read),
                "write": finite(machine.write),
                "threads": threads,
                "runs": [work.written / run.seconds for run in found],
                "cpu": min(run.user + run.system for run in found) / work.written,
                "measured": work.written / min(run.seconds for run in found),
                "predicted": rate(work, machine, threads),
            }
        )
        trials.say(
            f"{case}, {threads} threads: {rows[-1]['measured']:.2f} GB/s, "
            f"predicted {rows[-1]['predicted']:.2f}"
        )
    return rows


def described(case: Case, work: Work, runs: Sequence[Conversion]) -> dict[str, Any]:
    """Return what a conversion takes for each GB written."""
    return {
        "case": str(case),
        "user": min(run.user for run in runs) / work.written,
        "system": min(run.system for run in runs) / work.written,
        "lock": work.lock,
        "holds": len(work.held) / work.written,
        "read": work.read,
        "traffic": work.traffic,
        "runs": [asdict(run) for run in runs],
    }


def predicted(case: Case, work: Work, wake: float) -> list[dict[str, Any]]:
    """Predict for servers: by default, with a thread for each processor, and at best."""
    rows = []
    for processors, server in SERVERS.items():
        machine = replace(server, wake=wake)
        best = best_threads(work, machine)
        every = bounds(work, machine)
        rows.append(
            {
                "case": str(case),
                "processors": processors,
                "bounds": {name: finite(bound) for name, bound in every.items()},
                "default": rate(work, machine, min(processors + 1, MAX_WORKERS)),
                "all": rate(work, machine, processors + 1),
                "best_threads": best,
                "best": rate(work, machine, best),
                "without_lock": min(bound for name, bound in every.items() if name != "lock"),
            }
        )
    return rows


def throttled(arguments: argparse.Namespace, work: Work, wake: float) -> list[dict[str, Any]]:
    """Compare the default conversion with the model, with the processors and the disk throttled."""
    if not can_throttle():
        return []
    shape, rows = (arguments.preset, arguments.layers, DEFAULT.source), []
    with costs.checkpoints(arguments.memory, *shape) as inputs:
        for quota in QUOTAS:
            with group("cpu", processors_limit(quota)) as limited:
                rows += compared(DEFAULT, inputs, work, Machine(quota, wake), 1, [limited])
    with costs.checkpoints(arguments.folder, *shape) as inputs:
        for read, write in DISKS:
            with group("blkio", disk_limit(arguments.folder, read, write)) as limited:
                machine = Machine(num_processors(), wake, read, write)
                rows += compared(DEFAULT, inputs, work, machine, 1, [limited])
    return rows


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the costs and the machine, and compare the model with what is measured."""
    wake = costs.wake()
    copying = {str(threads): costs.copy_speed(threads) for threads in (1, num_processors())}
    trials.say(f"wake {wake * 1e6:.0f} µs, copying {copying} GB/s")
    cases = [case for case in costs.CASES if not case.compiled or is_available()]
    works: dict[Case, Work] = {}
    described_cases, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        lock = costs.built_lock(Path(folder))
        for source in dict.fromkeys(case.source for case in cases):
            shape = arguments.preset, arguments.layers, source
            with costs.checkpoints(arguments.memory, *shape) as inputs:
                for case in (one for one in cases if one.source == source):
                    works[case], runs = costs.work(case, inputs, lock, arguments.runs)
                    described_cases.append(described(case, works[case], runs))
                    machine = Machine(num_processors(), wake)
                    rows += compared(case, inputs, works[case], machine, arguments.runs)
    return {
        "wake": wake,
        "copying": copying,
        "costs": described_cases,
        "trials": rows + throttled(arguments, works[DEFAULT], wake),
        "predictions": [row for case, work in works.items() for row in predicted(case, work, wake)],
    }


def main() -> None:
    parser = trials.options(__doc__, runs=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--memory", type=Path, default=Path("/dev/shm"), help="folder in memory for the data"
    )
    arguments = parser.parse_args()
    results = measured(arguments)
    trials.report(results, tables.cores(results), arguments.json)


if __name__ == "__main__":
    main()
