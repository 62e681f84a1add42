"""Workers, clients and schedulers that end or hang during a conversion."""

from __future__ import annotations

import json
import os
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
from clusters import SIZE, assert_done, cluster
from runs import (
    ROOT,
    WORK_NAME,
    assert_clean_error,
    convert_command,
    digests,
    run,
    stamps,
    time_limit,
)

import gptoss_stream
from gptoss_stream.distributed import dask_executor, worker_pool
from gptoss_stream.distributed.task_spec import TaskSpec
from gptoss_stream.distributed.write_shard import write_shard
from gptoss_stream.errors import MachineError
from gptoss_stream.planning.options import ConversionOptions
from gptoss_stream.planning.plan import plan
from gptoss_stream.planning.run_identity import run_identity
from gptoss_stream.writing.run_state import fingerprint


@pytest.fixture(scope="module")
def larger(checkpoints, tmp_path_factory):
    """A source that takes some seconds to convert, and the checksums of its output."""
    sizes = {"hidden_size": 448, "intermediate_size": 416, "experts": 16, "vocab_size": 5003}
    source = checkpoints(layers=8, **sizes)
    output = tmp_path_factory.mktemp("larger") / "out"
    assert_done(run(convert_command(source, output, "--checksums", "--max-shard-size", "6MB")))
    return source, digests(output)


