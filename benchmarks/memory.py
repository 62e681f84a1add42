"""The resident memory of a conversion over time, beside that of TransformerLens.

    python benchmarks/memory.py --preset 20b --layers 2 --folder /some/disk --json memory.json

Samples the memory of a conversion to `transformer-lens` and of the peer (`peer.py`) every 50 ms, in
one run of each from a cold page cache. `pictures.py` draws the samples. Needs root and the peer, as
`peers.py` does.
"""

from __future__ import annotations

import argparse
import shutil
from typing import Any

import peers
import trials
from measure import Measured, run

INTERVAL = 0.05
OURS, PEER = "gptoss_stream", peers.PEERS[0]


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Sample the memory of the conversion and of the peer over time, once each."""
    folder, preset, layers = arguments.folder, arguments.preset, arguments.layers
    with trials.checkpoint(folder, preset, layers, PEER.source_format) as source:
        case = trials.case(source, PEER.target)
        ours = trials.conversion(case, sample=INTERVAL)
        try:
            command = peers.peer_command(PEER.name, source, case.output)
            theirs = run(command, sample=INTERVAL)
        finally:
            shutil.rmtree(case.output, ignore_errors=True)
    samples = {OURS: _samples(ours), PEER.title: _samples(theirs)}
    return {"preset": preset, "layers": layers, **case.sizes, "samples": samples}


def _samples(measured: Measured) -> dict[str, Any]:
    """Return samples rounded to hundredths of seconds and to MB, the resolution of the picture."""
    times, sizes = zip(*measured.memory, strict=True)
    return {
        "wall": round(measured.wall, 2),
        "peak_rss": measured.peak_rss,
        "seconds": [round(time, 2) for time in times],
        "megabytes": [round(nbytes / 1e6) for nbytes in sizes],
    }


def main() -> None:
    parser = trials.options(__doc__, runs=1)
    parser.add_argument("--layers", type=int, default=2)
    found = measured(arguments := parser.parse_args())
    peaks = (f"{name}: {row['peak_rss'] / 1e6:.0f} MB" for name, row in found["samples"].items())
    trials.report(found, "\n".join(peaks), arguments.json)


if __name__ == "__main__":
    main()
