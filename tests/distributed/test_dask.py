"""Conversions on a Dask cluster: real schedulers, workers and clients, on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import distributed
import pytest
from clusters import cluster
from runs import (
    ROOT,
    WORK_NAME,
    assert_clean_error,
    at_most,
    convert_command,
    digests,
    run,
    stamps,
)

import gptoss_stream
from gptoss_stream.distributed import dask_executor, dask_worker, worker_pool
from gptoss_stream.distributed.task_spec import TaskSpec
from gptoss_stream.distributed.write_shard import write_shard
from gptoss_stream.errors import MachineError, OptionError, TensorError
from gptoss_stream.planning.options import ConversionOptions
from gptoss_stream.planning.plan import plan
from gptoss_stream.planning.run_identity import run_identity
from gptoss_stream.writing.run_state import fingerprint

SIZE = "300KB"
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints(layers=3)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What one process makes of the source."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert run(convert_command(source, output, "--checksums")).returncode == 0
    return digests(output)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A cluster of two workers, which no test ends."""
    with cluster(tmp_path_factory.mktemp("cluster"), 2) as made:
        yield made


def over(address: object, source: Path, output: object, *options: str):
    """A conversion on the workers of a scheduler, from the command line."""
    command = convert_command(source, output, "--checksums", "--scheduler", str(address), *options)
    return run(command)