def start(address: str, source: Path, output: Path) -> subprocess.Popen[str]:
    """Start a conversion on a cluster, in a process."""
    command = convert_command(source, output, "--checksums", "--scheduler", address)
    command += ["--max-shard-size", "6MB"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def kill_workers(larger, folder: Path, workers: int, times: int, seed: int) -> None:
    """Kill workers at random moments of runs; every run must write the same bytes."""
    source, whole = larger
    chance, killed, runs = random.Random(seed), 0, 0
    with cluster(folder / "cluster", workers) as running:
        while killed < times:
            output = folder / f"out-{runs}"
            runs += 1
            assert runs < 4 * times
            process = start(running.address, source, output)
            with process:
                try:
                    while process.poll() is None and not (output / WORK_NAME / "run.json").exists():
                        time.sleep(0.005)
                    time.sleep(chance.random() * 1.5)
                    pids = sorted(running.pids().values())
                    if process.poll() is None and pids:
                        os.kill(chance.choice(pids), signal.SIGKILL)
                        killed += 1
                    _, err = process.communicate(timeout=120)
                finally:
                    process.kill()
            assert (process.returncode, err) == (0, "")
            assert digests(output) == whole
            shutil.rmtree(output)
            running.wait_for(workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_killed_at_random(larger, tmp_path, workers):
    kill_workers(larger, tmp_path, workers, times=2, seed=workers)


@pytest.mark.slow
def test_many_workers_killed_at_random(larger, tmp_path):
    kill_workers(larger, tmp_path, workers=3, times=20, seed=1)


def end_clients(larger, folder: Path, signals: list[signal.Signals], seed: int) -> None:
    """End clients at random moments; finished shards are kept, and the same command resumes."""
    source, whole = larger
    chance = random.Random(seed)
    with cluster(folder / "cluster", 2) as running:
        for number, signum in enumerate(signals):
            output = folder / f"out-{number}"
            process = start(running.address, source, output)
            with process:
                try:
                    while process.poll() is None and not (output / WORK_NAME / "run.json").exists():
                        time.sleep(0.005)
                    time.sleep(chance.random() * 1.5)
                    process.send_signal(signum)
                    _, err = process.communicate(timeout=60)
                finally:
                    process.kill()
            if process.returncode == -signum:  # or the signal came after the end of the run
                assert signum == signal.SIGKILL or digests(output) == whole
            elif process.returncode:
                assert process.returncode == 128 + signum
                assert err.count("\n") == 1, err
            found = {n: d for n, d in digests(output).items() if not n.startswith(WORK_NAME)}
            assert found.items() <= whole.items()
            before = stamps(output)
            with start(running.address, source, output) as again:
                assert (again.communicate(timeout=60)[1], again.returncode) == ("", 0)
            assert digests(output) == whole
            # A worker may still finish a shard for the killed client, and write it a second time.
            assert len(before.items() - stamps(output).items()) <= 2
            time.sleep(0.3)
            assert digests(output) == whole


@pytest.mark.slow
def test_clients_ended_at_random(larger, tmp_path):
    end_clients(larger, tmp_path, [signal.SIGKILL, signal.SIGINT], seed=2)


@pytest.mark.slow
def test_many_clients_ended_at_random(larger, tmp_path):
    signals = [signal.SIGKILL] * 12 + [signal.SIGINT] * 5 + [signal.SIGTERM] * 3
    end_clients(larger, tmp_path, signals, seed=3)


def test_a_scheduler_that_ends(larger, tmp_path):
    """The run fails in one line, and the same command resumes on another cluster."""
    source, whole = larger
    output = tmp_path / "out"
    with cluster(tmp_path / "one", 2) as running:
        with start(running.address, source, output) as process:
            while process.poll() is None and not (output / WORK_NAME / "run.json").exists():
                time.sleep(0.005)
            time.sleep(0.3)
            running.end(running.scheduler)
            _, err = process.communicate(timeout=60)
        done = subprocess.CompletedProcess("", process.returncode, "", err)
    assert_clean_error(done, 3)
    assert "the scheduler is lost" in err
    with cluster(tmp_path / "two", 1) as running, start(running.address, source, output) as process:
        assert (process.communicate(timeout=60)[1], process.returncode) == ("", 0)
    assert digests(output) == whole


def test_a_scheduler_that_ends_while_a_result_is_fetched(source, tmp_path, monkeypatch):
    """The future was finished when it was looked at, and is cancelled then."""
    result = distributed.Future.result
    with cluster(tmp_path / "cluster", 1) as running:

        def end_first(future, timeout=None):
            if future.status == "finished":
                running.end(running.scheduler)
                with time_limit(30):
                    while not future.cancelled():
                        time.sleep(0.01)
            return result(future, timeout)

        monkeypatch.setattr(distributed.Future, "result", end_first)
        with pytest.raises(MachineError, match=r"^the scheduler is lost \(it has dropped"):
            gptoss_stream.convert(
                source, tmp_path / "out", max_shard_size=SIZE, client=running.client
            )


def test_a_shard_of_a_hanging_worker_is_written_by_another(larger, tmp_path, monkeypatch):
    """When the first worker continues later, it changes nothing."""
    source, whole = larger
    output = tmp_path / "out"
    monkeypatch.setattr(dask_executor, "STALL_TIMEOUT", 1.0)
    with cluster(tmp_path / "cluster", 2) as running:
        pids = sorted(running.pids().values())
        client = running.client

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
    with cluster(tmp_path / "cluster", 2) as running:
        stopped = next(iter(running.pids().values()))
        os.kill(stopped, signal.SIGSTOP)
        try:
            with time_limit(40):
                gptoss_stream.convert(
                    source, tmp_path / "out", max_shard_size=SIZE, checksums=True,
                    client=running.client,
                )  # fmt: skip
        finally:
            os.kill(stopped, signal.SIGCONT)
    assert digests(tmp_path / "out") == whole


PROFILED = """
import gc, sys, gptoss_stream
from gptoss_stream.checkpoint.local_reader import LocalReader
info = gptoss_stream.plan(sys.argv[1]).info
gc.disable()
gc.set_threshold(1)
reader = LocalReader(info)
reader.within = reader
del reader
gc.enable()
sys._current_frames()
"""


def test_readers_are_collected_while_a_profiler_runs(source):
    """Dask's profiler runs in each worker. Before Python 3.11.9 a reader with a `threading.local`
    hung then."""
    assert run([sys.executable, "-c", PROFILED, str(source)]).returncode == 0


def test_several_threads_write_one_shard_at_once(source, whole, tmp_path):
    """Dask may start a task twice: the last one to finish writes the same file."""
    output = tmp_path / "out"
    begun = run(
        convert_command(source, output, "--checksums", "--task-index", "0", "--num-tasks", "9")
    )
    assert begun.returncode == 0
    planned = plan(source, max_shard_size=SIZE)
    state = json.loads((output / WORK_NAME / "run.json").read_text())
    spec = TaskSpec(
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

    def write_all(seed: int) -> None:
        for name in random.Random(seed).sample(names, len(names)):
            try:
                written = write_shard(
                    spec, fingerprint(state), name, tmp_path, lambda n: None, lambda: None
                )
                assert written.summary.sha256 == whole[name]
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=write_all, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {n: d for n, d in digests(output).items() if n in names} == {n: whole[n] for n in names}
    with pytest.raises(gptoss_stream.GptOssStreamError, match="is no longer active"):
        write_shard(spec, "another run", names[0], tmp_path, lambda n: None, lambda: None)


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_ends_the_run(source, tmp_path, monkeypatch):
    """For example a shard that needs more memory than they have."""
    with cluster(tmp_path / "cluster", 1) as running:
        monkeypatch.setattr(
            _die, "__module__", "__main__"
        )  # so that its code is sent to the workers
        monkeypatch.setattr(dask_executor, "write_shard_on_worker", _die)
        with pytest.raises(MachineError, match="4 workers died while they wrote it"):
            gptoss_stream.convert(source, tmp_path / "out", client=running.client)


def _die(*arguments: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("pause", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_worker_that_dies_after_its_shard(source, whole, tmp_path, monkeypatch, pause):
    """The worker dies before the client has handled the result; the output is complete."""
    end, killed = dask_executor.DaskExecutor._end, []

    def kill_first(self, future, in_flight, callbacks):
        if not killed and future.status == "finished":
            killed.append(next(iter(pids.values())))
            os.kill(killed[0], signal.SIGKILL)
            time.sleep(pause)
        end(self, future, in_flight, callbacks)

    with cluster(tmp_path / "cluster", 1) as running:
        pids = running.pids()
        monkeypatch.setattr(dask_executor.DaskExecutor, "_end", kill_first)
        with time_limit(40):
            gptoss_stream.convert(
                source, tmp_path / "out", max_shard_size=SIZE, checksums=True, client=running.client
            )
    assert killed
    assert digests(tmp_path / "out") == whole
