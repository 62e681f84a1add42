"""Conversions against other tools that convert to the same format, in one run.

    python benchmarks/peers.py --preset 20b --layers 2 --folder /some/disk

Writes random checkpoints. Then, `--runs` times in turn and each from a cold page cache, converts to
each format and runs the peers (`peer.py`): TransformerLens for `transformer-lens`, transformers for
`hf`, OpenAI's own reader, from its own format, for the tensors of `hf` under other names, and
nvidia-modelopt, from `hf`, for `hf-mxfp4`.
Prints medians, and medians of the ratios within each turn to the conversion from the same source.
In the first turn the tensors of a peer are compared with those of the conversion: name, dtype,
shape and bytes, or for other names the number of bytes.

The peers do not sync to the disk at the end; the conversions do. A peer that is not installed or
that fails is left out with a note. OpenAI's package asks for Python 3.12, but its reader works
without it and needs only torch and safetensors: `pip install --no-deps --ignore-requires-python
gpt-oss`. Needs root, for cold caches, memory for the peers (8 GB
for one layer of 20b's shapes, 4 GB for each further one), and disk for two sources and two outputs.
"""

from __future__ import annotations

import argparse
import json
import mmap
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tables
import trials
from measure import Failed, Measured, run

COMPARED_NBYTES = 64 << 20


