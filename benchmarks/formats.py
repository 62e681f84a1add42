"""Every format to every format, each against its floor, also at full size.

    python benchmarks/formats.py --preset 20b --layers 24 --float-layers 16 --json 20b.json

Source by source: writes a random checkpoint, measures in `--runs` turns all conversions of it, each
from a cold page cache, and deletes it. Then at most one source and one output are on the disk.
`--float-layers` makes pairs of floats smaller, whose output is as large as their source: 57 GB
together for 16 layers of 20b's shapes, as much as 24 layers of the other pairs.

A turn runs, for each pair, the conversion and the same under a `--limit` of memory that counts the
page cache. The first `--without-numba` turns run also the same as if numba were not installed,
where MXFP4 is decoded or encoded. The floor (`floor.py`) of a pair reads what its conversion reads
and writes as many bytes. Pairs that read and write the same number of bytes within 1 % share the
floor of their turn: the mean of a run before them and one after them, since a disk's speed drifts.
It is the faster of buffered and direct writing. Both run in the first turn of all; one that takes
more than 1.2 times as long as the other there is left out afterwards.
Every second turn runs the pairs in reverse order, so that none is always the last after its floor.

With `--json FILE` all runs are in FILE after each turn. The same command goes on where it was
interrupted, and with more `--runs` it adds turns. Prints medians, and medians of the ratios within
each turn. `--from` and `--to` choose some of the formats. Needs root, as `convert.py` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import tables
import trials
from measure import Failed

from gptoss_stream import formats

Runs: TypeAlias = dict[str, dict[str, Any]]
"""The measurement of each command, by name."""

WAYS = ("buffered", "direct")


def is_packed(name: str) -> bool:
    """Return whether a format stores MXFP4."""
    return bool(formats.mxfp4_tensors(formats.load(name).TABLE))


def sources(arguments: argparse.Namespace) -> dict[tuple[str, int], list[str]]:
    """Return the targets for each source: a format and a number of layers."""
    found: dict[tuple[str, int], list[str]] = {}
    names = formats.names()
    for source in arguments.sources or names:
        for target in arguments.targets or names:
            is_float = not is_packed(source) and not is_packed(target)
            layers = arguments.float_layers if is_float else arguments.layers
            found.setdefault((source, layers or arguments.layers), []).append(target)
    return found


def owners(sizes: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Return for each target the first one whose floor it shares.

    Args:
        sizes: For each target the bytes that are read and the bytes that are written.
    """
    found: dict[str, str] = {}
    for target, size in sizes.items():
        for owner in dict.fromkeys(found.values()):
            if all(abs(size[key] / sizes[owner][key] - 1) <= 0.01 for key in size):
                found[target] = owner
                break
        else:
            found[target] = target
    return found


