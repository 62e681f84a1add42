"""Running a model straight off MXFP4, against running the bfloat16 folder that it converts to.

    python benchmarks/inference.py --folder /some/disk
    python benchmarks/inference.py --folder /some/disk --preset 120b --json 120b.json

Writes a random checkpoint (`--layers` makes it smaller) and, of the 20b, the folder in bfloat16 of
the same model. Then, `--runs` times in turn and each from a cold page cache, `use_model.py` loads a
model, runs passes of 64, 64 and 256 tokens and generates some:

    direct        load_hf_model on the checkpoint
    hooked        load_hooked_transformer on the checkpoint
    bfloat16      from_pretrained on the folder in bfloat16, which transformers maps
    offload       the same, with all weights left on the disk (accelerate); once
    dequantized   from_pretrained on the checkpoint, which dequantizes all of it to memory; once,
                  and only with `--layers 4` or fewer
    ..., limited  under a memory limit (`--limit`) that counts the page cache; once
    direct, without numba   as if numba were not installed; once

Ratios are of the same turn, and medians. Of the 120b, whose bfloat16 folder is 234 GB, only
`direct` runs, a pass of 64 tokens, beside the time in which a plain loop reads what it uses.
Needs root, 60 GB of disk for the 20b and 66 GB for the 120b.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tables
import trials
from measure import drop_caches, limited

import gptoss_stream

USE_MODEL = Path(__file__).with_name("use_model.py")
WAYS = {
    "direct": "direct",
    "hooked": "hooked",
    "bfloat16": "transformers",
    "offload": "offload",
    "dequantized": "transformers",
}
BASE = "bfloat16"
CHUNK = 8 << 20


def use(way: str, folder: Path, *options: str, limit: int | None = None) -> dict[str, Any] | None:
    """Load and use a model from a cold cache; None if it fails, which is printed."""
    drop_caches()
    command = [sys.executable, str(USE_MODEL), WAYS[way], str(folder), *options]
    done = subprocess.run(limited(command, limit), capture_output=True, text=True)
    if done.returncode:
        trials.say(f"{way}: failed with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
        return None
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    trials.say(f"{way}{' limited' if limit else ''}: {figures(result)}")
    return result


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return what is compared, of one use of a model: seconds, and bytes of memory."""
    passes, new = result["passes"], result["new"]
    found = {"open to first logits": result["load"] + passes[0]} if passes else {}
    names = ("64 tokens, warm", "256 tokens, warm")
    found |= dict(zip(names, passes[1:], strict=False))
    if new:
        found["a new token"] = statistics.median(new)
    return found | {"anonymous": result["anonymous"], "peak RSS": result["peak_rss"]}


@contextmanager
def models(arguments: argparse.Namespace) -> Iterator[dict[str, Path]]:
    """Write the checkpoint and its bfloat16 folder; deletes both afterwards."""
    source = arguments.folder / f"{arguments.preset}-mxfp4"
    converted = arguments.folder / f"{arguments.preset}-bfloat16"
    dimensions = {} if arguments.layers is None else {"layers": arguments.layers}
    try:
        gptoss_stream.synth(source, arguments.preset, overwrite=True, **dimensions)
        if arguments.preset != "120b":
            gptoss_stream.convert(source, converted, to="hf", overwrite=True)
        yield {name: converted if name in (BASE, "offload") else source for name in WAYS}
    finally:
        for folder in (source, converted):
            shutil.rmtree(folder, ignore_errors=True)


def compare(
    folders: Mapping[str, Path], runs: int, limit: int, *, fits_memory: bool
) -> dict[str, Any]:
    """Use the model in each way; returns figures, and ratios to bfloat16 of the same turn."""
    turns: list[dict[str, dict[str, float]]] = []
    for number in range(runs):
        names = ["direct", BASE, "hooked"]
        turn = {}
        for name in reversed(names) if number % 2 else names:
            new = "0" if name == "hooked" else "6"
            result = use(name, folders[name], "--new", new)
            if result is not None:
                turn[name] = figures(result)
        turns.append(turn)
    rows = summary(turns)
    few = ("--tokens", "64", "64", "--new", "2")
    result = use("direct", folders["direct"], *few, "--without-numba")
    if result is not None:
        rows["direct, without numba"] = {"median": figures(result)}
    for name in ("direct", BASE):
        result = use(name, folders[name], *few, limit=limit)
        if result is not None:
            rows[f"{name}, limited"] = {"median": figures(result)}
    for name in ("offload", *(["dequantized"] if fits_memory else [])):
        result = use(name, folders[name], "--tokens", "64", "64", "--new", "0")
        if result is not None:
            rows[name] = {"median": figures(result)}
    return rows


def summary(turns: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return the medians of each way, and the medians of its ratios to bfloat16."""
    rows: dict[str, Any] = {}
    for name in {name: None for turn in turns for name in turn}:
        found = [turn[name] for turn in turns if name in turn]
        row = {"median": {key: statistics.median(one[key] for one in found) for key in found[0]}}
        ratios = {
            key: [turn[name][key] / turn[BASE][key] for turn in turns if {name, BASE} <= {*turn}]
            for key in found[0]
        }
        row["to bfloat16"] = {key: statistics.median(some) for key, some in ratios.items() if some}
        rows[name] = row
    return rows


def read_seconds(folder: Path) -> float:
    """Return the seconds in which a plain loop reads all shards from the disk, without a cache."""
    chunks = [
        (str(file), begin)
        for file in sorted(folder.glob("*.safetensors"))
        for begin in range(0, file.stat().st_size, CHUNK)
    ]
    todo, lock = iter(chunks), threading.Lock()

    def work() -> None:
        buffer = bytearray(CHUNK)
        while True:
            with lock:
                name, begin = next(todo, ("", 0))
            if not name:
                return
            descriptor = os.open(name, os.O_RDONLY)
            os.preadv(descriptor, [buffer], begin)
            os.close(descriptor)

    drop_caches()
    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def large(folder: Path, runs: int) -> dict[str, Any]:
    """Run passes of a model that is larger than memory, beside reading its files."""
    turns = []
    for _ in range(runs):
        floor = read_seconds(folder)
        result = use("direct", folder, "--tokens", "64", "--new", "2")
        if result is not None:
            turns.append(figures(result) | {"reading": floor})
    medians = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    ratio = statistics.median(turn["open to first logits"] / turn["reading"] for turn in turns)
    return {"direct": {"median": medians, "to reading": ratio}}


def main() -> None:
    parser = trials.options(__doc__, runs=2)
    parser.add_argument("--layers", type=int, help="make the model smaller")
    parser.add_argument("--limit", default="8GB", help="memory limit, page cache included")
    arguments = parser.parse_args()
    limit = trials.limit_nbytes(arguments.limit)
    assert limit is not None
    with models(arguments) as folders:
        if arguments.preset == "120b":
            rows = large(folders["direct"], arguments.runs)
        else:
            fits_memory = arguments.layers is not None and arguments.layers <= 4
            rows = compare(folders, arguments.runs, limit, fits_memory=fits_memory)
    text = f"{arguments.preset}; turns: {arguments.runs}\n{tables.inference(rows)}"
    trials.report(rows, text, arguments.json)


if __name__ == "__main__":
    main()
