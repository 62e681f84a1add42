"""Real sizes: peak memory, and a memory limit that counts the page cache. Slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptoss_stream

pytestmark = pytest.mark.slow

LIMIT = 160_000_000
GROUP = Path("/sys/fs/cgroup/memory/gptoss_stream_test")


PACKED = {"hf-mxfp4", "openai"}
PAIRS = [
    (source, target)
    for source in gptoss_stream.formats.names()
    for target in gptoss_stream.formats.names()
    if target not in PACKED or source in PACKED  # floats are not quantised
]


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
    # Each expert matrix is 17 MB, each embedding 1,158 MB: nothing large was ever held.
    assert report["peak_rss"] < gptoss_stream.plan(source).nbytes / 20


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_peak_memory_is_the_same_for_every_format(source, target, tmp_path):
    folder = gptoss_stream.synth(tmp_path / "source", "20b", layers=1, format=source)
    report = convert(folder, tmp_path / "out", "--to", target)
    assert report["bytes_out"] > 2e9
    assert report["peak_rss"] < LIMIT


@pytest.mark.parametrize(("source", "target"), PAIRS)
@pytest.mark.skipif(
    os.geteuid() != 0 or not (GROUP.parent / "memory.limit_in_bytes").exists(),
    reason="needs root and control groups of version 1",
)
def test_a_limit_that_counts_the_page_cache_is_kept(source, target, tmp_path):
    """256 MB, from a cold cache: what was cached before would not count against the limit."""
    folder = gptoss_stream.synth(tmp_path / "source", "20b", layers=1, format=source)
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