def ways(turns: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """Return how to write the floor: both ways in the first turn of all, then those near the best.

    Args:
        turns: All earlier turns.
    """
    if not turns:
        return WAYS
    first = turns[0]["runs"].values()
    walls = {
        way: sum(runs.get(f"floor, {way}", {}).get("wall", 0) for runs in first) for way in WAYS
    }
    return [way for way, wall in walls.items() if wall <= 1.2 * min(walls.values())]


def one_turn(
    cases: Mapping[str, trials.Case],
    floors: Mapping[str, str],
    number: int,
    chosen_ways: Sequence[str],
    arguments: argparse.Namespace,
) -> dict[str, Runs]:
    """Run the floors and the conversions of a source once each.

    Args:
        cases: The conversion to each target.
        floors: For each target the one whose floor it shares.
        number: How many turns of the source there are.
        chosen_ways: How the floors are written.
        arguments: Of the command.
    """
    limit = trials.limit_nbytes(arguments.limit)
    runs: dict[str, Runs] = {target: {} for target in cases}
    for owner in dict.fromkeys(floors.values()):
        for way in chosen_ways:
            runs[owner][f"floor, {way}"] = floor(cases[owner], way)
        fastest = min(chosen_ways, key=lambda way: runs[owner][f"floor, {way}"]["wall"])
        group = [target for target in cases if floors[target] == owner]
        for target in reversed(group) if number % 2 else group:
            without_numba = number < arguments.without_numba
            runs[target] |= conversions(cases[target], limit, without_numba=without_numba)
            walls = ", ".join(f"{name} {run['wall']:.1f} s" for name, run in runs[target].items())
            trials.say(f"{cases[target].source.name} to {target}: {walls}")
        after = runs[owner][f"floor, {fastest}, after"] = floor(cases[owner], fastest)
        trials.say(f"floor, {fastest}, after: {after['wall']:.1f} s")
    return runs


def floor(case: trials.Case, way: str) -> dict[str, Any]:
    """Run the floor of a conversion, written in one of the `WAYS`."""
    return trials.as_json(trials.floor(case, *(["--direct"] if way == "direct" else [])))


def conversions(case: trials.Case, limit: int | None, *, without_numba: bool) -> Runs:
    """Run a conversion, also under a limit and without numba; a limit may be too low for it."""
    runs = {"convert": trials.as_json(trials.conversion(case))}
    if limit is not None:
        try:
            runs["convert, limited"] = trials.as_json(trials.conversion(case, limit=limit))
        except Failed as error:
            trials.say(str(error))
    if without_numba and is_packed(case.planned.source_format) != is_packed(case.target):
        runs["without numba"] = trials.as_json(trials.conversion(case, has_numba=False))
    return runs


def measured(
    arguments: argparse.Namespace, found: dict[str, Any], save: Callable[[], None]
) -> dict[str, Any]:
    """Measure the turns that are missing.

    Args:
        arguments: Of the command.
        found: What an earlier run of the same command found, or nothing; turns are added to it.
        save: Called after each turn.

    Returns:
        `found`: for each pair its sizes, and for each turn of a source all runs.

    Raises:
        ValueError: If the earlier run had other arguments.
    """
    keys = ("preset", "layers", "float_layers", "limit", "without_numba", "targets")
    chosen = {key: getattr(arguments, key) for key in keys}
    if found.setdefault("arguments", chosen) != chosen:
        raise ValueError(f"measured with other arguments: {found['arguments']}, not {chosen}")
    pairs, all_turns = found.setdefault("pairs", {}), found.setdefault("turns", [])
    for (source, layers), targets in sources(arguments).items():
        turns = [t for t in all_turns if (t["source"], t["layers"]) == (source, layers)]
        if len(turns) >= arguments.runs:
            continue
        with trials.checkpoint(arguments.folder, arguments.preset, layers, source) as folder:
            cases = {target: trials.case(folder, target) for target in targets}
            floors = owners({target: case.sizes for target, case in cases.items()})
            for target, case in cases.items():
                pairs[f"{source} to {target}"] = (
                    {"source": source, "target": target, "layers": layers}
                    | case.sizes | {"floor": floors[target]}
                )  # fmt: skip
            while len(turns) < arguments.runs:
                runs = one_turn(cases, floors, len(turns), ways(all_turns), arguments)
                turn = {"source": source, "layers": layers, "ended": trials.now(), "runs": runs}
                turns.append(turn)
                all_turns.append(turn)
                save()
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `measured` that not all benchmarks share."""
    parser.add_argument("--limit", default="256MB", help="limit of memory; 0 for none")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--float-layers", type=int, help="of pairs of floats; default: --layers")
    parser.add_argument(
        "--without-numba",
        type=int,
        default=0,
        metavar="TURNS",
        help="so many turns measure also as if numba were not installed",
    )
    names = formats.names()
    parser.add_argument("--from", nargs="+", choices=names, dest="sources", help="default: all")
    parser.add_argument("--to", nargs="+", choices=names, dest="targets", help="default: all")


def main() -> None:
    parser = trials.options(__doc__, runs=3)
    add_options(parser)
    arguments = parser.parse_args()
    file = None if arguments.json in (None, "-") else Path(arguments.json)
    found: dict[str, Any] = {}
    if file is not None and file.exists():
        found = trials.read_json(file)

    def save() -> None:
        if file is not None:
            trials.write_json(found, file)

    try:
        measured(arguments, found, save)
    except ValueError as error:
        parser.error(f"{file}: {error}")
    label = trials.layers_text(arguments.preset, arguments.layers)
    text = f"{label}; turns: {arguments.runs}\n{tables.conversions(found)}"
    trials.report(found, text, arguments.json)


if __name__ == "__main__":
    main()
