"""Real sizes: peak memory, and a memory limit that includes the page cache. Slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from format_pairs import ALL_PAIRS
from independent import load_folder

import gptoss_stream

pytestmark = pytest.mark.slow

LIMIT = 180_000_000
PAIR_LIMIT = 170_000_000  # with 3 threads that convert, 2 that write and 2 that read
MOST_MEMORY = [  # these gather or scatter most
    ("hf-mxfp4", "transformer-lens"),
    ("hf", "transformer-lens"),
    ("transformer-lens", "hf"),
    ("transformer-lens", "hf-unfused"),
    ("hf-unfused", "hf"),
    ("hf", "hf-mxfp4"),
    ("transformer-lens", "openai"),
]
GROUP = Path("/sys/fs/cgroup/memory/gptoss_stream_test")


def convert(source: Path, output: Path, *options: str, prefix=()) -> dict:
    command = [sys.executable, "-m", "gptoss_stream", "convert", source, output, "--json", *options]
    done = subprocess.run([*prefix, *command], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("preset", "layers"), [("20b", 1), ("20b", 2), ("20b", 4), ("120b", 1), ("120b", 2)]
)
def test_peak_memory_is_the_same_for_every_model(preset, layers, tmp_path):
    source = gptoss_stream.synth(tmp_path / "source", preset, layers=layers)
    report = convert(source, tmp_path / "out")
    assert report["bytes_out"] > 2e9
    assert report["peak_rss"] < LIMIT
    # Each expert matrix is 17 MB, each embedding 1,158 MB: no large tensor was in memory.
    assert report["peak_rss"] < gptoss_stream.plan(source).nbytes / 20


@pytest.fixture(scope="module")
def large_sources(tmp_path_factory):
    """A function from a format to a random checkpoint of 20b's shapes, with 2 layers."""
    folder = tmp_path_factory.mktemp("sources")
    yield lambda name: gptoss_stream.synth(folder / name, "20b", layers=2, format=name)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS)
def test_peak_memory_is_the_same_for_every_pair(source, target, large_sources, tmp_path):
    report = convert(large_sources(source), tmp_path / "out", "--to", target, "--workers", "3")
    assert report["bytes_out"] > 3e9
    assert report["peak_rss"] < PAIR_LIMIT


@pytest.mark.parametrize(("source", "target"), MOST_MEMORY)
def test_peak_memory_with_the_experts_of_120b(source, target, tmp_path):
    """Peak memory does not grow with the number of experts."""
    folder = gptoss_stream.synth(tmp_path / "source", "120b", layers=1, format=source)
    report = convert(folder, tmp_path / "out", "--to", target, "--workers", "3")
    assert report["bytes_out"] > 4e9
    assert report["peak_rss"] < PAIR_LIMIT


@pytest.mark.parametrize("preset", ["20b", "120b"])
def test_peak_memory_with_a_reference(preset, tmp_path):
    """The reference's blocks are in memory too. All of them are kept."""
    base = gptoss_stream.synth(tmp_path / "base", preset, layers=1)
    gptoss_stream.convert(base, tmp_path / "floats", to="hf")
    options = ("--to", "hf-mxfp4", "--reference", base, "--workers", "3")
    report = convert(tmp_path / "floats", tmp_path / "out", *options)
    assert report["peak_rss"] < PAIR_LIMIT + 10_000_000
    total = report["mxfp4"]["total"]
    assert total["blocks_kept"] == total["blocks"] > 1e6
    before, after = (load_folder(folder) for folder in (base, tmp_path / "out"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("source", "target"), ALL_PAIRS)
@pytest.mark.skipif(
    os.geteuid() != 0 or not (GROUP.parent / "memory.limit_in_bytes").exists(),
    reason="needs root and control groups of version 1",
)
def test_a_limit_that_includes_the_page_cache_is_kept(source, target, large_sources, tmp_path):
    """The limit is 256 MB. The page cache is dropped before, since pages that are cached already do
    not count."""
    folder = large_sources(source)
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(256_000_000))
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    join = ["sh", "-c", f'echo $$ > {GROUP}/cgroup.procs; exec "$@"', "sh"]
    report = convert(folder, tmp_path / "limited", "--to", target, prefix=join)
    assert report["peak_rss"] < LIMIT
    convert(folder, tmp_path / "free", "--to", target)
    for shard in report["shards"]:
        pair = [tmp_path / where / shard for where in ("limited", "free")]
        assert subprocess.run(["cmp", *pair]).returncode == 0
