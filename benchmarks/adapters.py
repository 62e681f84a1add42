"""Merging a LoRA adapter while converting, against converting alone and against PEFT.

    python benchmarks/adapters.py --preset 20b --layers 2 --rank 16 --folder /some/disk

Writes a random checkpoint in `hf-mxfp4`, and an adapter of the attention and of all experts for it.
Then, `--runs` times in turn and each from a cold page cache, converts to each format without and
with `--adapter`; which of the two is first alternates. Prints medians, and medians of the ratios
within each turn. To `hf-mxfp4` the conversion alone copies MXFP4, and a merge encodes it anew.

In the first turn PEFT does the same to `hf` (`peer.py peft`): transformers dequantizes to bfloat16,
PEFT merges, transformers saves. Its tensors are compared with those of `--merge-like-peft`: name,
dtype, shape and each value. Products are summed in another order, so that a few values in a million
are rounded the other way. PEFT does not sync to the disk at the end; the conversions do.
`--no-peft` leaves it out. Needs root, for cold caches, and for PEFT memory: 7 GB for one layer of
20b's shapes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peers
import tables
import trials
from measure import Failed, Measured, run

import gptoss_stream

if TYPE_CHECKING:
    import numpy as np

TARGETS = ("hf", "transformer-lens", "hf-mxfp4")
PLAIN, MERGE, LIKE_PEFT = "convert", "convert and merge", "convert and merge like PEFT"
PEFT = "transformers + PEFT"
PEFT_TARGET = "hf"  # what PEFT saves


@contextmanager
def adapter(arguments: argparse.Namespace) -> Iterator[Path]:
    """Write a random adapter to the disk; deletes it afterwards."""
    folder = arguments.folder / f"{arguments.preset}-{arguments.layers}-adapter"
    try:
        yield gptoss_stream.synth_adapter(
            folder,
            arguments.preset,
            layers=arguments.layers,
            rank=arguments.rank,
            overwrite=True,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def merging(case: trials.Case, adapter: Path, *options: str) -> trials.Case:
    """Return a conversion with an adapter merged."""
    return replace(case, options=("--adapter", str(adapter), *options))


def one_pair(
    case: trials.Case, adapter: Path, notes: dict[str, str], *, merge_first: bool
) -> dict[str, Measured]:
    """Convert without and with the adapter, once each; note a merge that fails."""
    cases = {PLAIN: case}
    if case.target not in notes:
        cases[MERGE] = merging(case, adapter)
    turn: dict[str, Measured] = {}
    for name in sorted(cases, reverse=merge_first):
        try:
            turn[name] = trials.conversion(cases[name])
        except Failed as error:
            if name == PLAIN:
                raise
            trials.say(str(error))
            notes[case.target] = failure(error)
    walls = ", ".join(f"{name} {measured.wall:.1f} s" for name, measured in turn.items())
    trials.say(f"{case.source.name} to {case.target}: {walls}")
    return turn


def failure(error: Failed) -> str:
    """Return in one line how a command failed: the code, and the last line that it printed."""
    return f"failed with {error.code}: {str(error).rstrip().splitlines()[-1]}"


def with_peft(case: trials.Case, adapter: Path) -> dict[str, Any]:
    """Run PEFT, and the conversion that rounds like it; return what was measured and compared."""
    theirs, ours = case.output.with_name("peft"), merging(case, adapter, "--merge-like-peft")
    rows: dict[str, Any] = {}
    command = [*peers.peer_command("peft", case.source, theirs), "--adapter", str(adapter)]
    try:
        for name, its_command in {PEFT: command, LIKE_PEFT: trials.convert_command(ours)}.items():
            try:
                rows[name] = trials.medians([run(its_command)])
                trials.say(f"{name}: {rows[name]['wall']:.1f} s")
            except Failed as error:
                trials.say(str(error))
                rows[name] = {"note": failure(error)}
        if all("wall" in row for row in rows.values()):
            rows[PEFT]["note"] = compared(ours.output, theirs)
    finally:
        for folder in (ours.output, theirs):
            shutil.rmtree(folder, ignore_errors=True)
    return rows


def compared(ours: Path, theirs: Path) -> str:
    """Compare the tensors that PEFT has merged, of bfloat16, with those of the conversion."""
    a, b = peers.stored(ours), peers.stored(theirs)
    found = peers.differences(a, b)
    kinds = [{name: (t.dtype, t.shape) for name, t in tensors.items()} for tensors in (a, b)]
    if kinds[0] != kinds[1]:
        return peers.compared(ours, theirs, has_our_names=True)
    number = sum(different_values(a[name], b[name]) for name in found)
    values = peers.total(b) // 2
    return (
        f"{len(b)} tensors, {len(b) - len(found)} equal to ours; {number:,} of {values:,} values "
        f"differ ({number / values:.1e})"
    )


def different_values(one: peers.Stored, other: peers.Stored) -> int:
    """Return how many values of two bfloat16 tensors of the same shape have other bits."""
    import numpy as np

    step = peers.COMPARED_NBYTES // 2
    a, b = (_values(stored) for stored in (one, other))
    return sum(
        int(np.count_nonzero(a[at : at + step] != b[at : at + step]))
        for at in range(0, len(a), step)
    )


def _values(stored: peers.Stored) -> np.ndarray[Any, Any]:
    """Return the bits of a stored tensor's values, which stay on the disk."""
    import numpy as np

    count = (stored.end - stored.begin) // 2
    return np.memmap(stored.file, np.uint16, mode="r", offset=stored.begin, shape=(count,))


