"""The time and memory in which a converted folder opens as a HookedTransformer.

    python benchmarks/opening.py --preset 20b --layers 2 4 --folder /some/disk

Converts a random checkpoint of each number of `--layers` to `transformer-lens`, and opens the
output, `--runs` times from a cold page cache. Prints medians: the time, and by how much the
process's own (anonymous) memory has grown. Needs root, as `convert.py` does.
"""

from __future__ import annotations

import shutil
import statistics
from typing import Any

import inference
import tables
import trials

import gptoss_stream


def opened(source: trials.Case, runs: int) -> dict[str, Any]:
    """Convert a checkpoint, and open the output."""
    try:
        gptoss_stream.convert(source.source, source.output, overwrite=True)
        uses = [
            inference.use("hooked", source.output, "--tokens", "--new", "0") for _ in range(runs)
        ]
    finally:
        shutil.rmtree(source.output, ignore_errors=True)
    found = [use for use in uses if use is not None]
    return {
        "bytes": source.planned.nbytes,
        "seconds": statistics.median(run["load"] for run in found),
        "anonymous": statistics.median(run["opened"] for run in found),
    }


def main() -> None:
    parser = trials.options(__doc__, runs=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    rows = []
    for layers in arguments.layers:
        with trials.checkpoint(arguments.folder, arguments.preset, layers) as source:
            rows.append({"layers": layers, **opened(trials.case(source), arguments.runs)})
    trials.report(rows, tables.opening(rows), arguments.json)


if __name__ == "__main__":
    main()
