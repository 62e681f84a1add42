"""Two pictures: memory over time beside the peer, and throughput beside the floor.

    python benchmarks/pictures.py --preset 20b --layers 2 --folder /some/disk
    python benchmarks/pictures.py --preset 20b --layers 2 --throughput formats.json
    python benchmarks/pictures.py --draw docs/pictures.json

Measures, writes `pictures.json` into `--output` (docs/ of the repository), and draws `memory` and
`throughput` there, each as SVG and PNG; `--draw` only draws, and the same numbers give the same
bytes. Memory is the resident memory of a conversion to `transformer-lens` and of
TransformerLens (`peer.py`), sampled every 50 ms in one run of each. Throughput is measured as by
`formats.py` in `--runs` turns, or taken from its JSON (`--throughput`).
Needs root, matplotlib and the peer, as `peers.py` does.

The background is transparent and every colour a mid-tone that stands out on white and on a dark
page. The text of the SVGs is text, in the reader's own font.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import formats
import peers
import trials
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import Measured, run

INTERVAL = 0.05
PEER = peers.PEERS[0]

INK, OURS, THEIRS, FLOOR = "#7b8087", "#2f7fe0", "#d9652b", "#8b949e"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "gptoss_stream",
}


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure what both pictures show; returns JSON types."""
    return {
        "preset": arguments.preset,
        "layers": arguments.layers,
        "memory": memory(arguments),
        "throughput": json.loads(arguments.throughput.read_text())
        if arguments.throughput
        else formats.measured(arguments),
    }


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
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
    trials.say(f"memory: {ours.peak_rss / 1e6:.0f} MB, the peer {theirs.peak_rss / 1e6:.0f} MB")
    return {**case.sizes, "gptoss_stream": _samples(ours), PEER.title: _samples(theirs)}


def _samples(measured: Measured) -> dict[str, Any]:
    """Return samples rounded to hundredths of seconds and to MB, the resolution of the picture."""
    times, sizes = zip(*measured.memory, strict=True)
    return {
        "wall": round(measured.wall, 2),
        "peak_rss": measured.peak_rss,
        "seconds": [round(time, 2) for time in times],
        "megabytes": [round(nbytes / 1e6) for nbytes in sizes],
    }


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Draw both pictures, as SVG and PNG."""
    what = f"gpt-oss-{results['preset']}'s shapes, {results['layers']} "
    what += "layer" if results["layers"] == 1 else "layers"
    with picture(folder / "memory", 8, 3.9) as axes:
        _draw_memory(axes, results["memory"], what)
    first = formats.FIRST[0]
    rows = sorted(results["throughput"], key=lambda row: (row["source"] != first, row["source"]))
    with picture(folder / "throughput", 8, 1.7 + 0.45 * len(rows)) as axes:
        _draw_throughput(axes, rows, what)


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Axes]:
    """Return axes to draw in; the size is in inches, each of which is 100 pixels in a README."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot()
        no_dates = {"Date": None, "Creator": None}
        figure.savefig(path.with_suffix(".svg"), transparent=True, metadata=no_dates)
        figure.savefig(
            path.with_suffix(".png"), transparent=True, dpi=200, metadata={"Software": None}
        )


def _draw_memory(axes: Axes, samples: Mapping[str, Any], what: str) -> None:
    for name, colour in ((PEER.title, THEIRS), ("gptoss_stream", OURS)):
        series = samples[name]
        seconds = [*series["seconds"], series["wall"]]
        gigabytes = [megabytes / 1e3 for megabytes in (*series["megabytes"], 0)]
        label = f"{name}: {_memory_text(series['peak_rss'])} at most, {series['wall']:.0f} s"
        axes.fill_between(seconds, gigabytes, color=colour, alpha=0.2, linewidth=0)
        axes.plot(seconds, gigabytes, color=colour, linewidth=2.5, label=label)
    axes.set_title(f"Memory while converting {what}", pad=52)
    axes.set(xlabel="seconds", ylabel="GB of resident memory", xlim=(0, None), ylim=(0, None))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False)


def _memory_text(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def _draw_throughput(axes: Axes, rows: Sequence[Mapping[str, Any]], what: str) -> None:
    names = [f"{row['source']} → {row['target']}" for row in rows]
    moved = [(row["bytes_in"] + row["bytes_out"]) / 1e9 for row in rows]
    ours = [n / row["convert"]["wall"] for n, row in zip(moved, rows, strict=True)]
    floors = [n / row["floor"]["wall"] for n, row in zip(moved, rows, strict=True)]
    axes.barh(
        names, floors, 0.72, color=FLOOR, alpha=0.45, label="floor: the same reads and writes"
    )
    axes.barh(names, ours, 0.4, color=OURS, label="gptoss_stream")
    for i, row in enumerate(rows):
        text = f"{1 / row['convert']['to_floor']:.0%}"
        axes.annotate(
            text, (max(ours[i], floors[i]), i), (6, 0), textcoords="offset points", va="center"
        )
    axes.set_title(f"Speed of converting {what}", pad=34)
    axes.set(xlabel="GB read and written in a second", xlim=(0, 1.1 * max(*ours, *floors)))
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False, ncols=2, reverse=True)


def main() -> None:
    parser = trials.options(__doc__, runs=3, reports=False)
    formats.add_options(parser)
    parser.set_defaults(limit="0")  # the pictures show no limit
    parser.add_argument("--draw", type=Path, metavar="FILE", dest="results", help="only draw")
    parser.add_argument("--throughput", type=Path, metavar="FILE", help="JSON of formats.py")
    parser.add_argument("--output", type=Path, default=trials.HERE.parent / "docs", help="a folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.results is not None:
        draw(json.loads(arguments.results.read_text()), arguments.output)
        return
    results = measured(arguments)
    (arguments.output / "pictures.json").write_text(f"{json.dumps(results)}\n")
    draw(results, arguments.output)


if __name__ == "__main__":
    main()
