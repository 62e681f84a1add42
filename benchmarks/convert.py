"""Converting against the floor, from a cold and a warm page cache, and under a memory limit.

    python benchmarks/convert.py --preset 20b --layers 1 2 4 --warm --folder /some/disk

Writes a random checkpoint for each number of layers. Then, `--runs` times in turn, runs the floor
(`floor.py`) with buffered and with direct writing, and the conversion, from a cold page cache; the
same with the source in the page cache (`--warm`); and the conversion under a `--limit` of memory,
page cache included, from a cold cache. Prints medians, and medians of the ratios within each turn
to the faster floor. Needs root, for cold caches and limits.
"""

from __future__ import annotations

from typing import Any

import trials


def table(label: str, rows: dict[str, Any]) -> str:
    """Return the summary as a table."""
    lines = [f"{label}: {rows['bytes_in'] / 1e9:.2f} GB in, {rows['bytes_out'] / 1e9:.2f} GB out"]
    lines.append(f"  {'':22} {'wall s':>8} {'to floor':>9} {'CPU s':>7} {'peak RSS MB':>12}")
    lines += [
        f"  {name:22} {row['wall']:8.1f} {row['to_floor']:9.2f} {row['cpu']:7.1f} "
        f"{row['peak_rss'] / 1e6:12.0f}"
        for name, row in rows.items()
        if isinstance(row, dict)
    ]
    if "convert, limited" in rows:
        lines.append(f"  limited to unlimited: {rows['convert, limited']['to_unlimited']:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = trials.options(__doc__)
    trials.add_turn_options(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    limit = trials.limit_nbytes(arguments.limit)
    results = {}
    for layers in arguments.layers:
        with trials.checkpoint(arguments.folder, arguments.preset, layers) as source:
            case = trials.case(source)
            turns = [
                trials.one_turn(case, limit=limit, warm=arguments.warm)
                for _ in range(arguments.runs)
            ]
        results[trials.layers_text(arguments.preset, layers)] = case.sizes | trials.summary(turns)
    trials.report(results, "\n".join(table(*pair) for pair in results.items()), arguments.json)


if __name__ == "__main__":
    main()
