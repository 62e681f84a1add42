"""Thousands of damaged files: each is read as safetensors reads it, or refused in one line.

The files are random, but the same in each run. Failures are collected by kind, so that none hides
another, and one example of each kind is shown.
"""

from __future__ import annotations

import json
import re
import resource
import time
from collections import Counter
from contextlib import contextmanager
from itertools import accumulate
from operator import mul
from pathlib import Path

import pytest
from mutants import Header, files, in_pairs, json_files
from runs import TimeLimitExceeded, run_in_process, time_limit
from safetensors import SafetensorError, deserialize
from shards import INDEX_NAME, read_shard

import gptoss_stream
from gptoss_stream.checkpoint.metadata import read_header
from gptoss_stream.errors import GptOssStreamError, HeaderError
from gptoss_stream.storage.local_folder import LocalFolder
from gptoss_stream.tensors.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header

# Reasons to refuse a file that safetensors reads (the docstring of the module under test explains
# them): a fragment of the message, and what must then be true of the header.
STRICTER = {
    "occurs twice": lambda h: h.twice,
    "must hold exactly dtype, shape and data_offsets": lambda h: any(
        isinstance(e, list) or e.keys() - {"dtype", "shape", "data_offsets"} for e in h.entries
    ),
    "__metadata__ is not a map of strings to strings": lambda h: h.metadata is None,
    "unknown dtype": lambda h: any(isinstance(e["dtype"], dict) for e in h.objects),
    "empty or holds control characters": lambda h: any(min(n, default="") < " " for n in h.names),
    "at most are supported": lambda h: any(len(e["shape"]) > 8 for e in h.objects),
    "its shape overflows": lambda h: any(
        max(*e["shape"], *accumulate(e["shape"], mul), 0, 0) > 2**48 for e in h.objects
    ),
}


class Loose:
    """A header as Python's json reads it, which accepts most input."""

    def __init__(self, file: bytes) -> None:
        self.twice = False

        def pairs(pairs: list[tuple]) -> dict:
            self.twice |= len(dict(pairs)) < len(pairs)
            return dict(pairs)

        length = int.from_bytes(file[:8], "little")
        header = json.loads(file[8 : 8 + length].decode(), object_pairs_hook=pairs)
        self.metadata = header.pop("__metadata__", {})
        self.names, self.entries = list(header), list(header.values())
        self.objects = [entry for entry in self.entries if isinstance(entry, dict)]


class Failures(dict):
    """One example of each kind of failure."""

    def add(self, kind: str, mutant: bytes) -> None:
        self.setdefault(re.sub(r"\d+|'.*'|\".*\"", "_", kind)[:250], (kind[:250], mutant[:1000]))

    def report(self) -> None:
        if self:
            shown = "\n".join(f"{kind}\n    {mutant!r}" for kind, mutant in self.values())
            pytest.fail(f"{len(self)} kinds of failure:\n{shown}", pytrace=False)


