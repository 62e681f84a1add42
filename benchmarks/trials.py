"""What the benchmarks share: options, checkpoints and commands.

Everything that is compared is a command in its own process. It runs from a cold page cache or,
`warm`, with the source in the cache. A turn runs all commands one after another, so that ratios
within a turn compare runs under the same conditions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from measure import Measured, can_limit, run

import gptoss_stream
from gptoss_stream import Plan
from gptoss_stream._utils.thread_pool import count_workers
from gptoss_stream.planning.options import DEFAULT_FORMAT
from gptoss_stream.planning.shards import parse_size
from gptoss_stream.transforms.output_tensor import element_ranges
from gptoss_stream.writing.executor import num_writers

HERE = Path(__file__).parent
DEFAULT_SOURCE = "hf-mxfp4"
WARM = ", warm"
WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None  # as if it were not installed
from gptoss_stream.cli.main import main
raise SystemExit(main())
"""

Turn: TypeAlias = Mapping[str, Measured]
"""The measurement of each command of a turn, by name."""


def options(doc: str | None, *, runs: int = 5, reports: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks share.

    Args:
        doc: The description.
        runs: The default number of turns.
        reports: Whether to add `--json` (see `report`).
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="20b", help="shapes of the model: 20b, 120b or tiny")
    parser.add_argument(
        "--runs", type=int, default=runs, help="number of turns; medians are printed"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmark-data"), help="folder for the data"
    )
    if reports:
        parser.add_argument(
            "--json",
            nargs="?",
            const="-",
            metavar="FILE",
            help="write JSON to FILE, or print it instead of tables",
        )
    return parser


def add_turn_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `one_turn`."""
    parser.add_argument("--limit", default="256MB", help="limit of memory; 0 for none")
    parser.add_argument(
        "--warm", action="store_true", help="measure also with the source in the page cache"
    )


def limit_nbytes(text: str) -> int | None:
    """Return a limit in bytes; None for "0", and if limits cannot be set."""
    return parse_size(text) if text != "0" and can_limit() else None


def report(results: Any, text: str, to: str | None) -> None:
    """Print a table and write the results as JSON, or print only the JSON (see `options`)."""
    found = json.dumps(results, indent=2)
    if to == "-":
        print(found)
        return
    print(text, flush=True)
    if to is not None:
        write_json(results, Path(to))


def read_json(file: Path) -> dict[str, Any]:
    """Return the results in a file."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def write_json(results: Any, file: Path) -> None:
    """Write results to a file, which is at any time the old or the new one."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(f"{json.dumps(results, indent=2)}\n")
    temporary.replace(file)


def as_json(measured: Measured) -> dict[str, Any]:
    """Return a measurement without its samples of memory; times in ms."""
    times = {"wall": round(measured.wall, 3), "cpu": round(measured.cpu, 3)}
    return times | {"peak_rss": measured.peak_rss}


def now() -> str:
    """Return date and time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def layers_text(preset: str, layers: int) -> str:
    """Return a number of layers as text."""
    return f"{preset}, {layers} layer{'' if layers == 1 else 's'}"


@contextmanager
def checkpoint(
    folder: Path,
    preset: str,
    layers: int,
    source_format: str = DEFAULT_SOURCE,
    *,
    prefix: str = "",
    vocabulary: int | None = None,
) -> Iterator[Path]:
    """Write a random checkpoint, by default with the preset's vocabulary; deletes it afterwards."""
    source = folder / f"{prefix}{preset}-{layers}-{source_format}"
    source.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield gptoss_stream.synth(
            source,
            preset,
            layers=layers,
            vocab_size=vocabulary,
            format=source_format,
            overwrite=True,
        )
    finally:
        shutil.rmtree(source, ignore_errors=True)


@dataclass(frozen=True)
class Case:
    """A checkpoint on the disk, and the conversion of it."""

    source: Path
    target: str
    planned: Plan
    options: tuple[str, ...] = ()
    """Further options of the command."""

    @property
    def sizes(self) -> dict[str, int]:
        """Return the bytes that are read and the bytes that are written."""
        return {"bytes_in": self.planned.source_nbytes, "bytes_out": self.planned.nbytes}

    @property
    def output(self) -> Path:
        """The folder of the output."""
        return self.source.parent / f"{self.source.name}-to-{self.target}"


def case(source: Path, target: str = DEFAULT_FORMAT, *options: str) -> Case:
    """Return the conversion of a checkpoint to a format, with further options of the command."""
    return Case(source, target, gptoss_stream.plan(source, to=target), options)