def summary(turns: Sequence[Mapping[str, Measured]], note: str | None) -> dict[str, Any]:
    """Return the medians of conversions without and with the adapter, and of their ratios."""
    runs = {name: [turn[name] for turn in turns if name in turn] for name in (PLAIN, MERGE)}
    rows = {PLAIN: trials.medians(runs[PLAIN]) | {"to_plain": 1.0}}
    if note is not None:
        return rows | {MERGE: {"note": note}}
    to_plain = trials.ratio(runs[MERGE], runs[PLAIN])
    return rows | {MERGE: trials.medians(runs[MERGE]) | {"to_plain": to_plain}}


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the summary of the conversion to each format, and of PEFT where it is compared."""
    notes: dict[str, str] = {}
    peft: dict[str, Any] = {}
    with (
        trials.checkpoint(arguments.folder, arguments.preset, arguments.layers) as source,
        adapter(arguments) as lora,
    ):
        cases = {target: trials.case(source, target) for target in arguments.to}
        adapter_nbytes = (lora / "adapter_model.safetensors").stat().st_size
        turns = []
        for number in range(arguments.runs):
            turns.append(
                {
                    target: one_pair(case, lora, notes, merge_first=number % 2 == 1)
                    for target, case in cases.items()
                }
            )
            if number == 0 and arguments.peft and find_spec("peft"):
                peft = with_peft(trials.case(source, PEFT_TARGET), lora)
    results = []
    for target, case in cases.items():
        rows = summary([turn[target] for turn in turns], notes.get(target))
        if target == PEFT_TARGET:
            rows |= peft
        results.append(
            {"target": target, **case.sizes, "adapter_bytes": adapter_nbytes, "rows": rows}
        )
    return results


def main() -> None:
    parser = trials.options(__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--to", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument(
        "--no-peft", dest="peft", action="store_false", help="do not run PEFT beside `hf`"
    )
    arguments = parser.parse_args()
    arguments.peft = arguments.peft and PEFT_TARGET in arguments.to
    results = measured(arguments)
    label = trials.layers_text(arguments.preset, arguments.layers)
    text = f"{label}, rank {arguments.rank}; turns: {arguments.runs}\n{tables.adapters(results)}"
    if arguments.peft and not find_spec("peft"):
        trials.say(f"left out: {PEFT}, without peft")
    trials.report(results, text, arguments.json)


if __name__ == "__main__":
    main()
