"""Conversions on a Dask cluster, with real schedulers, workers and clients."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import signal
from pathlib import Path

import distributed
import pytest
from clusters import SIZE, assert_done, cluster, convert_on
from runs import (
    ROOT,
    assert_clean_error,
    convert_command,
    digests,
    run,
    stamps,
)

import gptoss_stream
from gptoss_stream.distributed import dask_worker
from gptoss_stream.distributed.task_spec import TaskSpec
from gptoss_stream.errors import OptionError, TensorError
from gptoss_stream.planning.options import ConversionOptions
from gptoss_stream.planning.plan import plan
from gptoss_stream.planning.run_identity import run_identity

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


def test_any_number_of_workers_gives_the_same_bytes(source, whole, tmp_path):
    with cluster(tmp_path / "cluster", 1) as running:
        for workers in (1, 2, 4):
            if len(running.client.nthreads()) < workers:
                running.add(workers - len(running.client.nthreads()))
            output = tmp_path / str(workers)
            assert_done(
                convert_on(running.file if workers == 2 else running.address, source, output)
            )
            assert digests(output) == whole


@pytest.mark.parametrize(
    ("source_format", "target"),
    [("transformer-lens", "hf"), pytest.param("openai", "hf-mxfp4", marks=pytest.mark.slow)],
)
def test_other_formats(source_format, target, two, checkpoints, tmp_path):
    folder = checkpoints(format=source_format)
    options = ("--to", target)
    done = run(convert_command(folder, tmp_path / "one", "--checksums", *options))
    assert done.returncode == 0
    assert_done(convert_on(two.address, folder, tmp_path / "two", *options))
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_adapters(two, source, tmp_path):
    adapter = gptoss_stream.synth_adapter(tmp_path / "adapter", layers=3, rank=4)
    options = ("--to", "hf", "--adapter", str(adapter), "--adapter-scale", "0.5")
    done = run(convert_command(source, tmp_path / "one", "--checksums", *options))
    assert done.returncode == 0
    assert_done(convert_on(two.address, source, tmp_path / "two", *options))
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_local_workers(source, whole, tmp_path):
    assert_done(convert_on("local:2", source, tmp_path / "out"))
    assert digests(tmp_path / "out") == whole


BUSY_DISK = """
import os, time
makedirs = os.makedirs
def slow(name, *args, **kwargs):
    time.sleep(1.1 if "dask-scratch-space" in str(name) else 0)
    makedirs(name, *args, **kwargs)
os.makedirs = slow
"""


def test_local_workers_on_a_busy_disk(source, whole, tmp_path):
    """Dask's warning, in this process and in workers, is not shown: nothing is kept there."""
    (tmp_path / "sitecustomize.py").write_text(BUSY_DISK)
    command = convert_command(source, tmp_path / "out", "--checksums", "--scheduler", "local:1")
    assert_done(run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}))
    assert digests(tmp_path / "out") == whole


def test_any_client_from_a_program(two, source, whole, tmp_path):
    reported, started, counts = [], [], []
    report = gptoss_stream.convert(
        source,
        tmp_path / "out",
        max_shard_size=SIZE,
        checksums=True,
        client=two.client,
        on_start=lambda total, done: started.append(done),
        on_progress=reported.append,
        on_shard=lambda finished, total: counts.append((finished, total)),
    )
    assert digests(tmp_path / "out") == whole
    assert started == [0]
    total = len(report.shards)
    assert counts == [(finished, total) for finished in range(total + 1)]
    assert sum(reported) == report.bytes_out
    assert min(reported) >= 0
    assert report.complete
    assert report.peak_rss > 0


def test_a_client_that_does_not_wait_is_refused(two, source, tmp_path):
    async def convert():
        async with distributed.Client(
            two.address, asynchronous=True, set_as_default=False
        ) as client:
            gptoss_stream.convert(source, tmp_path / "out", client=client)

    with pytest.raises(OptionError, match="asynchronous"):
        asyncio.run(convert())
    assert not (tmp_path / "out").exists()


def test_only_missing_shards_are_written(two, source, whole, tmp_path):
    output = tmp_path / "out"
    assert_done(convert_on(two.address, source, output))
    missing = sorted(output.glob("*.safetensors"))[2]
    missing.unlink()
    before = stamps(output)
    assert_done(convert_on(two.address, source, output))
    assert digests(output) == whole
    assert before.items() <= stamps(output).items()


def test_to_an_object_store(two, source, whole, tmp_path):
    """Each worker uploads the shards that it writes, and nothing is left in its staging folder."""
    store, staging = tmp_path / "store", tmp_path / "staging"
    assert_done(convert_on(two.address, source, f"file://{store}", "--staging", str(staging)))
    assert digests(store) == whole
    assert [p for p in staging.rglob("*") if p.is_file()] == []