@dataclass(frozen=True)
class Peer:
    """A peer of `peer.py`, the packages that it needs, and the conversion to the same format."""

    name: str
    title: str
    packages: tuple[str, ...]
    source_format: str
    target: str
    has_our_names: bool = True
    options: tuple[str, ...] = ()
    """Options with which the conversion writes the same."""

    @property
    def missing(self) -> list[str]:
        """Return its packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


PEERS = (
    Peer(
        "transformer-lens",
        "transformers + TransformerLens",
        ("transformers", "transformer_lens"),
        trials.DEFAULT_SOURCE,
        "transformer-lens",
    ),
    Peer("transformers", "transformers", ("transformers",), trials.DEFAULT_SOURCE, "hf"),
    Peer("gpt-oss", "gpt-oss's reader", ("gpt_oss", "torch"), "openai", "hf", False),
    Peer(
        "modelopt", "transformers + nvidia-modelopt", ("transformers", "modelopt"),
        "hf", "hf-mxfp4", options=("--mxfp4-rule", "modelopt"),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its header entry, and the range of its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def stored(folder: Path) -> dict[str, Stored]:
    """Return the tensors of the safetensors files in a folder, by name."""
    found: dict[str, Stored] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = Stored(file, entry["dtype"], tuple(entry["shape"]), begin, end)
    return found


def total(tensors: dict[str, Stored]) -> int:
    """Return the bytes of all tensors."""
    return sum(t.end - t.begin for t in tensors.values())


def differences(ours: dict[str, Stored], theirs: dict[str, Stored]) -> list[str]:
    """Return the names of tensors that only one side has, or that differ."""
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not _are_equal(ours[name], theirs[name])
    )


def _are_equal(one: Stored, other: Stored) -> bool:
    nbytes = one.end - one.begin
    if (one.dtype, one.shape, nbytes) != (other.dtype, other.shape, other.end - other.begin):
        return False
    if not nbytes:
        return True
    with one.file.open("rb") as f, other.file.open("rb") as g:
        a = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        b = mmap.mmap(g.fileno(), 0, access=mmap.ACCESS_READ)
        with a, b:
            return all(
                a[one.begin + at : min(one.begin + at + COMPARED_NBYTES, one.end)]
                == b[other.begin + at : min(other.begin + at + COMPARED_NBYTES, other.end)]
                for at in range(0, nbytes, COMPARED_NBYTES)
            )


def compared(ours: Path, theirs: Path, has_our_names: bool) -> str:
    """Compare the tensors of a peer with those of the conversion."""
    a, b = stored(ours), stored(theirs)
    if not has_our_names:
        same = "as many bytes as ours" if total(a) == total(b) else f"ours {total(a):,} bytes"
        return f"{len(b)} tensors with other names (ours {len(a)}), {total(b):,} bytes: {same}"
    found = differences(a, b)
    if not found:
        return f"{len(b)} tensors, {total(b):,} bytes: every one equal to ours"
    return f"{len(found)} of {len(b)} tensors are not ours, such as {', '.join(found[:3])}"


def peer_command(peer: str, source: Path, output: Path) -> list[str]:
    """Return the command that runs a peer."""
    return [sys.executable, str(trials.HERE / "peer.py"), peer, str(source), str(output)]


def one_turn(
    case: trials.Case, peers: Sequence[Peer], notes: dict[str, str]
) -> dict[str, Measured]:
    """Run the conversion and the peers that do not fail, once each; note how each peer ended."""
    theirs = case.output.with_name("peer")
    turn: dict[str, Measured] = {}
    try:
        turn["gptoss_stream"] = run(trials.convert_command(case))
        for peer in peers:
            try:
                turn[peer.name] = run(peer_command(peer.name, case.source, theirs))
            except Failed as error:
                trials.say(str(error))
                notes[peer.name] = f"{peer.title} failed with {error.code}"
            if peer.name not in notes:
                notes[peer.name] = compared(case.output, theirs, peer.has_our_names)
            shutil.rmtree(theirs, ignore_errors=True)
    finally:
        for folder in (case.output, theirs):
            shutil.rmtree(folder, ignore_errors=True)
    walls = ", ".join(f"{name} {measured.wall:.1f} s" for name, measured in turn.items())
    trials.say(f"{case.source.name} to {case.target}: {walls}")
    return turn


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the summary of each conversion with its peers."""
    peers = [peer for peer in PEERS if not peer.missing]
    pairs = [(trials.DEFAULT_SOURCE, target) for target in ("hf", "transformer-lens")]
    pairs += [(p.source_format, p.target) for p in peers if p.source_format != pairs[0][0]]
    notes: dict[str, str] = {}
    with ExitStack() as stack:
        sources = {
            name: stack.enter_context(
                trials.checkpoint(arguments.folder, arguments.preset, arguments.layers, name)
            )
            for name in dict.fromkeys(name for name, _ in pairs)
        }
        options = {(p.source_format, p.target): p.options for p in peers}
        cases = {
            pair: trials.case(sources[pair[0]], pair[1], *options.get(pair, ())) for pair in pairs
        }
        rivals = {pair: [p for p in peers if (p.source_format, p.target) == pair] for pair in pairs}
        turns = [
            {pair: one_turn(case, rivals[pair], notes) for pair, case in cases.items()}
            for _ in range(arguments.runs)
        ]
    results, titles = [], {peer.name: peer.title for peer in PEERS}
    for pair, case in cases.items():
        rows: dict[str, dict[str, Any]] = {}
        for name in ["gptoss_stream", *(peer.name for peer in rivals[pair])]:
            runs = [turn[pair][name] for turn in turns if name in turn[pair]]
            rows[name] = {"title": titles.get(name, name)}
            rows[name] |= {"came_to": notes[name]} if name in notes else {}
            if len(runs) == len(turns):
                ours = [turn[pair]["gptoss_stream"] for turn in turns]
                rows[name] |= trials.medians(runs) | {"to_ours": trials.ratio(runs, ours)}
        results.append({"source": pair[0], "target": pair[1], **case.sizes, "rows": rows})
    return results


def main() -> None:
    parser = trials.options(__doc__, runs=3)
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    results = measured(arguments)
    label = trials.layers_text(arguments.preset, arguments.layers)
    for peer in PEERS:
        if peer.missing:
            trials.say(f"left out: {peer.title}, without {' and '.join(peer.missing)}")
    text = f"{label}; turns: {arguments.runs}\n{tables.peers(results)}"
    trials.report(results, text, arguments.json)


if __name__ == "__main__":
    main()
