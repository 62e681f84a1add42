"""A conversion from a Hub to a Hub: wall time, traffic, peak memory and peak disk.

    python benchmarks/remote.py --preset 120b
    python benchmarks/remote.py --preset 120b --layers 4 --xet

A server on loopback (the tests' stand-in for the Hub, in its own process) generates the bytes of
the source on request, and hashes what it receives without keeping it: neither the source nor the
output is on a disk. With `--xet` hf_xet uploads, to a folder on the disk that is its stand-in for a
server. The conversion is the command that a user runs. In the end some shards are
written again, from the same random numbers and without any network, and their SHA-256 are
compared with those of the server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import tables
import trials

import gptoss_stream
from gptoss_stream.planning.shards import PlannedShard
from gptoss_stream.random_checkpoint import RandomCheckpoint, random_checkpoint
from gptoss_stream.writing.executor import Callbacks
from gptoss_stream.writing.output_spec import OutputSpec
from gptoss_stream.writing.shard_summary import ShardSummary
from gptoss_stream.writing.thread_executor import ThreadExecutor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/helpers"))

SOURCE, TARGET = "openai/random", "someone/converted"


@dataclass(frozen=True)
class GeneratedShard:
    """A shard whose bytes are generated on request."""

    checkpoint: RandomCheckpoint
    shard: PlannedShard

    @property
    def nbytes(self) -> int:
        return self.shard.nbytes

    @property
    def sha256(self) -> str:
        return f"{abs(hash((self.shard.name, self.nbytes))):064x}"  # only a name

    def read(self, begin: int, end: int) -> bytes:
        return self.checkpoint.read(self.shard, begin, end)


def serve(preset: str, layers: int | None, xet: Path | None) -> None:
    """Run the server: print the endpoint and then, for each line on stdin, its counts.

    Args:
        preset: Of the source.
        layers: Of the source; None for all.
        xet: The folder that hf_xet uploads to, if it does.
    """
    from stand_in_hub import StandInHub  # type: ignore[import-not-found]

    checkpoint = random_checkpoint(preset, layers=layers)
    index = OutputSpec(checkpoint.identity, checkpoint.shards, {}).index
    with StandInHub(keep=False, log=False) as hub:
        hub.add_repo(
            SOURCE,
            {
                **checkpoint.files,
                "model.safetensors.index.json": index,
                **{shard.name: GeneratedShard(checkpoint, shard) for shard in checkpoint.shards},
            },
        )
        hub.reset_counts()
        hub.xet = xet
        print(hub.endpoint, flush=True)
        for _ in sys.stdin:
            files = hub.files(TARGET, "main")
            found = {
                name: [c.nbytes, c.sha256] for name, c in files.items() if hasattr(c, "sha256")
            }
            counted = {"sent": hub.bytes_sent, "received": hub.bytes_received, "files": found}
            print(json.dumps(counted), flush=True)


class DiskSampler:
    """Samples the size of a folder twice a second, and keeps the largest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peak = 0
        self._stopped = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._stopped.wait(0.5):
            nbytes = 0
            for file in self.folder.rglob("*"):
                try:
                    nbytes += file.stat().st_blocks * 512
                except OSError:
                    continue  # just deleted
            self.peak = max(self.peak, nbytes)

    def stop(self) -> None:
        self._stopped.set()


def checksums_of(preset: str, layers: int | None, names: list[str], folder: Path) -> dict[str, str]:
    """Write some of the output's shards without any network, and return their SHA-256."""
    checkpoint = random_checkpoint(preset, layers=layers)
    planned = gptoss_stream.plan(f"hf://{SOURCE}")
    checksums: dict[str, str] = {}
    (folder / "parts").mkdir()

    def keep(name: str, summary: ShardSummary) -> None:
        checksums[name] = str(summary.sha256)

    for shard in planned.shards:
        if shard.name in names:
            ThreadExecutor(checkpoint.reader, 3).write_shards(
                [shard],
                folder,
                folder / "parts",
                Callbacks(before_commit=keep),
                checksums=True,
            )
            (folder / shard.name).unlink()
    return checksums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="120b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--max-staged", type=int, default=2)
    parser.add_argument("--limit", type=int, help="bytes of memory, page cache included")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--check", type=int, default=3, help="the number of shards to write again")
    parser.add_argument("--xet", action="store_true", help="upload by hf_xet")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="see formats.py")
    arguments = parser.parse_args()
    if arguments.serve:
        xet = arguments.serve / "xet" if arguments.xet else None
        serve(arguments.preset, arguments.layers, xet)
        return
    result = measured(arguments)
    trials.report(result, tables.remote(result), arguments.json)


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the server and the conversion, and check some of its shards."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=arguments.folder.resolve()))
    options = [*(["--layers", str(arguments.layers)] if arguments.layers else [])]
    if arguments.xet:
        (folder / "xet").mkdir()
        options.append("--xet")
    command = [sys.executable, __file__, "--serve", str(folder), "--preset", arguments.preset]
    with subprocess.Popen(
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        os.environ |= {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_XET": "0" if arguments.xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "home"),
        }
        disk = DiskSampler(folder / "staging")
        try:
            result = converted(arguments, folder)
            server.stdin.write("\n")
            server.stdin.flush()
            counted = json.loads(server.stdout.readline())
            checked = check(arguments, counted["files"], folder)
        finally:
            disk.stop()
            server.stdin.close()
            shutil.rmtree(folder, ignore_errors=True)
    return result | {
        "preset": arguments.preset,
        "layers": arguments.layers,
        "xet": arguments.xet,
        "sent": counted["sent"],
        "received": counted["received"],
        "traffic": counted["sent"] / result["needed"],
        "peak_disk": disk.peak,
        "checked": checked,
    }


def converted(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the command, and return its times and sizes."""
    planned = gptoss_stream.plan(f"hf://{SOURCE}")
    command = [sys.executable, "-m", "gptoss_stream", "convert", f"hf://{SOURCE}", f"hf://{TARGET}"]
    staging = ["--staging", str(folder / "staging"), "--max-staged", str(arguments.max_staged)]
    began = time.strftime("%H:%M:%S")
    print(f"began at {began}", file=sys.stderr, flush=True)
    measured = measure.run([*command, *staging], limit=arguments.limit)
    return {
        "wall": measured.wall,
        "cpu": measured.cpu,
        "peak_rss": measured.peak_rss,
        "needed": planned.source_nbytes,
        "written": planned.nbytes,
        "shards": len(planned.shards),
    }


def check(
    arguments: argparse.Namespace, files: dict[str, tuple[int, str]], folder: Path
) -> list[str]:
    """Compare some shards, evenly chosen, with those of the server; raises `RuntimeError`."""
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    step = max(1, len(shards) // max(1, arguments.check))
    names = [*dict.fromkeys([*shards[::step][: arguments.check - 1], shards[-1]])]
    for name, digest in checksums_of(arguments.preset, arguments.layers, names, folder).items():
        if files[name][1] != digest:
            raise RuntimeError(f"{name}: the server received other bytes than the plan requires")
    return names


if __name__ == "__main__":
    main()
