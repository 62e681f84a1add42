"""Every source format to every layout, against the first of them, in one run.

    python benchmarks/formats.py --preset 20b --layers 2 --folder /some/disk

Makes the same random checkpoint in each format and then, `--runs` times in turn and each from a
cold page cache, converts each to each layout, and again under `--limit` of memory, page cache
included. Prints medians: wall time, time for each byte written relative to hf-mxfp4 to
transformer-lens within the same turn, and limited to unlimited. Needs root, as `convert.py` does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from convert import conversion
from measure import can_limit

import gptoss_stream
from gptoss_stream.planner import parse_size

FIRST = ("hf-mxfp4", "transformer-lens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="20b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--limit", default="256MB", help="of memory; 0 for none")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    limit = parse_size(arguments.limit) if arguments.limit != "0" and can_limit() else None
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(s, t) for s in gptoss_stream.sources.names() for t in gptoss_stream.layouts.names()]
    pairs.sort(key=lambda pair: pair != FIRST)
    for source in gptoss_stream.sources.names():
        gptoss_stream.synth(
            folder / source,
            arguments.preset,
            layers=arguments.layers,
            format=source,
            overwrite=True,
        )
    plans = {pair: gptoss_stream.plan(folder / pair[0], layout=pair[1]) for pair in pairs}
    written = {pair: planned.nbytes for pair, planned in plans.items()}
    read = {pair: planned.source_nbytes for pair, planned in plans.items()}
    rows: dict[tuple[str, str], dict[str, list[float]]] = {
        pair: {"wall": [], "cpu": [], "peak_rss": [], "relative": [], "limited": []}
        for pair in pairs
    }
    for _ in range(arguments.runs):
        base = 0.0
        for pair in pairs:
            source, layout = pair
            measured = conversion(folder / source, folder, "--layout", layout)
            row = rows[pair]
            row["wall"].append(measured.wall)
            row["cpu"].append(measured.cpu)
            row["peak_rss"].append(measured.peak_rss)
            base = base or measured.wall / written[pair]
            row["relative"].append(measured.wall / written[pair] / base)
            if limit is not None:
                slow = conversion(folder / source, folder, "--layout", layout, limit=limit)
                row["limited"].append(slow.wall / measured.wall)
                row["peak_rss"].append(slow.peak_rss)
            print(f"{source} to {layout}: {measured.wall:.1f} s", file=sys.stderr, flush=True)
    for source in gptoss_stream.sources.names():
        shutil.rmtree(folder / source)
    results = [_summary(pair, rows[pair], read[pair], written[pair]) for pair in pairs]
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(
            f"{result['source']:8} to {result['layout']:16} "
            f"{result['bytes_in'] / 1e9:5.2f} GB in, {result['bytes_out'] / 1e9:5.2f} GB out, "
            f"{result['wall']:5.1f} s, CPU {result['cpu']:5.1f} s; for each byte "
            f"{result['relative']:4.2f} times the first; "
            f"limited {result['limited'] or 0:4.2f} times; "
            f"{result['peak_rss'] / 1e6:3.0f} MB"
        )


def _summary(
    pair: tuple[str, str], row: dict[str, list[float]], read: int, written: int
) -> dict[str, Any]:
    return {
        "source": pair[0],
        "layout": pair[1],
        "bytes_in": read,
        "bytes_out": written,
        "wall": statistics.median(row["wall"]),
        "walls": [round(wall, 2) for wall in row["wall"]],
        "cpu": statistics.median(row["cpu"]),
        "peak_rss": max(row["peak_rss"]),
        "relative": statistics.median(row["relative"]),
        "limited": statistics.median(row["limited"]) if row["limited"] else None,
    }


if __name__ == "__main__":
    main()
