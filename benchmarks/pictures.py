"""Draws what the benchmarks measured, each picture as SVG and PNG.

    python benchmarks/pictures.py docs/benchmarks.json docs

`memory` is that of a conversion and of TransformerLens over time (`memory.py`), `throughput` that
of all pairs of formats beside their floors (`formats.py`), and `inference` the time that a model
takes (`inference.py`). The same numbers give the same bytes. Needs matplotlib.

The background is transparent and every colour a mid-tone that stands out on white and on a dark
page. The text of the SVGs is text, in the reader's own font.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tables
import trials
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Draw the sections of `benchmarks.json` that have been measured."""
    results = {name: entry["results"] for name, entry in found["sections"].items()}
    if "memory" in results:
        draw_memory(results["memory"], folder / "memory")
    if "conversions-20b" in results:
        draw_throughput(results["conversions-20b"], folder / "throughput")
    if "inference-20b" in results:
        draw_inference(results["inference-20b"], found.get("machine"), folder / "inference")


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


def draw_memory(found: Mapping[str, Any], path: Path) -> None:
    """Draw the memory of each program over time."""
    what = f"gpt-oss-{found['preset']}'s shapes, "
    what += "1 layer" if found["layers"] == 1 else f"{found['layers']} layers"
    series = sorted(found["samples"].items(), key=lambda item: -item[1]["wall"])
    with picture(path, 8, 3.9) as axes:
        for (name, samples), colour in zip(series, (THEIRS, OURS), strict=True):
            seconds = [*samples["seconds"], samples["wall"]]
            gigabytes = [megabytes / 1e3 for megabytes in (*samples["megabytes"], 0)]
            label = f"{name}: {_memory_text(samples['peak_rss'])} at most, {samples['wall']:.0f} s"
            axes.fill_between(seconds, gigabytes, color=colour, alpha=0.2, linewidth=0)
            axes.plot(seconds, gigabytes, color=colour, linewidth=2.5, label=label)
        axes.set_title(f"Memory while converting {what}", pad=52)
        axes.set(xlabel="seconds", ylabel="GB of resident memory", xlim=(0, None), ylim=(0, None))
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False)


def _memory_text(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def draw_throughput(found: Mapping[str, Any], path: Path) -> None:
    """Draw bytes read and written in a second, for each pair of formats and its floor."""
    first = trials.DEFAULT_SOURCE
    rows = sorted(tables.of_pairs(found), key=lambda row: (row["source"] != first, row["source"]))
    names = [f"{row['source']} → {row['target']}" for row in rows]
    moved = [(row["bytes_in"] + row["bytes_out"]) / 1e9 for row in rows]
    ours = [n / row["wall"] for n, row in zip(moved, rows, strict=True)]
    floors = [n / row["floor"] for n, row in zip(moved, rows, strict=True)]
    label = "floor: the same reads and writes"
    with picture(path, 8, 1.7 + 0.4 * len(rows)) as axes:
        axes.barh(names, floors, 0.72, color=FLOOR, alpha=0.45, label=label)
        axes.barh(names, ours, 0.4, color=OURS, label="gptoss_stream")
        for i, row in enumerate(rows):
            place = max(ours[i], floors[i]), i
            text = f"{1 / row['to_floor']:.0%}"
            axes.annotate(text, place, (6, 0), textcoords="offset points", va="center")
        axes.set_title(f"Speed of converting gpt-oss-{found['arguments']['preset']}", pad=34)
        axes.set(xlabel="GB read and written in a second", xlim=(0, 1.1 * max(*ours, *floors)))
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1), frameon=False, ncols=2, reverse=True
        )


def draw_inference(rows: Mapping[str, Any], machine: Mapping[str, Any] | None, path: Path) -> None:
    """Draw the seconds that a model takes, off MXFP4 and in bfloat16."""
    what = "gpt-oss-20b's shapes"
    if machine is not None:
        what += f", {machine['processors']} processors, {machine['memory'] / 2**30:.0f} GiB"
    keys = ("open to first logits", "64 tokens, warm", "256 tokens, warm", "a new token")
    ways = (
        ("direct", "straight off MXFP4 (14 GB)", OURS),
        ("bfloat16", "converted to bfloat16 (42 GB)", THEIRS),
    )
    with picture(path, 7.5, 3.6) as axes:
        for offset, (name, label, colour) in enumerate(ways):
            values = [rows[name]["median"][key] for key in keys]
            places = [place + 0.4 * offset for place in range(len(keys))]
            bars = axes.barh(places, values, height=0.36, color=colour, label=label)
            axes.bar_label(bars, [f"{value:.1f} s" for value in values], padding=4)
        axes.set_yticks([place + 0.2 for place in range(len(keys))], keys)
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.set_title(what, pad=14)
        axes.legend(frameon=False, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="what everything.py measured")
    parser.add_argument("output", type=Path, help="a folder")
    arguments = parser.parse_args()
    draw(trials.read_json(arguments.results), arguments.output)


if __name__ == "__main__":
    main()
