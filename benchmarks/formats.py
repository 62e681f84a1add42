"""Every format to every format, each against its floor, in one run.

    python benchmarks/formats.py --preset 20b --layers 2 --warm --folder /some/disk

Writes the same random checkpoint in each format. Then, `--runs` times in turn, measures each pair
as `convert.py` does: floors and conversion from a cold page cache, from a warm one (`--warm`),
and the conversion under a `--limit` of memory. The floor of a pair reads what the conversion
reads and writes as many bytes. `--from` and `--to` choose some of the formats. Prints medians,
and medians of the ratios within each turn: to the floor, of limited to unlimited, and of the time
for each byte written to that of the first pair. Needs root, as `convert.py` does.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from typing import Any

import trials

import gptoss_stream

FIRST = (trials.DEFAULT_SOURCE, "transformer-lens")


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the summary of every pair."""
    names = [
        pair
        for pair in trials.pairs()
        if pair[0] in (arguments.sources or pair) and pair[1] in (arguments.targets or pair)
    ]
    names.sort(key=lambda pair: pair != FIRST)
    limit = trials.limit_nbytes(arguments.limit)
    with ExitStack() as stack:
        sources = {
            name: stack.enter_context(
                trials.checkpoint(arguments.folder, arguments.preset, arguments.layers, name)
            )
            for name in dict.fromkeys(source for source, _ in names)
        }
        cases = {pair: trials.case(sources[pair[0]], pair[1]) for pair in names}
        turns = [
            {
                pair: trials.one_turn(case, limit=limit, warm=arguments.warm)
                for pair, case in cases.items()
            }
            for _ in range(arguments.runs)
        ]
    results = []
    for pair, case in cases.items():
        per_byte = [
            turn[pair]["convert"].wall / case.planned.nbytes
            / (turn[names[0]]["convert"].wall / cases[names[0]].planned.nbytes)
            for turn in turns
        ]  # fmt: skip
        results.append(
            {"source": pair[0], "target": pair[1], **case.sizes}
            | {"relative": statistics.median(per_byte)}
            | trials.summary([turn[pair] for turn in turns])
        )
    return results


def table(results: list[dict[str, Any]]) -> str:
    """Return the summary as a table; a dash stands for what was not measured."""
    head = f"{'':36} {'in':>6} {'out':>6}  {'cold':>6} {'floor':>6} {'ratio':>5}"
    head += f"  {'warm':>6} {'floor':>6} {'ratio':>5}  {'limited':>7} {'a byte':>6}"
    head += f" {'CPU':>6} {'RSS':>5}"
    units = f"{'':36} {'GB':>6} {'GB':>6}  {'s':>6} {'s':>6} {'':5}"
    units += f"  {'s':>6} {'s':>6} {'':5}  {'':7} {'':6} {'s':>6} {'MB':>5}"
    lines = [head, units]
    for row in results:
        line = f"{row['source']:16} to {row['target']:16} "
        line += f"{row['bytes_in'] / 1e9:6.2f} {row['bytes_out'] / 1e9:6.2f}"
        for cache in ("", trials.WARM):
            line += _cells(row.get(f"convert{cache}"), row.get(f"floor{cache}"))
        limited = row.get("convert, limited", {}).get("to_unlimited")
        peak = max(r["peak_rss"] for name, r in row.items() if name.startswith("convert"))
        line += f"  {'–' if limited is None else f'{limited:.2f}':>7} {row['relative']:6.2f}"
        lines.append(f"{line} {row['convert']['cpu']:6.1f} {peak / 1e6:5.0f}")
    return "\n".join(lines)


def _cells(convert: dict[str, Any] | None, floor: dict[str, Any] | None) -> str:
    if convert is None or floor is None:
        return f"  {'–':>6} {'–':>6} {'–':>5}"
    return f"  {convert['wall']:6.1f} {floor['wall']:6.1f} {convert['to_floor']:5.2f}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `measured` that not all benchmarks share."""
    trials.add_turn_options(parser)
    parser.add_argument("--layers", type=int, default=2)
    names = gptoss_stream.formats.names()
    parser.add_argument("--from", nargs="+", choices=names, dest="sources", help="default: all")
    parser.add_argument("--to", nargs="+", choices=names, dest="targets", help="default: all")


def main() -> None:
    parser = trials.options(__doc__)
    add_options(parser)
    arguments = parser.parse_args()
    results = measured(arguments)
    label = trials.layers_text(arguments.preset, arguments.layers)
    trials.report(results, f"{label}; turns: {arguments.runs}\n{table(results)}", arguments.json)


if __name__ == "__main__":
    main()
