"""Array tasks of a batch system, which write one output together."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import (
    INDEX_NAME,
    ROOT,
    WORK_NAME,
    assert_clean_error,
    assert_nothing_half_written,
    convert_command,
    digests,
    run,
    run_in_process,
    stamps,
)

import gptoss_stream
from gptoss_stream.distributed.task_spec import TaskSpec
from gptoss_stream.distributed.write_shard import write_shard
from gptoss_stream.errors import MachineError, OutputError
from gptoss_stream.planning.options import ConversionOptions
from gptoss_stream.planning.run_identity import run_identity
from gptoss_stream.storage.open_location import open_writable_location
from gptoss_stream.writing import deletion
from gptoss_stream.writing.folder_lock import FolderLock
from gptoss_stream.writing.output import write_output
from gptoss_stream.writing.remote_folder import RemoteFolder
from gptoss_stream.writing.run_state import fingerprint
from gptoss_stream.writing.shard_file import ShardFile

SIZE = "150KB"


@pytest.fixture(scope="module")
def source(checkpoints):
    return checkpoints(layers=3)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The checksums of an output that one process wrote."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert task(source, output).returncode == 0
    return digests(output)


def task(source: Path, output: object, index: int | None = None, count: int = 3, *options: str):
    """Run one task, or the whole conversion, in this process."""
    numbers = () if index is None else ("--task-index", index, "--num-tasks", count)
    return run_in_process(
        "convert", source, output, "--max-shard-size", SIZE, "--checksums", *numbers, *options
    )


def command(source: Path, output: object, index: int, count: int = 3) -> list[str]:
    """Return the command line of one task."""
    numbers = ("--task-index", str(index), "--num-tasks", str(count), "--max-shard-size", SIZE)
    return convert_command(source, Path(str(output)), "--checksums", *numbers)


@pytest.fixture(params=["works", "0", pytest.param("ENOSYS", marks=pytest.mark.slow)])
def flock(request, flock_library, monkeypatch) -> None:
    """How `flock` ends in processes that the test starts: it lets everybody in, or fails."""
    if request.param != "works":
        monkeypatch.setenv("LD_PRELOAD", flock_library(request.param))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_tasks_in_any_order(source, whole, tmp_path, order):
    """The task that ends last completes the output; running any task again changes nothing."""
    output = tmp_path / "out"
    for position, index in enumerate(order):
        done = task(source, output, index)
        assert done.returncode == 0, done.stderr
        last = position == 2
        assert f"task {index} of 3 is done" in done.stdout
        assert ("the output is complete" in done.stdout) == last
        assert (output / INDEX_NAME).exists() == last
        assert (output / WORK_NAME).exists() != last
    assert digests(output) == whole
    before = stamps(output)
    assert task(source, output, 1).returncode == 0
    assert task(source, output).returncode == 0
    assert (digests(output), stamps(output)) == (whole, before)


@pytest.mark.parametrize("starts", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_tasks_at_the_same_time(source, whole, tmp_path, starts, flock):
    """Three processes start at nearly the same moment."""
    chance, pipe = random.Random(starts), subprocess.PIPE
    for number in range(starts):
        output = tmp_path / f"{number}"
        processes = []
        for index in chance.sample([0, 1, 2], 3):
            processes.append(
                subprocess.Popen(
                    command(source, output, index), stdout=pipe, stderr=pipe, text=True, cwd=ROOT
                )
            )
            time.sleep(chance.random() * 0.1)
        ends = [(p.communicate(timeout=60)[1], p.returncode) for p in processes]
        assert ends == [("", 0)] * 3
        assert digests(output) == whole
        assert not (output / WORK_NAME).exists()


def test_more_tasks_than_shards(source, whole, tmp_path):
    for index in range(20):
        assert task(source, tmp_path / "out", index, 20).returncode == 0
    assert digests(tmp_path / "out") == whole


def test_a_killed_task_can_be_run_again(source, whole, tmp_path, flock):
    output, chance = tmp_path / "out", random.Random(5)
    assert task(source, output, 0).returncode == 0
    for _ in range(4):
        process = subprocess.Popen(command(source, output, 1), cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(0.2 + 0.3 * chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert_nothing_half_written(output, whole)
    before = stamps(output)
    assert task(source, output, 2).returncode == 0
    assert task(source, output, 1).returncode == 0
    assert digests(output) == whole
    assert before.items() <= stamps(output).items()


def test_a_run_without_tasks_finishes_what_tasks_began(source, whole, tmp_path):
    output = tmp_path / "out"
    assert task(source, output, 0).returncode == 0
    before = stamps(output)
    assert task(source, output).returncode == 0
    assert digests(output) == whole
    assert before.items() <= stamps(output).items()


class Pausing:
    """An executor that calls a function before it writes."""

    def __init__(self, executor, pause):
        self.executor, self.pause, self.in_process = executor, pause, True

    def setup(self, work): ...

    def find_written(self, *arguments):
        return self.executor.find_written(*arguments)

    def write_shards(self, *arguments, **options):
        self.pause()
        self.executor.write_shards(*arguments, **options)


@pytest.fixture
def at_work(source, tmp_path, monkeypatch):
    """`during` calls a function while task 0 of 3 is running in the folder `output`."""
    output = tmp_path / "out"

    def during(action):
        def paused(folder, spec, executor, **options):
            return write_output(folder, spec, Pausing(executor, action), **options)

        with monkeypatch.context() as patch:
            patch.setattr("gptoss_stream.writing.output.write_output", paused)
            gptoss_stream.convert(source, output, max_shard_size=SIZE, checksums=True, task=(0, 3))

    return SimpleNamespace(during=during, output=output)


def test_runs_that_are_refused_while_a_task_is_running(source, whole, at_work, flock):
    """Only other tasks of the same run may start."""
    output, ends = at_work.output, []

    def others():
        ends.append(run(command(source, output, 0)))
        ends.append(run(convert_command(source, output, "--checksums", "--max-shard-size", SIZE)))
        ends.append(run([*command(source, output, 1), "--dtype", "float32"]))
        ends.append(run([*command(source, output, 1), "--overwrite"]))
        ends.append(run(command(source, output, 1)))
        ends.append(run(command(source, output, 2)))

    at_work.during(others)
    same_task, without_tasks, other_options, overwriting, one, two = ends
    for done, reason in (
        (same_task, "task-0-of-3 is running in it"),
        (without_tasks, "is writing to it; wait for it"),
        (other_options, "it holds an unfinished run that differs in dtype"),
        (overwriting, "would overwrite what the other tasks write"),
    ):
        assert_clean_error(done, 2)
        assert reason in done.stderr
    assert (one.returncode, two.returncode) == (0, 0)
    assert digests(output) == whole


def test_a_task_does_not_write_to_the_folder_of_another_run(source, at_work):
    """A user deletes the folder and starts another run in it meanwhile."""
    output = at_work.output

    def others():
        shutil.rmtree(output)
        assert run([*command(source, output, 1), "--dtype", "float32"]).returncode == 0

    with pytest.raises((OutputError, gptoss_stream.GptOssStreamError)):
        at_work.during(others)
    assert task(source, output, None, 3, "--dtype", "float32").returncode == 0
    alone = output.parent / "alone"
    assert task(source, alone, None, 3, "--dtype", "float32").returncode == 0
    assert digests(output) == digests(alone)


def test_partial_files_of_dead_tasks_are_deleted(source, whole, tmp_path):
    output = tmp_path / "out"
    assert task(source, output, 0).returncode == 0
    for name in ("task-0-of-3", "task-1-of-3", "worker-x"):
        (output / WORK_NAME / name).mkdir()
        (output / WORK_NAME / name / "model-00001-of-00002.safetensors").write_text("half")
    assert task(source, output, 1).returncode == 0
    assert not (output / WORK_NAME / "task-1-of-3").exists()
    assert task(source, output, 2).returncode == 0
    assert digests(output) == whole


def test_to_an_object_store(source, whole, tmp_path):
    """Each task has its own staging folder; SHA256SUMS has the checksums of all tasks."""
    store, staging = tmp_path / "store", tmp_path / "staging"
    for index in (1, 2, 0):
        done = task(source, f"file://{store}", index, 3, "--staging", str(staging))
        assert done.returncode == 0, done.stderr
        assert ("the output is complete" in done.stdout) == (index == 0)
    assert digests(store) == whole
    assert not (store / WORK_NAME).exists()
    assert list(staging.iterdir()) == []


def test_to_an_object_store_at_the_same_time(source, whole, tmp_path):
    store, pipe = tmp_path / "store", subprocess.PIPE
    commands = [command(source, "X", index) for index in range(3)]
    for arguments in commands:
        arguments[arguments.index("X")] = f"file://{store}"
    processes = [
        subprocess.Popen(
            [*arguments, "--staging", str(tmp_path / "staging")],
            stdout=pipe, stderr=pipe, text=True, cwd=ROOT,
        )
        for arguments in commands
    ]  # fmt: skip
    ends = [(p.communicate(timeout=60)[1], p.returncode) for p in processes]
    assert ends == [("", 0)] * 3
    assert digests(store) == whole


def test_a_finished_output_in_an_object_store_is_kept(source, whole, tmp_path):
    """A task that is run again has nothing to do, and deletes nothing."""
    store = tmp_path / "store"
    for index in (0, 1, 2, 1, None, 0):
        done = task(source, f"file://{store}", index, 3, "--staging", str(tmp_path / "staging"))
        assert done.returncode == 0, done.stderr
        if index == 2:
            before = stamps(store)
    assert (digests(store), stamps(store)) == (whole, before)


def test_a_failing_task_keeps_the_files_of_another(source, whole, at_work, monkeypatch):
    """The other task starts and ends while the first checks whether it is the last."""
    output, is_last = at_work.output, FolderLock.is_last

    def late(lock):
        monkeypatch.setattr(FolderLock, "is_last", is_last)
        assert run(command(source, output, 0)).returncode == 0
        return is_last(lock)

    def fail(*arguments):
        raise MachineError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(FolderLock, "is_last", late)
        patch.setattr("gptoss_stream.writing.output.check_space", fail)
        assert task(source, output, 1).returncode == 3
    for index in (1, 2):
        assert task(source, output, index).returncode == 0
    assert digests(output) == whole


def test_two_uploads_of_one_file_at_the_same_time(tmp_path, monkeypatch):
    """Neither gives the final name to the partial file of the other."""
    data = os.urandom(300_000)
    (tmp_path / "data").write_bytes(data)
    second = threading.Barrier(2)
    seen = []

    def copy(source, target, **options):
        with open(target, "wb") as out:
            out.write(data[:100_000])
            second.wait(10)
            out.write(data[100_000:])

    def put():
        open_writable_location(f"file://{tmp_path}/store").put({"x": tmp_path / "data"}, {})
        seen.append((tmp_path / "store/x").read_bytes())

    monkeypatch.setattr("fsspec.implementations.local.shutil.copyfile", copy)
    threads = [threading.Thread(target=put) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [data, data]
    assert [p.name for p in (tmp_path / "store").iterdir()] == ["x"]


def test_a_worker_of_a_replaced_run_writes_no_file(source, checkpoints, tmp_path, monkeypatch):
    """A worker is about to commit a shard when a run of another model overwrites the output."""
    other = checkpoints(layers=3, seed=1)
    output, commit = tmp_path / "out", ShardFile.commit
    assert task(source, output, 0).returncode == 0
    others = ["--overwrite", "--max-shard-size", SIZE]

    def late(file):
        monkeypatch.setattr(ShardFile, "commit", commit)
        monkeypatch.setattr(deletion, "remove", slowly)
        began.set()
        assert deleting.wait(20)
        commit(file)

    remove, began, deleting = deletion.remove, threading.Event(), threading.Event()

    def slowly(path):
        deleting.set()
        worker.join(20)
        remove(path)

    planned = gptoss_stream.plan(source, max_shard_size=SIZE)
    state = json.loads((output / WORK_NAME / "run.json").read_text())
    missing = next(s.name for s in planned.shards if not (output / s.name).exists())
    options = ConversionOptions(max_shard_size=SIZE)
    spec = TaskSpec(str(source), str(output), options, run_identity(planned), True, 1, None)

    def write():
        with suppress(gptoss_stream.GptOssStreamError):
            write_shard(spec, fingerprint(state), missing, tmp_path, lambda n: None, lambda: None)

    monkeypatch.setattr(ShardFile, "commit", late)
    worker = threading.Thread(target=write)
    worker.start()
    assert began.wait(20)
    assert run_in_process("convert", other, output, *others).returncode == 0
    worker.join()
    assert deleting.is_set()
    assert run_in_process("convert", other, tmp_path / "alone", *others).returncode == 0
    assert digests(output) == digests(tmp_path / "alone")


def test_an_upload_of_a_replaced_run_is_deleted(tmp_path):
    store = open_writable_location(f"file://{tmp_path}/store")
    states = [{"files": ["a", "b"], "run": n} for n in (1, 2)]
    old, new = RemoteFolder(store), RemoteFolder(store)
    old.prepare(states[0], overwrite=False)
    old.begin(states[0])
    new.prepare(states[1], overwrite=True)
    new.begin(states[1])
    store.put({"a": b"old"}, {})
    with pytest.raises(OutputError, match="another run began"):
        old.confirm_upload("a")
    assert "a" not in store.listing()
    store.put({"b": b"new"}, {})
    new.confirm_upload("b")
    assert store.read("b") == b"new"
