"""How a conversion scales over worker processes: measured on this machine, simulated for a cluster.

    python benchmarks/scaling.py --preset 20b --layers 4 --folder /some/disk

Measured, `--runs` times in turn from a cold page cache: one process with threads, `local:N` for
each of `--workers`, and an array of three tasks at the same time. Time is that of the conversion,
without the start of worker processes. On this machine all workers share the processors and the
disk; a cluster shares neither, or only the storage.

Simulated, for the whole of `--simulate` and 1 to 64 workers, by this model:

    cost of a shard   bytes written for it, spilled bytes included (`write_nbytes`)
    time of a shard   its cost / the rate of a single worker on this machine
    a worker          takes the costliest shard that is left when it has finished one
    storage           reads and writes at most B bytes a second for all workers
    time              start + max(the last worker's end, (bytes read + written) / B)

`start` (planning, registering workers, the index) is the time for a tiny checkpoint. Needs root,
for cold caches.
"""

from __future__ import annotations

import argparse
import heapq
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import trials
from measure import drop_caches

import gptoss_stream
from gptoss_stream.planning.shards import write_nbytes
from gptoss_stream.random_checkpoint import random_checkpoint
from gptoss_stream.writing.output_spec import OutputSpec

SIMULATED = (1, 2, 4, 8, 16, 32, 64)
BANDWIDTHS = (2e9, 10e9)


def converted(source: Path, *options: str, size: str) -> dict[str, Any]:
    """Convert from a cold page cache, and return the report."""
    output = source.parent / f"{source.name}-scaled"
    command = [sys.executable, "-m", "gptoss_stream", "convert", str(source), str(output)]
    drop_caches()
    time.sleep(1)
    try:
        done = subprocess.run(
            [*command, "--json", "--max-shard-size", size, *options],
            check=True,
            stdout=subprocess.PIPE,
        )
    finally:
        shutil.rmtree(output, ignore_errors=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def array(source: Path, tasks: int, size: str) -> float:
    """Run array tasks at the same time; returns seconds from the first start to the last end."""
    output = source.parent / f"{source.name}-scaled"
    command = [sys.executable, "-m", "gptoss_stream", "convert", str(source), str(output)]
    command += ["--quiet", "--max-shard-size", size, "--num-tasks", str(tasks), "--task-index"]
    drop_caches()
    time.sleep(1)
    begin = time.perf_counter()
    try:
        processes = [subprocess.Popen([*command, str(index)]) for index in range(tasks)]
        if sum(process.wait() for process in processes):
            raise RuntimeError("a task failed")
        return time.perf_counter() - begin
    finally:
        shutil.rmtree(output, ignore_errors=True)


def measured(arguments: argparse.Namespace, source: Path) -> dict[str, Any]:
    """Return the median time of each way to run, and the largest memory of a process."""
    ways: dict[str, list[str]] = {"threads": []}
    counts = dict.fromkeys([1, *arguments.workers])  # the simulation needs the cost of one worker
    ways |= {f"local:{n}": ["--scheduler", f"local:{n}"] for n in counts}
    seconds: dict[str, list[float]] = {name: [] for name in [*ways, "array of 3"]}
    peaks: dict[str, int] = {}
    for _ in range(arguments.runs):
        for name, options in ways.items():
            report = converted(source, *options, size=arguments.max_shard_size)
            seconds[name].append(report["seconds"])
            peaks[name] = max(peaks.get(name, 0), report["peak_rss"])
        seconds["array of 3"].append(array(source, 3, arguments.max_shard_size))
        trials.say(", ".join(f"{name} {runs[-1]:.1f} s" for name, runs in seconds.items()))
    return {
        name: {
            "seconds": statistics.median(runs),
            "runs": [round(run, 2) for run in runs],
            "peak_rss": peaks.get(name),
        }
        for name, runs in seconds.items()
    }


def sparse(folder: Path, preset: str) -> Path:
    """Write a checkpoint with headers and no data, which is enough for a plan."""
    checkpoint = random_checkpoint(preset)
    for name, data in checkpoint.files.items():
        (folder / name).write_bytes(data)
    spec = OutputSpec(checkpoint.identity, checkpoint.shards, checkpoint.files)
    (folder / "model.safetensors.index.json").write_bytes(spec.index)
    for shard in checkpoint.shards:
        with open(folder / shard.name, "wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    return folder


def last_end(seconds: Iterable[float], workers: int) -> float:
    """Return when the last worker ends, if each takes the longest task that is left."""
    ends = [0.0] * workers
    for task in sorted(seconds, reverse=True):
        heapq.heappush(ends, heapq.heappop(ends) + task)
    return max(ends)


def simulated(preset: str, rate: float, start: float, sizes: Sequence[str]) -> list[dict[str, Any]]:
    """Simulate a whole preset; returns seconds for each number of workers."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = sparse(Path(folder), preset)
        for size in sizes:
            planned = gptoss_stream.plan(source, max_shard_size=size)
            costs = [write_nbytes(shard) / rate for shard in planned.shards]
            moved = planned.source_nbytes + planned.nbytes + 2 * planned.spill_nbytes
            for workers in SIMULATED:
                end = last_end(costs, workers)
                times = {f"{b / 1e9:.0f} GB/s": start + max(end, moved / b) for b in BANDWIDTHS}
                rows.append(
                    {"shards": len(costs), "size": size, "workers": workers}
                    | {"unbounded": start + end, **times}
                )
    return rows


def tables(found: dict[str, Any]) -> str:
    """Return all results as tables."""
    lines = [f"{'':12} {'seconds':>8} {'to local:1':>11} {'peak RSS MB':>12}"]
    first = found["measured"]["local:1"]["seconds"]
    for name, row in found["measured"].items():
        peak = f"{row['peak_rss'] / 1e6:12.0f}" if row["peak_rss"] else ""
        lines.append(f"{name:12} {row['seconds']:8.1f} {row['seconds'] / first:11.2f} {peak}")
    lines.append(
        f"\none worker: {found['rate'] / 1e9:.2f} GB/s of cost; start {found['start']:.1f} s; "
        f"the whole {found['preset']}, seconds:"
    )
    storages = [key for key in found["simulated"][0] if key == "unbounded" or "GB/s" in key]
    lines.append(f"{'shards':>12} {'workers':>8} " + " ".join(f"{s:>10}" for s in storages))
    for row in found["simulated"]:
        label = f"{row['shards']} x {row['size']}"
        times = " ".join(f"{row[storage]:10.0f}" for storage in storages)
        lines.append(f"{label:>12} {row['workers']:8} {times}")
    return "\n".join(lines)


def main() -> None:
    parser = trials.options(__doc__, runs=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--max-shard-size", default="500MB")
    parser.add_argument("--simulate", default="120b", help="the preset that is simulated")
    arguments = parser.parse_args()
    with trials.checkpoint(arguments.folder, arguments.preset, arguments.layers) as source:
        planned = gptoss_stream.plan(source, max_shard_size=arguments.max_shard_size)
        ways = measured(arguments, source)
    with trials.checkpoint(arguments.folder, "tiny", 2) as tiny:
        report = converted(tiny, "--scheduler", "local:1", size="5GB")
    start = report["seconds"]
    rate = sum(map(write_nbytes, planned.shards)) / (ways["local:1"]["seconds"] - start)
    found = {
        "preset": arguments.simulate,
        "measured": ways,
        "rate": rate,
        "start": start,
        "simulated": simulated(arguments.simulate, rate, start, ["5GB", "1GB"]),
    }
    trials.report(found, tables(found), arguments.json)


if __name__ == "__main__":
    main()