def reads(planned: Plan) -> list[tuple[str, int, int]]:
    """Return what a conversion reads of its source, each byte once: (file, begin, end)."""
    spans = {
        (element_range.raw.shard, *element_range.byte_range)
        for shard in planned.shards
        for tensor in shard.tensors
        for element_range in element_ranges(tensor, 0, tensor.nbytes)
        if element_range.raw.checkpoint == 0
    }
    joined: list[tuple[str, int, int]] = []
    for file, begin, nbytes in sorted(spans):
        last = joined[-1] if joined else ("", 0, 0)
        if file == last[0] and begin <= last[2]:
            joined[-1] = (file, last[1], max(last[2], begin + nbytes))
        else:
            joined.append((file, begin, begin + nbytes))
    return joined


def floor(case: Case, *arguments: str, warm: bool = False) -> Measured:
    """Run the floor of a conversion, by as many threads, with options of floor.py."""
    listed, output = case.output.with_suffix(".reads"), case.output.with_suffix(".floor")
    spans = [(str(case.source / file), *span) for file, *span in reads(case.planned)]
    listed.write_text(json.dumps(spans))
    command = [sys.executable, str(HERE / "floor.py"), str(listed), str(output)]
    workers = count_workers(None)
    threads = workers + num_writers(workers)
    sizes = [str(case.planned.nbytes), "--threads", str(threads)]
    try:
        return run([*command, *sizes, *arguments], warm=case.source if warm else None)
    finally:
        listed.unlink()
        output.unlink(missing_ok=True)


def convert_command(case: Case, *, has_numba: bool = True) -> list[str]:
    """Return the command that converts, as a user runs it.

    Args:
        case: The conversion.
        has_numba: False for a command that cannot import numba.
    """
    program = ["-m", "gptoss_stream"] if has_numba else ["-c", WITHOUT_NUMBA]
    command = [sys.executable, *program, "convert", str(case.source)]
    return [*command, str(case.output), "--to", case.target, *case.options]


def conversion(
    case: Case,
    *,
    warm: bool = False,
    limit: int | None = None,
    sample: float = 0,
    has_numba: bool = True,
) -> Measured:
    """Convert, and delete the output."""
    shutil.rmtree(case.output, ignore_errors=True)  # what a killed run left would be resumed
    try:
        command = convert_command(case, has_numba=has_numba)
        source = case.source if warm else None
        return run(command, warm=source, limit=limit, sample=sample)
    finally:
        shutil.rmtree(case.output, ignore_errors=True)


def one_turn(case: Case, *, limit: int | None = None, warm: bool = False) -> Turn:
    """Run the floors and the conversion once each, also from a warm cache and under a limit."""
    turn: dict[str, Measured] = {}
    for cache in ("", WARM) if warm else ("",):
        is_warm = cache == WARM
        turn[f"floor, buffered{cache}"] = floor(case, warm=is_warm)
        turn[f"floor, direct{cache}"] = floor(case, "--direct", warm=is_warm)
        turn[f"convert{cache}"] = conversion(case, warm=is_warm)
    if limit is not None:
        turn["convert, limited"] = conversion(case, limit=limit)
    walls = ", ".join(f"{name} {measured.wall:.1f} s" for name, measured in turn.items())
    say(f"{case.source.name} to {case.target}: {walls}")
    return turn


def medians(runs: Sequence[Measured]) -> dict[str, Any]:
    """Return the medians of several runs, and the largest peak memory."""
    return {
        "wall": statistics.median(r.wall for r in runs),
        "walls": [round(r.wall, 2) for r in runs],
        "cpu": statistics.median(r.cpu for r in runs),
        "peak_rss": max(r.peak_rss for r in runs),
    }


def ratio(runs: Sequence[Measured], others: Sequence[Measured]) -> float:
    """Return the median of the ratios of wall times within each turn."""
    return statistics.median(a.wall / b.wall for a, b in zip(runs, others, strict=True))


def summary(turns: Sequence[Turn]) -> dict[str, Any]:
    """Return the medians of each command, and the median of its ratios to the floor.

    The floor is the faster of buffered and direct writing in the same turn, from the same state of
    the page cache.
    """
    runs = {name: [turn[name] for turn in turns] for name in turns[0]}
    rows: dict[str, Any] = {}
    for name, of_command in runs.items():
        cache = WARM if name.endswith(WARM) else ""
        ways = runs[f"floor, buffered{cache}"], runs[f"floor, direct{cache}"]
        floors = [min(pair, key=lambda r: r.wall) for pair in zip(*ways, strict=True)]
        rows.setdefault(f"floor{cache}", medians(floors) | {"to_floor": 1.0})
        rows[name] = medians(of_command) | {"to_floor": ratio(of_command, floors)}
    if "convert, limited" in runs:
        limited = ratio(runs["convert, limited"], runs["convert"])
        rows["convert, limited"]["to_unlimited"] = limited
    return rows