@contextmanager
def memory_limit(nbytes: int):
    """Let allocations in this process fail beyond `nbytes` more than it uses now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def ours(file: bytes) -> tuple[dict | None, str]:
    """Return what this package reads, as name to (dtype, shape, data), or why it refuses."""
    try:
        length = header_nbytes(file[:64], len(file), "x.safetensors")
        start = LENGTH_NBYTES + length
        infos, _ = parse_header(
            file[LENGTH_NBYTES:start], len(file), "x.safetensors", "x.safetensors"
        )
    except HeaderError as error:
        return None, str(error)
    assert all(start <= info.offset <= info.end <= len(file) for info in infos)
    assert len({info.name for info in infos}) == len(infos)
    return {
        info.name: (info.dtype.code, list(info.shape), file[info.offset : info.end])
        for info in infos
    }, ""


def theirs(file: bytes) -> tuple[dict | None, str]:
    """Return what safetensors reads. The data is random, so equal data is from the same offset."""
    try:
        read = deserialize(file)
    except SafetensorError as error:
        return None, str(error)
    return {name: (t["dtype"], list(t["shape"]), bytes(t["data"])) for name, t in read}, ""


def is_one_line(message: str, *names: str) -> bool:
    """Return whether a message is one short line that contains one of these names."""
    return (
        len(message.splitlines()) == 1 and len(message) < 1500 and any(n in message for n in names)
    )


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 10_000), pytest.param(1, 100_000, marks=pytest.mark.slow)]
)
def test_headers_are_read_as_safetensors_reads_them(seed, count):
    """safetensors accepts every file that we accept, with the same names, dtypes, shapes and bytes.

    A file that only safetensors accepts is refused for one of our stated reasons. No other
    exception is raised, no byte range is outside the file, and no file takes 5 seconds.
    """
    failures, outcomes, reasons, slowest = Failures(), Counter(), Counter(), 0.0
    for file in files(seed, count):
        begun = time.perf_counter()
        try:
            with time_limit(5):
                mine, why = ours(file)
        except (Exception, TimeLimitExceeded) as error:  # any other than HeaderError is a failure
            failures.add(f"raised {error!r}", file)
            continue
        slowest = max(slowest, time.perf_counter() - begun)
        other, their_why = theirs(file)
        outcomes[mine is not None, other is not None] += 1
        if mine is None:
            if not is_one_line(why, "x.safetensors: "):
                failures.add(f"not one line: {why}", file)
            if other is not None:
                reason = next((text for text in STRICTER if text in why), None)
                reasons[reason] += 1
                if reason is None or not STRICTER[reason](Loose(file)):
                    failures.add(f"refused without a stated reason: {why}", file)
        elif mine != other:
            failures.add(f"accepted alone: {their_why}" if their_why else "read differently", file)
    rates = {
        "both accept": outcomes[True, True] / count,
        "both refuse": outcomes[False, False] / count,
        "only safetensors accepts": outcomes[False, True] / count,
        "only we accept": outcomes[True, False] / count,
    }
    print({name: f"{rate:.2%}" for name, rate in rates.items()}, f"slowest {slowest:.3f} s")
    print(dict(reasons))
    failures.report()
    assert rates["both accept"] > 0.15
    assert rates["both refuse"] > 0.3
    assert 0.01 < rates["only safetensors accepts"] < 0.2
    assert reasons.keys() == STRICTER.keys()  # each reason is still needed


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A very small checkpoint of three shards; tests damage its files and restore them."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "head_dim": 8}
    folder = tmp_path_factory.mktemp("small") / "source"
    gptoss_stream.synth(folder, layers=2, experts=2, max_shard_size="12KB", **sizes)
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


def tensors_of(plan) -> dict:
    return {t.name: (t.dtype, t.shape) for shard in plan.shards for t in shard.tensors}


@pytest.mark.parametrize(
    ("seed", "count"), [(2, 200), pytest.param(3, 5000, marks=pytest.mark.slow)]
)
def test_a_damaged_shard_in_a_checkpoint(seed, count, small):
    """A command succeeds, or fails with exit code 2 and one line that names shard or index."""
    shard = min(small.glob("*.safetensors"))
    original = shard.read_bytes()
    header, data = read_shard(shard)
    plan, expected = gptoss_stream.plan(small), 0
    failures, codes = Failures(), Counter()
    try:
        for mutant in files(seed, count, lambda rng: Header(in_pairs(header), data)):
            shard.write_bytes(mutant)
            read = ours(mutant)[0]
            done = run_in_process("inspect", small, "--json")
            codes[done.returncode] += 1
            names = shard.name, INDEX_NAME
            if done.returncode == 2 and done.stdout == "" and is_one_line(done.stderr, *names):
                pass
            elif done.returncode != 0 or done.stderr or read is None:
                failures.add(f"inspect: {done}", mutant)
            elif {
                name: mutant[raw.offset : raw.offset + raw.nbytes]
                for name, raw in read_header(LocalFolder(small), shard.name)[1].items()
            } != {name: value for name, (_, _, value) in read.items()}:
                failures.add("read_header and parse_header differ", mutant)
            try:
                expected += tensors_of(gptoss_stream.plan(small)) == tensors_of(plan)
            except GptOssStreamError as error:
                if not is_one_line(str(error), *names):
                    failures.add(f"not one line: {error}", mutant)
    finally:
        shard.write_bytes(original)
    print(codes, f"{expected} planned as before")
    failures.report()
    assert codes.keys() == {0, 2}
    assert expected > count / 10


@pytest.mark.parametrize("name", ["config.json", INDEX_NAME])
@pytest.mark.parametrize(
    ("seed", "count"), [(4, 1000), pytest.param(5, 10_000, marks=pytest.mark.slow)]
)
def test_a_damaged_configuration_or_index(name, seed, count, small):
    """The plan has the same tensors, or fails in one line that names the file; in limited memory.

    A configuration that leads to other shapes contradicts the headers, and so does an index that
    differs from the shards: neither may be accepted.
    """
    file = small / name
    original = file.read_bytes()
    value = json.loads(original)
    values = [value] * 20
    if name == "config.json":  # no single change leads to these
        values.append({**value, "num_hidden_layers": 1, "layer_types": ["full_attention"]})
        values.append({**value, "num_hidden_layers": 10**9, "layer_types": None})
    plan = gptoss_stream.plan(small)
    failures, accepted, slowest = Failures(), 0, 0.0
    try:
        for mutant in json_files(seed, count, values):
            file.write_bytes(mutant)
            begun = time.perf_counter()
            try:
                with time_limit(5), memory_limit(300_000_000):
                    found = gptoss_stream.plan(small)
            except GptOssStreamError as error:
                named = [str(file), *(str(small / s) for s in shards(plan))]
                if not is_one_line(str(error), *named, f"{small}: layer"):  # some are missing
                    failures.add(f"not one line that names the file: {error}", mutant)
            except (Exception, TimeLimitExceeded) as error:  # any other is a failure
                failures.add(f"raised {error!r}", mutant)
            else:
                accepted += 1
                if tensors_of(found) != tensors_of(plan):
                    failures.add("another plan", mutant)
                if json.loads(mutant).get("weight_map") != value.get("weight_map"):
                    failures.add("accepted an index that differs from the shards", mutant)
            slowest = max(slowest, time.perf_counter() - begun)
    finally:
        file.write_bytes(original)
    print(f"{name}: {accepted} of {count} accepted, slowest {slowest:.3f} s")
    failures.report()
    assert 0.15 < accepted / count < 0.8


def shards(plan) -> list[str]:
    return [shard.name for shard in plan.info.shards]