def test_an_error_names_the_damaged_tensor_and_the_worker(two, source, tmp_path):
    damaged = Path(shutil.copytree(source, tmp_path / "source"))
    info = gptoss_stream.plan(damaged).info
    raw = next(raw for name, raw in info.tensors.items() if name.endswith("gate_up_proj_scales"))
    with open(damaged / raw.shard, "r+b") as file:
        file.seek(raw.offset + raw.nbytes - 1)
        file.write(b"\xff")
    done = convert_on(two.address, damaged, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "error: worker tcp://127.0.0.1:" in done.stderr
    assert f"{raw.shard}: tensor {raw.name!r} holds the scale 255" in done.stderr
    with pytest.raises(TensorError, match="worker tcp://"):
        gptoss_stream.convert(damaged, tmp_path / "out2", client=two.client)


@only_root
@pytest.mark.parametrize("hidden", [pytest.param("source", marks=pytest.mark.slow), "output"])
def test_a_worker_that_cannot_see_a_folder(source, tmp_path, hidden):
    """One of two workers has another file system mounted on the folder."""
    (tmp_path / "parent").mkdir()
    mount = source if hidden == "source" else tmp_path / "parent"
    before = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{mount}"; exec "$@"', "sh"]
    with cluster(tmp_path / "cluster", 1) as running:
        running.add(1, prefix=before)
        done = convert_on(running.address, source, tmp_path / "parent/out")
    assert_clean_error(done, 2)
    assert "error: worker tcp://127.0.0.1:" in done.stderr
    assert str(mount) in done.stderr
    assert list((tmp_path / "parent").iterdir()) == []


def test_a_source_that_differs_on_a_worker_is_refused(two, source, tmp_path):
    planned = plan(source, max_shard_size=SIZE)
    spec = TaskSpec(
        str(source),
        str(tmp_path),
        ConversionOptions(max_shard_size=SIZE),
        {**run_identity(planned), "plan": "other"},
        checksums=False,
        threads=1,
        staging=None,
    )
    with pytest.raises(gptoss_stream.GptOssStreamError, match="sees a source that differs in plan"):
        two.client.submit(dask_worker.check_access, spec, None).result()


@pytest.mark.parametrize(
    "package_is", ["another version", pytest.param("missing", marks=pytest.mark.slow)]
)
def test_a_worker_with_another_version_is_refused(source, tmp_path, package_is):
    package = tmp_path / "other/gptoss_stream"
    shutil.copytree(ROOT / "gptoss_stream", package)
    text = (package / "__init__.py").read_text()
    assert '__version__ = "' in text
    other = text.replace('__version__ = "', '__version__ = "9.')
    if package_is == "missing":
        other = "import missing_module"
    (package / "__init__.py").write_text(other)
    with cluster(tmp_path / "cluster", 1) as running:
        running.add(1, PYTHONPATH=str(tmp_path / "other"))
        done = convert_on(running.address, source, tmp_path / "out")
        assert_clean_error(done, 2)
        assert "error: worker tcp://127.0.0.1:" in done.stderr
        expected = (
            "it has gptoss_stream 9." if package_is != "missing" else "cannot import gptoss_stream"
        )
        assert expected in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_scheduler_that_cannot_import_the_package_is_refused(source, tmp_path):
    package = tmp_path / "other/gptoss_stream"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import missing_module")
    with cluster(tmp_path / "cluster", PYTHONPATH=str(tmp_path / "other")) as running:
        done = convert_on(running.address, source, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "error: scheduler tcp://127.0.0.1:" in done.stderr
    assert "cannot be imported" in done.stderr


def test_a_worker_that_is_added_later_with_another_version_is_refused(source, whole, tmp_path):
    package = tmp_path / "other/gptoss_stream"
    shutil.copytree(ROOT / "gptoss_stream", package)
    text = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(text.replace('__version__ = "', '__version__ = "9.'))
    output = tmp_path / "out"
    with cluster(tmp_path / "cluster", 1) as running:
        (stopped,) = running.pids().values()
        os.kill(stopped, signal.SIGSTOP)
        try:
            running.add(1, PYTHONPATH=str(tmp_path / "other"))
        finally:
            os.kill(stopped, signal.SIGCONT)
        done = convert_on(running.address, source, output)
        assert_clean_error(done, 2)
        assert not output.exists()


def test_a_worker_with_too_little_memory_is_refused(source, tmp_path):
    with cluster(tmp_path / "cluster", 1, "--no-nanny", "--memory-limit", "50MB") as running:
        done = convert_on(running.address, source, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "it may use 50.0 MB of memory and writing a shard takes" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheduler", "code", "reason"),
    [
        ("tcp://127.0.0.1:1", 3, "no scheduler answers"),
        ("127.0.0.1:1", 3, "no scheduler answers"),
        ("nothing.json", 2, "no such file"),
        ("local:0", 2, "0 workers"),
        ("local:x", 2, "no such file"),
        ("ftp://127.0.0.1:1", 2, "no such file"),
        ("tls://127.0.0.1:1", 3, "no scheduler answers"),
    ],
)
def test_a_scheduler_that_cannot_be_reached(source, tmp_path, monkeypatch, scheduler, code, reason):
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    done = convert_on(scheduler, source, tmp_path / "out")
    assert_clean_error(done, code)
    assert reason in done.stderr
    assert not (tmp_path / "out").exists()


def test_options_that_cannot_be_used_with_a_scheduler_are_refused(source, tmp_path):
    for option in (["--token", "hf_secret"], ["--download"], ["--task-index=0", "--num-tasks=2"]):
        done = convert_on("local:1", source, tmp_path / "out", *option)
        assert_clean_error(done, 2)
        assert "hf_secret" not in done.stderr


def test_no_secret_is_sent_to_workers(source, tmp_path, monkeypatch):
    """Neither a token nor a key is in the task specification."""
    sent = []
    client = distributed.Client(processes=False, n_workers=1, dashboard_address="127.0.0.1:0")
    with client:
        submit = client.submit
        monkeypatch.setattr(
            client, "submit", lambda *a, **k: (sent.append((a, k)), submit(*a, **k))[1]
        )
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hf_secret")
        location = gptoss_stream.open_location(str(source))
        gptoss_stream.convert(location, tmp_path / "out", client=client)
    assert sent
    assert b"hf_secret" not in pickle.dumps([(a[1:], k.get("key")) for a, k in sent])
