"""Tables of what the benchmarks measured, as Markdown: for the terminal and for the documentation.

Nothing here measures, or needs more than the measurements.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FLOORS = ("floor, buffered", "floor, direct")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose columns are aligned also as text."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    line = "|".join("-" * (width + 2) for width in widths)
    body = [" | ".join(f"{c:{w}}" for c, w in zip(r, widths, strict=True)) for r in (head, *rows)]
    return "\n".join([f"| {body[0]} |", f"|{line}|", *(f"| {row} |" for row in body[1:])])


def of_pairs(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the medians of each pair of formats that `formats.py` measured.

    The floor of a turn is the fastest floor that ran in it. Ratios are within a turn.

    Returns:
        For each pair its sizes and, where they were measured: `wall`, `floor`, `to_floor`,
        `to_unlimited`, `without_numba` (a ratio of wall times), `cpu` and `peak_rss`.
    """
    rows = []
    for pair in found["pairs"].values():
        turns = [
            (turn["runs"][pair["target"]], turn["runs"][pair["floor"]])
            for turn in found["turns"]
            if (turn["source"], turn["layers"]) == (pair["source"], pair["layers"])
        ]
        if not turns:
            continue
        runs = [turn for turn, _ in turns]
        floors = [min(of[way]["wall"] for way in FLOORS if way in of) for _, of in turns]
        walls = [run["convert"]["wall"] for run in runs]
        row = {key: pair[key] for key in ("source", "target", "layers", "bytes_in", "bytes_out")}
        row |= {
            "turns": len(turns),
            "wall": statistics.median(walls),
            "floor": statistics.median(floors),
            "to_floor": statistics.median(w / f for w, f in zip(walls, floors, strict=True)),
            "cpu": statistics.median(run["convert"]["cpu"] for run in runs),
            "peak_rss": max(one["peak_rss"] for run in runs for one in _conversions(run)),
        }
        for name, key in (("convert, limited", "to_unlimited"), ("without numba", "without_numba")):
            ratios = [run[name]["wall"] / run["convert"]["wall"] for run in runs if name in run]
            if ratios:
                row[key] = statistics.median(ratios)
        rows.append(row)
    return rows


def _conversions(runs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [run for name, run in runs.items() if name not in FLOORS]


def conversions(found: Mapping[str, Any]) -> str:
    """Return a row for each pair of formats; a dash stands for what was not measured."""
    rows = of_pairs(found)
    has_numba = any("without_numba" in row for row in rows)
    head = ["", "in, out", "convert", "floor", "ratio to floor", "limited, ratio to unlimited"]
    head += ["without numba, ratio to with"] if has_numba else []
    head += ["CPU per GB written", "peak RSS"]
    body = []
    for row in rows:
        cells = [
            f"`{row['source']}` to `{row['target']}`",
            f"{row['bytes_in'] / 1e9:.1f}, {row['bytes_out'] / 1e9:.1f} GB",
            f"{row['wall']:.1f} s",
            f"{row['floor']:.1f} s",
            f"{row['to_floor']:.2f}",
            _ratio(row.get("to_unlimited")),
        ]
        cells += [_ratio(row.get("without_numba"))] if has_numba else []
        cells += [f"{row['cpu'] / row['bytes_out'] * 1e9:.2f} s", f"{row['peak_rss'] / 1e6:.0f} MB"]
        body.append(cells)
    return markdown(head, body)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