def assert_done(done: subprocess.CompletedProcess[str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")


def test_any_number_of_workers_gives_the_same_bytes(source, whole, tmp_path):
    with cluster(tmp_path / "cluster", 1) as made:
        for workers in (1, 2, 4):
            if len(made.client.nthreads()) < workers:
                made.add(workers - len(made.client.nthreads()))
            output = tmp_path / str(workers)
            assert_done(over(made.file if workers == 2 else made.address, source, output))
            assert digests(output) == whole


@pytest.mark.parametrize(
    ("source_format", "target"), [("transformer-lens", "hf"), ("openai", "hf-mxfp4")]
)
def test_other_formats(source_format, target, two, checkpoints, tmp_path):
    folder = checkpoints(format=source_format)
    options = ("--to", target)
    done = run(convert_command(folder, tmp_path / "one", "--checksums", *options))
    assert done.returncode == 0
    assert_done(over(two.address, folder, tmp_path / "two", *options))
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_local_workers(source, whole, tmp_path):
    assert_done(over("local:2", source, tmp_path / "out"))
    assert digests(tmp_path / "out") == whole


def test_any_client_from_a_program(two, source, whole, tmp_path):
    reported, started = [], []
    report = gptoss_stream.convert(
        source,
        tmp_path / "out",
        max_shard_size=SIZE,
        checksums=True,
        client=two.client,
        on_start=lambda total, done: started.append(done),
        on_progress=reported.append,
    )
    assert digests(tmp_path / "out") == whole
    assert started == [0]
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


def test_only_what_is_missing_is_made(two, source, whole, tmp_path):
    output = tmp_path / "out"
    assert_done(over(two.address, source, output))
    gone = sorted(output.glob("*.safetensors"))[2]
    gone.unlink()
    before = stamps(output)
    assert_done(over(two.address, source, output))
    assert digests(output) == whole
    assert before.items() <= stamps(output).items()


def test_to_a_store(two, source, whole, tmp_path):
    """Each worker sends what it makes; nothing stays in its folder."""
    store = tmp_path / "store"
    assert_done(over(two.address, source, f"file://{store}", "--staging", str(tmp_path / "here")))
    assert digests(store) == whole
    assert [p for p in (tmp_path / "here").rglob("*") if p.is_file()] == []


def test_a_damaged_tensor_is_named_with_its_worker(two, source, tmp_path):
    damaged = Path(shutil.copytree(source, tmp_path / "source"))
    info = gptoss_stream.plan(damaged).info
    raw = next(raw for name, raw in info.tensors.items() if name.endswith("gate_up_proj_scales"))
    with open(damaged / raw.shard, "r+b") as file:
        file.seek(raw.offset + raw.nbytes - 1)
        file.write(b"\xff")
    done = over(two.address, damaged, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "error: worker tcp://127.0.0.1:" in done.stderr
    assert f"{raw.shard}: tensor {raw.name!r} holds the scale 255" in done.stderr
    with pytest.raises(TensorError, match="worker tcp://"):
        gptoss_stream.convert(damaged, tmp_path / "out2", client=two.client)


@only_root
@pytest.mark.parametrize("hidden", [pytest.param("source", marks=pytest.mark.slow), "output"])
def test_what_a_worker_does_not_see(source, tmp_path, hidden):
    """One of two workers has something else mounted there."""
    (tmp_path / "parent").mkdir()
    mount = source if hidden == "source" else tmp_path / "parent"
    before = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{mount}"; exec "$@"', "sh"]
    with cluster(tmp_path / "cluster", 1) as made:
        made.add(1, prefix=before)
        done = over(made.address, source, tmp_path / "parent/out")
    assert_clean_error(done, 2)
    assert "error: worker tcp://127.0.0.1:" in done.stderr
    assert str(mount) in done.stderr
    assert list((tmp_path / "parent").iterdir()) == []


def test_a_source_that_differs_on_a_worker(two, source, tmp_path):
    planned = plan(source, max_shard_size=SIZE)
    job = TaskSpec(
        str(source),
        str(tmp_path),
        ConversionOptions(max_shard_size=SIZE),
        {**run_identity(planned), "plan": "other"},
        checksums=False,
        threads=1,
        staging=None,
    )
    with pytest.raises(gptoss_stream.GptOssStreamError, match="sees a source that differs in plan"):
        two.client.submit(dask_worker.check_access, job, None).result()


@pytest.mark.parametrize("has", ["another version", pytest.param("none", marks=pytest.mark.slow)])
def test_a_worker_of_another_version_is_refused(source, tmp_path, has):
    package = tmp_path / "other/gptoss_stream"
    shutil.copytree(ROOT / "gptoss_stream", package)
    text = (package / "__init__.py").read_text()
    assert '__version__ = "' in text
    other = text.replace('__version__ = "', '__version__ = "9.') if has != "none" else "import nix"
    (package / "__init__.py").write_text(other)
    with cluster(tmp_path / "cluster", 1) as made:
        made.add(1, PYTHONPATH=str(tmp_path / "other"))
        done = over(made.address, source, tmp_path / "out")
        assert_clean_error(done, 2)
        assert "error: worker tcp://127.0.0.1:" in done.stderr
        expected = "it has gptoss_stream 9." if has != "none" else "cannot be imported there"
        assert expected in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_scheduler_without_the_tool_is_refused(source, tmp_path):
    package = tmp_path / "other/gptoss_stream"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import nix")
    with cluster(tmp_path / "cluster", PYTHONPATH=str(tmp_path / "other")) as made:
        done = over(made.address, source, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "error: scheduler tcp://127.0.0.1:" in done.stderr
    assert "cannot be imported" in done.stderr


def test_a_worker_that_comes_later_with_another_version_gets_nothing(source, whole, tmp_path):
    package = tmp_path / "other/gptoss_stream"
    shutil.copytree(ROOT / "gptoss_stream", package)
    text = (package / "__init__.py").read_text()
    (package / "__init__.py").write_text(text.replace('__version__ = "', '__version__ = "9.'))
    output = tmp_path / "out"
    with cluster(tmp_path / "cluster", 1) as made:
        (stopped,) = made.pids().values()
        os.kill(stopped, signal.SIGSTOP)
        try:
            made.add(1, PYTHONPATH=str(tmp_path / "other"))
        finally:
            os.kill(stopped, signal.SIGCONT)
        done = over(made.address, source, output)
        assert_clean_error(done, 2)
        assert not output.exists()


def test_a_worker_without_the_memory_is_refused(source, tmp_path):
    with cluster(tmp_path / "cluster", 1, "--no-nanny", "--memory-limit", "50MB") as made:
        done = over(made.address, source, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "it may use 50.0 MB of memory and writing a shard takes" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheduler", "code", "words"),
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
def test_no_scheduler(source, tmp_path, monkeypatch, scheduler, code, words):
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    done = over(scheduler, source, tmp_path / "out")
    assert_clean_error(done, code)
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_does_not_travel_is_refused(source, tmp_path):
    for option in (["--token", "hf_secret"], ["--download"], ["--task-index=0", "--num-tasks=2"]):
        done = over("local:1", source, tmp_path / "out", *option)
        assert_clean_error(done, 2)
        assert "hf_secret" not in done.stderr


def test_no_secret_travels(source, tmp_path, monkeypatch):
    """Neither a token nor a key is in what goes to the workers."""
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


# --- what dies or hangs -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger(checkpoints, tmp_path_factory):
    """A source that takes some seconds, and what one process makes of it."""
    sizes = {"hidden_size": 448, "intermediate_size": 416, "experts": 16, "vocab_size": 5003}
    source = checkpoints(layers=8, **sizes)
    output = tmp_path_factory.mktemp("larger") / "out"
    assert_done(run(convert_command(source, output, "--checksums", "--max-shard-size", "6MB")))
    return source, digests(output)


def begin(address: str, source: Path, output: Path) -> subprocess.Popen[str]:
    command = convert_command(source, output, "--checksums", "--scheduler", address)
    command += ["--max-shard-size", "6MB"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def kill_workers(larger, folder: Path, workers: int, times: int, seed: int) -> None:
    """Kill workers at random moments of runs; the same bytes come of every run."""
    source, whole = larger
    chance, killed, runs = random.Random(seed), 0, 0
    with cluster(folder / "cluster", workers) as made:
        while killed < times:
            output = folder / f"out-{runs}"
            runs += 1
            assert runs < 4 * times
            process = begin(made.address, source, output)
            with process:
                try:
                    while process.poll() is None and not (output / WORK_NAME / "run.json").exists():
                        time.sleep(0.005)
                    time.sleep(chance.random() * 1.5)
                    pids = sorted(made.pids().values())
                    if process.poll() is None and pids:
                        os.kill(chance.choice(pids), signal.SIGKILL)
                        killed += 1
                    _, err = process.communicate(timeout=120)
                finally:
                    process.kill()
            assert (process.returncode, err) == (0, "")
            assert digests(output) == whole
            shutil.rmtree(output)
            made.wait_for(workers)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_workers_killed_at_random(larger, tmp_path, workers):
    kill_workers(larger, tmp_path, workers, times=2, seed=workers)


@pytest.mark.slow
def test_many_workers_killed_at_random(larger, tmp_path):
    kill_workers(larger, tmp_path, workers=3, times=20, seed=1)


def strike_clients(larger, folder: Path, blows: list[signal.Signals], seed: int) -> None:
    """End clients at random moments; what was finished stays, and the same command goes on."""
    source, whole = larger
    chance = random.Random(seed)
    with cluster(folder / "cluster", 2) as made:
        for turn, blow in enumerate(blows):
            output = folder / f"out-{turn}"
            process = begin(made.address, source, output)
            with process:
                try:
                    while process.poll() is None and not (output / WORK_NAME / "run.json").exists():
                        time.sleep(0.005)
                    time.sleep(chance.random() * 1.5)
                    process.send_signal(blow)
                    _, err = process.communicate(timeout=60)
                finally:
                    process.kill()
            if process.returncode == -blow:  # also when it had done its work
                assert blow == signal.SIGKILL or digests(output) == whole
            elif process.returncode:
                assert process.returncode == 128 + blow
                assert err.count("\n") == 1, err
            found = {n: d for n, d in digests(output).items() if not n.startswith(WORK_NAME)}
            assert found.items() <= whole.items()
            before = stamps(output)
            with begin(made.address, source, output) as again:
                assert (again.communicate(timeout=60)[1], again.returncode) == ("", 0)
            assert digests(output) == whole
            # A worker may finish its shard once more for the client that was killed.
            assert len(before.items() - stamps(output).items()) <= 2
            time.sleep(0.3)
            assert digests(output) == whole


def test_clients_ended_at_random(larger, tmp_path):
    strike_clients(larger, tmp_path, [signal.SIGKILL, signal.SIGINT], seed=2)


@pytest.mark.slow
def test_many_clients_ended_at_random(larger, tmp_path):
    blows = [signal.SIGKILL] * 12 + [signal.SIGINT] * 5 + [signal.SIGTERM] * 3
    strike_clients(larger, tmp_path, blows, seed=3)


def test_a_scheduler_that_dies(larger, tmp_path):
    source, whole = larger
    output = tmp_path / "out"
    with cluster(tmp_path / "one", 2) as made:
        with begin(made.address, source, output) as process:
            while process.poll() is None and not (output / WORK_NAME / "run.json").exists():
                time.sleep(0.005)
            time.sleep(0.3)
            made.end(made.scheduler)
            _, err = process.communicate(timeout=60)
        done = subprocess.CompletedProcess("", process.returncode, "", err)
    assert_clean_error(done, 3)
    assert "the scheduler is lost" in err
    with cluster(tmp_path / "two", 1) as made, begin(made.address, source, output) as process:
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    assert digests(output) == whole


def test_a_worker_that_hangs_costs_its_shard(larger, tmp_path, monkeypatch):
    """Another makes it; the one that hung goes on later, and harms nothing."""
    source, whole = larger
    output = tmp_path / "out"
    monkeypatch.setattr(dask_executor, "STALL_TIMEOUT", 1.0)
    with cluster(tmp_path / "cluster", 2) as made:
        pids = sorted(made.pids().values())
        client = made.client

        def stop():
            while not (output / WORK_NAME / "run.json").exists():
                time.sleep(0.005)
            time.sleep(0.2)
            os.kill(pids[0], signal.SIGSTOP)

        stopper = threading.Thread(target=stop)
        stopper.start()
        try:
            gptoss_stream.convert(
                source, output, max_shard_size="6MB", checksums=True, client=client
            )
            stopper.join()
            assert digests(output) == whole
        finally:
            os.kill(pids[0], signal.SIGCONT)
        time.sleep(1)
        assert digests(output) == whole
        assert not (output / WORK_NAME).exists()


def test_a_worker_that_hangs_from_the_start(source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "SETUP_TIMEOUT", 1.0)
    with cluster(tmp_path / "cluster", 2) as made:
        stopped = next(iter(made.pids().values()))
        os.kill(stopped, signal.SIGSTOP)
        try:
            with at_most(40):
                gptoss_stream.convert(
                    source, tmp_path / "out", max_shard_size=SIZE, checksums=True,
                    client=made.client,
                )  # fmt: skip
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert digests(tmp_path / "out") == whole


PROFILED = """
import gc, sys, gptoss_stream
from gptoss_stream.checkpoint.reader import LocalReader
info = gptoss_stream.plan(sys.argv[1]).info
gc.disable()
gc.set_threshold(1)
reader = LocalReader(info)
reader.within = reader
del reader
gc.enable()
sys._current_frames()
"""


def test_readers_are_collected_while_a_profiler_looks(source):
    """Dask's does so in every worker; before Python 3.11.9 one with a threading.local hung."""
    assert run([sys.executable, "-c", PROFILED, str(source)]).returncode == 0


def test_many_make_one_shard_at_once(source, whole, tmp_path):
    """Dask may start a task twice; whoever is last gives the same file."""
    output = tmp_path / "out"
    begun = run(
        convert_command(source, output, "--checksums", "--task-index", "0", "--num-tasks", "9")
    )
    assert begun.returncode == 0
    planned = plan(source, max_shard_size=SIZE)
    state = json.loads((output / WORK_NAME / "run.json").read_text())
    job = TaskSpec(
        str(source),
        str(output),
        ConversionOptions(max_shard_size=SIZE),
        run_identity(planned),
        checksums=True,
        threads=2,
        staging=None,
    )
    names = [shard.name for shard in planned.shards]
    errors = []

    def make_all(seed: int) -> None:
        for name in random.Random(seed).sample(names, len(names)):
            try:
                made = write_shard(
                    job, fingerprint(state), name, tmp_path, lambda n: None, lambda: None
                )
                assert made.sha256 == whole[name]
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=make_all, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {n: d for n, d in digests(output).items() if n in names} == {n: whole[n] for n in names}
    with pytest.raises(gptoss_stream.GptOssStreamError, match="is no longer active"):
        write_shard(job, "another run", names[0], tmp_path, lambda n: None, lambda: None)


def test_a_shard_that_kills_its_workers_ends_the_run(source, tmp_path, monkeypatch):
    """As one does for which they have too little memory."""
    with cluster(tmp_path / "cluster", 1) as made:
        monkeypatch.setattr(_die, "__module__", "__main__")  # so that it travels itself
        monkeypatch.setattr(dask_executor, "write_shard_on_worker", _die)
        with pytest.raises(MachineError, match="4 workers died while they wrote it"):
            gptoss_stream.convert(source, tmp_path / "out", client=made.client)


def _die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("pause", [0, 1])
def test_a_worker_that_dies_with_what_it_has_made(source, whole, tmp_path, monkeypatch, pause):
    """Before the client has taken in that it was made."""
    end, killed = dask_executor.DaskExecutor._end, []

    def kill_first(self, future, in_flight, callbacks):
        if not killed and future.status == "finished":
            killed.append(next(iter(pids.values())))
            os.kill(killed[0], signal.SIGKILL)
            time.sleep(pause)
        end(self, future, in_flight, callbacks)

    with cluster(tmp_path / "cluster", 1) as made:
        pids = made.pids()
        monkeypatch.setattr(dask_executor.DaskExecutor, "_end", kill_first)
        with at_most(40):
            gptoss_stream.convert(
                source, tmp_path / "out", max_shard_size=SIZE, checksums=True, client=made.client
            )
    assert killed
    assert digests(tmp_path / "out") == whole
