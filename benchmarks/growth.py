"""How time and memory grow with the checkpoint, and how time grows with less memory.

    python benchmarks/growth.py --preset 20b --folder /some/disk

Converts a random checkpoint for each number of `--layers`, `--runs` times from a cold page cache,
and fits a line through wall time over bytes written: the constant, the time for each byte, and
the largest residual. Then converts one size (`--limit-layers`) without a limit and under each of
the `--limits` of memory, page cache included, in turn. Prints medians, and medians of the ratios
within each turn to the run without a limit. Needs root, as `convert.py` does, and the disk for
the largest source and its output: 56 GB for the 24 layers of 20b.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import tables
import trials
from measure import Failed, Measured, can_limit

from gptoss_stream.planning.options import DEFAULT_FORMAT
from gptoss_stream.planning.shards import parse_size

LAYERS = {"20b": [1, 2, 4, 8, 24], "120b": [1, 2, 4]}


def sizes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure conversions for each number of layers."""
    rows = []
    layers_of = LAYERS.get(arguments.preset, [1, 2, 4])
    for layers in layers_of if arguments.layers is None else arguments.layers:
        with trials.checkpoint(arguments.folder, arguments.preset, layers) as source:
            case = trials.case(source, arguments.to)
            runs = [trials.conversion(case) for _ in range(arguments.runs)]
        rows.append({"layers": layers, **case.sizes, **trials.medians(runs)})
        trials.say(f"{trials.layers_text(arguments.preset, layers)}: {rows[-1]['walls']} s")
    return rows


def line(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Fit a line through wall times over bytes written, and add each residual to its row.

    Returns:
        The line and its largest residual, or None for a single size.
    """
    written = [row["bytes_out"] for row in rows]
    if len(set(written)) < 2:
        return None
    slope, intercept = statistics.linear_regression(written, [row["wall"] for row in rows])
    for row in rows:
        row["residual"] = row["wall"] - (intercept + slope * row["bytes_out"])
    farthest = max(rows, key=lambda row: abs(row["residual"]))
    return {
        "intercept": intercept,
        "seconds_per_byte": slope,
        "largest_residual": farthest["residual"],
        "largest_residual_share": farthest["residual"] / farthest["wall"],
        "layers_of_largest": farthest["layers"],
    }


def limited(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure conversions without a limit, and under each limit of memory."""
    limits = [parse_size(text) for text in arguments.limits] if can_limit() else []
    if not limits:
        return []
    with trials.checkpoint(arguments.folder, arguments.preset, arguments.limit_layers) as source:
        case = trials.case(source, arguments.to)
        turns = [
            {limit: _tried(case, limit) for limit in (None, *limits)} for _ in range(arguments.runs)
        ]
    rows = []
    for limit in (None, *limits):
        runs = [turn[limit] for turn in turns]
        free = [turn[None] for turn in turns]
        row: dict[str, Any] = {"limit": limit, "failed": runs.count(None)}
        pairs = [(a, b) for a, b in zip(runs, free, strict=True) if a and b]
        if pairs:
            row |= trials.medians([a for a, _ in pairs])
            row["to_unlimited"] = trials.ratio([a for a, _ in pairs], [b for _, b in pairs])
        rows.append(row)
    return rows


def _tried(case: trials.Case, limit: int | None) -> Measured | None:
    """Measure a conversion under a limit; returns None if it runs out of memory."""
    what = "no limit" if limit is None else f"{limit / 1e6:.0f} MB"
    try:
        measured = trials.conversion(case, limit=limit)
    except Failed as error:
        if limit is None:
            raise
        trials.say(f"{what}: {error}")
        return None
    trials.say(f"{what}: {measured.wall:.1f} s")
    return measured


def main() -> None:
    parser = trials.options(__doc__, runs=3)
    parser.add_argument(
        "--layers",
        type=int,
        nargs="*",
        help="20b: 1 2 4 8 24; 120b: 1 2 4; give no value to run only under limits",
    )
    parser.add_argument("--to", default=DEFAULT_FORMAT)
    parser.add_argument(
        "--limits",
        nargs="*",
        default=["192MB", "256MB", "512MB", "2GB"],
        help="give no value to run without limits",
    )
    parser.add_argument(
        "--limit-layers", type=int, default=2, help="the number of layers that is run under limits"
    )
    arguments = parser.parse_args()
    grown = sizes(arguments)
    results = {"sizes": grown, "line": line(grown), "limits": limited(arguments)}
    what = f"{arguments.preset} to {arguments.to}; runs of each: {arguments.runs}"
    if results["limits"]:
        what += f"; limits: {trials.layers_text(arguments.preset, arguments.limit_layers)}"
    trials.report(results, f"{what}\n{tables.growth(results)}", arguments.json)


if __name__ == "__main__":
    main()
