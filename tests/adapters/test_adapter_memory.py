"""Real sizes: peak memory of merging, and a limit that includes the page cache. Slow."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import gptoss_stream

pytestmark = pytest.mark.slow

LIMIT = 130_000_000  # with 3 threads
COMPILED = 130_000_000  # numba and LLVM
BY_NUMPY = (
    "import runpy, sys; sys.modules['numba'] = None;"
    "runpy.run_module('gptoss_stream', run_name='__main__')"
)
GROUP = Path("/sys/fs/cgroup/memory/gptoss_stream_test")
WIDE = "attention,router,experts,lm_head"


def convert(source, output, *options, prefix=(), program=("-m", "gptoss_stream")) -> dict:
    command = [sys.executable, *program, "convert", source, output, "--json", *options]
    done = subprocess.run([*prefix, *command, "--workers", "3"], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=[("20b", 2), ("120b", 1)], ids=lambda p: f"{p[0]}-{p[1]}")
def source(request, tmp_path_factory):
    """A random checkpoint with a preset's shapes."""
    preset, layers = request.param
    folder = tmp_path_factory.mktemp("source")
    yield gptoss_stream.synth(folder / "model", preset, layers=layers), preset, layers
    shutil.rmtree(folder)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("to", ["hf", "transformer-lens", "hf-mxfp4"])
def test_peak_memory(to, rank, compiled, source, tmp_path):
    """It grows neither with the experts nor much with the rank."""
    if compiled and find_spec("numba") is None:
        pytest.skip("needs numba")
    model, preset, layers = source
    adapter = gptoss_stream.synth_adapter(
        tmp_path / "adapter", preset, layers=layers, rank=rank, targets=WIDE
    )
    program = ("-m", "gptoss_stream") if compiled else ("-c", BY_NUMPY)
    options = ("--to", to, "--adapter", adapter)
    report = convert(model, tmp_path / "out", *options, program=program)
    limit = LIMIT + (20_000_000 if rank == 64 else 0)
    assert report["peak_rss"] < limit + (COMPILED if compiled else 0)


@pytest.mark.skipif(
    os.geteuid() != 0 or not (GROUP.parent / "memory.limit_in_bytes").exists(),
    reason="needs root and control groups of version 1",
)
@pytest.mark.parametrize("to", ["hf", "transformer-lens", "hf-mxfp4"])
def test_a_limit_that_includes_the_page_cache(to, source, tmp_path):
    """The limit is 256 MB, and the bytes are the same as without it."""
    model, preset, layers = source
    adapter = gptoss_stream.synth_adapter(tmp_path / "adapter", preset, layers=layers)
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(256_000_000))
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    join = ["sh", "-c", f'echo $$ > {GROUP}/cgroup.procs; exec "$@"', "sh"]
    options = ("--to", to, "--adapter", adapter)
    report = convert(model, tmp_path / "limited", *options, prefix=join)
    convert(model, tmp_path / "free", *options)
    for shard in report["shards"]:
        pair = [tmp_path / where / shard for where in ("limited", "free")]
        assert subprocess.run(["cmp", *pair]).returncode == 0
