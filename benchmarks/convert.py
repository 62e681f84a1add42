"""Converting against the floor, under a memory limit, and against the peer, in one run.

    python benchmarks/convert.py --preset 20b --layers 1 2 4 --folder /some/disk --peer

Makes a random checkpoint for each number of layers and then, `--runs` times in turn and each from
a cold page cache: the floor (`floor.py`) with buffered and with direct writing, the conversion,
and the conversion under `--limit` of memory, page cache included. Prints a table of medians and
of ratios within each turn, and JSON with `--json`. Needs root, for cold caches and limits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from measure import Measured, can_limit, run

import gptoss_stream
from gptoss_stream.planner import parse_size
from gptoss_stream.workers import count_workers

HERE = Path(__file__).parent


def floor(source: Path, folder: Path, nbytes: int, *options: str) -> Measured:
    """The floor with these options of floor.py."""
    output = folder / "floor"
    threads = str(count_workers(None))
    command = [sys.executable, str(HERE / "floor.py"), str(source), str(output), str(nbytes)]
    try:
        return run([*command, "--threads", threads, *options])
    finally:
        output.unlink(missing_ok=True)


def conversion(source: Path, folder: Path, *arguments: str, **options: Any) -> Measured:
    """The conversion as a user runs it."""
    output = folder / "converted"
    command = [sys.executable, "-m", "gptoss_stream", "convert", str(source), str(output)]
    try:
        return run([*command, *arguments], **options)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def peer(source: Path, folder: Path) -> Measured:
    """transformers and TransformerLens."""
    output = folder / "peer.safetensors"
    try:
        return run([sys.executable, str(HERE / "peer.py"), str(source), str(output)])
    finally:
        output.unlink(missing_ok=True)


def one_turn(source: Path, folder: Path, nbytes: int, limit: int | None) -> dict[str, Measured]:
    """Each of the things compared, once, one after the other."""
    turn = {
        "floor, buffered": floor(source, folder, nbytes),
        "floor, direct": floor(source, folder, nbytes, "--direct"),
        "convert": conversion(source, folder),
    }
    if limit is not None:
        turn["convert, limited"] = conversion(source, folder, limit=limit)
    walls = ", ".join(f"{name} {measured.wall:.1f} s" for name, measured in turn.items())
    print(walls, file=sys.stderr, flush=True)
    return turn


def summary(turns: list[dict[str, Measured]], peers: list[Measured]) -> dict[str, Any]:
    """Medians, and medians of the ratios within each turn."""
    rows: dict[str, Any] = {}
    for name in turns[0]:
        runs = [turn[name] for turn in turns]
        rows[name] = {
            "wall": statistics.median(r.wall for r in runs),
            "walls": [round(r.wall, 2) for r in runs],
            "cpu": statistics.median(r.cpu for r in runs),
            "peak_rss": max(r.peak_rss for r in runs),
        }
    quicker = min(("floor, buffered", "floor, direct"), key=lambda name: rows[name]["wall"])
    rows["floor"] = quicker
    for name in turns[0]:
        ratios = [turn[name].wall / turn[quicker].wall for turn in turns]
        rows[name]["to_floor"] = statistics.median(ratios)
    if "convert, limited" in turns[0]:
        ratios = [turn["convert, limited"].wall / turn["convert"].wall for turn in turns]
        rows["limited_to_unlimited"] = statistics.median(ratios)
    if peers:
        wall = statistics.median(r.wall for r in peers)
        rows["peer"] = {
            "wall": wall,
            "walls": [round(r.wall, 2) for r in peers],
            "cpu": statistics.median(r.cpu for r in peers),
            "peak_rss": max(r.peak_rss for r in peers),
            "to_floor": wall / rows[quicker]["wall"],
        }
        rows["peer_to_convert"] = wall / rows["convert"]["wall"]
    return rows


def table(label: str, rows: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [f"{label}: {rows['bytes_in'] / 1e9:.2f} GB in, {rows['bytes_out'] / 1e9:.2f} GB out"]
    lines.append(f"  {'':18} {'wall s':>8} {'to floor':>9} {'CPU s':>7} {'peak RSS MB':>12}")
    for name, row in rows.items():
        if isinstance(row, dict):
            lines.append(
                f"  {name:18} {row['wall']:8.1f} {row['to_floor']:9.2f} {row['cpu']:7.1f} "
                f"{row['peak_rss'] / 1e6:12.0f}"
            )
    if "limited_to_unlimited" in rows:
        lines.append(f"  limited to unlimited: {rows['limited_to_unlimited']:.2f}")
    if "peer_to_convert" in rows:
        lines.append(f"  the peer takes {rows['peer_to_convert']:.1f} times as long")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="20b")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", default="256MB", help="of memory; 0 for none")
    parser.add_argument("--peer", action="store_true", help="run the peer too (11 GB of memory)")
    parser.add_argument("--peer-runs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    limit = parse_size(arguments.limit) if arguments.limit != "0" and can_limit() else None
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for layers in arguments.layers:
        source = arguments.folder / f"{arguments.preset}-{layers}"
        gptoss_stream.synth(source, arguments.preset, layers=layers, overwrite=True)
        planned = gptoss_stream.plan(source)
        turns = [
            one_turn(source, arguments.folder, planned.nbytes, limit) for _ in range(arguments.runs)
        ]
        peers = [
            peer(source, arguments.folder) for _ in range(arguments.peer_runs * arguments.peer)
        ]
        label = f"{arguments.preset}, {layers} layer{'s' * (layers > 1)}"
        rows = summary(turns, peers)
        rows |= {"bytes_in": planned.source_nbytes, "bytes_out": planned.nbytes}
        results[label] = rows
        shutil.rmtree(source)
        if not arguments.json:
            print(table(label, rows), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
