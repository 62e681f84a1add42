"""A run that stops within a shard goes on from what its journal says is on the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from random import Random

import pytest
from killed_runs import CHUNK, JOURNAL, SHARD, child, killed_at, small_chunks, written
from runs import (
    WORK_NAME,
    assert_clean_error,
    assert_nothing_half_written,
    digests,
    run_in_process,
    stamps,
)

import gptoss_stream
from gptoss_stream.writing.shard_file import ShardFile

__all__ = ["small_chunks", "written"]

KINDS = {
    "MXFP4 decoded, and the head transposed": ("hf-mxfp4", "transformer-lens"),
    "floats encoded, with scales in a spill file": ("hf", "hf-mxfp4"),
    "bytes copied": ("openai", "hf-mxfp4"),
}


@pytest.mark.parametrize("options", [(), ("--checksums",)], ids=["", "checksums"])
@pytest.mark.parametrize(("source", "to"), KINDS.values(), ids=KINDS.keys())
def test_a_kill_after_any_chunk(source, to, options, checkpoints, tmp_path, written):
    """One thread: exactly the chunk that was being written is written again, and the bytes, the
    checksums and the report about encoding are those of an undisturbed run."""
    folder = checkpoints(format=source, layers=2)
    command = ("convert", folder, tmp_path / "out", "--to", to, "--workers=1", *options)
    written.clear()
    assert run_in_process(*command).returncode == 0
    whole, chunks = digests(tmp_path / "out"), sorted(written)
    assert chunks == [*range(0, chunks[-1] + 1, CHUNK)]
    for number in {2, len(chunks) * 2 // 3, len(chunks)}:
        shutil.rmtree(tmp_path / "out")
        killed_at(number, *command)
        written.clear()
        done = run_in_process(*command)
        assert done.returncode == 0, done.stderr
        assert sorted(written) == chunks[number - 1 :]
        assert digests(tmp_path / "out") == whole


@pytest.mark.parametrize("kills", [9, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_of_several_threads(kills, checkpoints, tmp_path, written):
    """Also of runs that resume. A quarter find a part of a shard: there are up to ten times as many
    kills until this is so, since it is a matter of chance."""
    random, out = Random(kills), tmp_path / "out"
    commands = []
    for source, to in KINDS.values():
        folder = checkpoints(format=source, layers=2)
        command = ("convert", folder, out, "--to", to, "--workers=3", "--max-shard-size=500KB")
        written.clear()
        assert run_in_process(*command).returncode == 0
        commands.append((command, digests(out), len(written)))
        shutil.rmtree(out)
    done = resumed = trials = 0
    while done < kills or (resumed < trials / 4 and done < 10 * kills):
        command, whole, chunks = commands[done % len(commands)]
        for _ in range(random.randint(1, 3)):
            number = random.randint(1, chunks)
            finished = stamps(out)
            result = child(f"if number == {number}: os.kill(os.getpid(), 9)", *command)
            assert_nothing_half_written(out, whole)
            assert finished.items() <= stamps(out).items()
            done += 1
            if result.returncode == 0:
                break
        resumed += any((out / WORK_NAME).glob("*.journal"))
        trials += 1
        result = run_in_process(*command)
        assert result.returncode == 0, result.stderr
        assert digests(out) == whole
        shutil.rmtree(out)
    print(f"{done} kills, after {resumed} of {trials} a part of a shard was found")
    assert resumed >= trials / 4


def test_what_is_resumed_is_said_in_shards_and_bytes(checkpoints, tmp_path):
    folder, out = checkpoints(layers=2), tmp_path / "out"
    command = ("convert", folder, out, "--workers=1")
    killed_at(5, *command)
    found = []
    expected = gptoss_stream.plan(folder).nbytes
    os.truncate(out / JOURNAL.removesuffix(".journal"), 5 * CHUNK)
    gptoss_stream.convert(folder, out, on_resume=found.append, workers=1)
    assert found == [gptoss_stream.Resumption(1, 0, 0, 4 * CHUNK, CHUNK)]
    shutil.rmtree(out)
    killed_at(5, *command)
    done = run_in_process(*command, "--json")
    message = (
        "resuming: 0 of 1 shard (0 B) are finished, and 66 kB of others written; "
        "16 kB are made again"
    )
    assert message in done.stderr
    report = json.loads(done.stdout)
    assert (report["bytes_out"], report["bytes_resumed"]) == (expected, 4 * CHUNK)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, None])
def test_an_interrupt_or_an_error_keeps_what_is_written(signum, checkpoints, tmp_path, written):
    """Not only a kill; nothing of a shard without a journal stays."""
    out = tmp_path / "out"
    command = ("convert", checkpoints(layers=2), out, "--workers=1")
    written.clear()
    error = "raise OSError(5, 'failing')"
    ending = error if signum is None else f"os.kill(os.getpid(), {int(signum)}); time.sleep(1)"
    done = child(f"if number == 4: {ending}", *command)
    assert_clean_error(done, 3 if signum is None else 128 + signum)
    assert {file.name for file in (out / WORK_NAME).iterdir()} == {
        "lock", "run.json", SHARD, f"{SHARD}.journal"
    }  # fmt: skip
    assert run_in_process(*command).returncode == 0
    assert min(written) >= 3 * CHUNK


def test_without_time_for_a_journal_nothing_is_kept(checkpoints, tmp_path, written, monkeypatch):
    """After an error at the first chunk there is no partial file, and no other chunk is lost."""
    out = tmp_path / "out"
    command = ("convert", checkpoints(layers=2), out, "--workers=1")
    written.clear()
    done = child("raise OSError(28, 'full')", *command)
    assert_clean_error(done, 3)
    assert {file.name for file in (out / WORK_NAME).iterdir()} == {"lock", "run.json"}
    assert run_in_process(*command).returncode == 0
    assert min(written) == 0


@pytest.mark.parametrize("call", ["fdatasync", "fsync", "rename"])
def test_a_call_that_fails(call, checkpoints, tmp_path):
    """While a journal is written: one line, and the same command completes the output."""
    command = ("convert", checkpoints(layers=2), tmp_path / "out", "--workers=1")
    failing = f"if number == 6: os.{call} = lambda *_: (_ for _ in ()).throw(OSError(5, 'failing'))"
    assert_clean_error(child(failing, *command), 3)
    assert json.loads((tmp_path / "out" / JOURNAL).read_text())["written"] == 5 * CHUNK
    assert run_in_process(*command).returncode == 0
    assert gptoss_stream.verify(command[1], tmp_path / "out").equal


# --------------------------------------------------------------------------- other runs


def test_an_array_task_keeps_its_parts(checkpoints, tmp_path, written):
    """While another task runs to its end; the last one leaves nothing behind."""
    out = tmp_path / "out"
    command = ("convert", checkpoints(layers=2), out, "--workers=1", "--max-shard-size=700KB")
    tasks = [(*command, "--task-index", str(index), "--num-tasks", "2") for index in (0, 1)]
    killed_at(5, *tasks[0])
    assert run_in_process(*tasks[1]).returncode == 0
    written.clear()
    done = run_in_process(*tasks[0])
    assert done.returncode == 0, done.stderr
    assert min(written) == 4 * CHUNK
    assert not (out / WORK_NAME).exists()
    assert gptoss_stream.verify(command[1], out).equal


def test_the_journal_is_written_after_what_it_says_is_synced(checkpoints, tmp_path, monkeypatch):
    """Each write, sync and rename in its order: the data, then the journal.

    How many journals a run of several threads writes is a matter of chance: up to ten run.
    """
    events: list[tuple[str, int]] = []

    def noting(function, event):
        def call(*arguments, **options):
            result = function(*arguments, **options)
            events.append(event(*arguments))
            return result

        return call

    from gptoss_stream.writing.shard_journal import ShardJournal

    monkeypatch.setattr(ShardFile, "write", noting(ShardFile.write, lambda *a: ("write", a[2])))
    monkeypatch.setattr(os, "fdatasync", noting(os.fdatasync, lambda _: ("sync", 0)))
    monkeypatch.setattr(
        ShardJournal, "write", noting(ShardJournal.write, lambda *a: ("journal", a[1].nbytes))
    )
    journals = 0
    for trial in range(10):
        events.clear()
        gptoss_stream.convert(checkpoints(layers=2), tmp_path / f"{trial}", workers=3)
        kinds = [kind for kind, _ in events]
        for number in (n for n, kind in enumerate(kinds) if kind == "journal"):
            synced = max(n for n in range(number) if kinds[n] == "sync")
            before = {offset for kind, offset in events[:synced] if kind == "write"}
            assert before >= {*range(0, events[number][1], CHUNK)}
            journals += 1
        if journals >= 2:
            break
    assert journals >= 2


def test_a_source_that_changes_gets_no_journal(checkpoints, tmp_path):
    """What was read of it may be from before and after the change."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(checkpoints(layers=2), source)
    [shard] = source.glob("*.safetensors")
    changing = f"os.utime({str(shard)!r}) if number == 3 else time.sleep(0.01)"
    done = child(changing, "convert", source, out, "--workers=1")
    assert_clean_error(done, 2)
    journal = json.loads((out / JOURNAL).read_text())
    assert journal["written"] == 2 * CHUNK
    time.sleep(0.01)
    assert_clean_error(run_in_process("convert", source, out, "--workers=1"), 2)
