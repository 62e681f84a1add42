"""What may change between an interrupted run and the next, and what must not.

Each row changes one thing after a run was killed at its second of seven shards. The next run is
refused by one line that says what differs, and changes nothing. If the change is harmless, it
writes the same bytes as a run that was never interrupted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from damages import CONFIG, INDEX, LAST, SHARD, Damage, config, gone, header_text, text
from runs import ROOT, WORK_NAME, assert_clean_error, digests, run_in_process
from shards import edit_json, write_shard

import gptoss_stream
from gptoss_stream import formats

SIZE = ("--max-shard-size", "150KB")
KILLED = """
import os, sys, gptoss_stream
from gptoss_stream.writing.shard_file import ShardFile
commit, done = ShardFile.commit, []
def dying(self):
    commit(self)
    done.append(1)
    if len(done) == 2:
        os.kill(os.getpid(), 9)
ShardFile.commit = dying
gptoss_stream.convert(sys.argv[1], sys.argv[2], max_shard_size="150KB", workers=1)
"""


def run_killed(source: Path, output: Path) -> None:
    """Start a conversion in a process that kills itself when two shards are finished."""
    done = subprocess.run([sys.executable, "-c", KILLED, source, output], cwd=ROOT, timeout=60)
    assert done.returncode == -9
    assert len(list(output.glob("*.safetensors"))) == 2


class Interrupted(NamedTuple):
    """The folders of an interrupted run."""

    source: Path
    output: Path


@pytest.fixture(scope="module")
def kept(checkpoints, tmp_path_factory):
    """The folder of an interrupted run, with copies to restore it from."""
    folder = tmp_path_factory.mktemp("interrupted")
    original = checkpoints(layers=2, max_shard_size="200KB")
    source = Path(shutil.copytree(original, folder / "source"))
    (source / "tokenizer.json").write_text("{}")
    run_killed(source, folder / "out")
    for name in ("source", "out"):
        shutil.copytree(folder / name, folder / f"kept/{name}")
    return folder


@pytest.fixture
def run(kept) -> Interrupted:
    """The interrupted run, restored: the same paths, bytes and times of every file."""
    for name in ("source", "out"):
        shutil.rmtree(kept / name, ignore_errors=True)
        shutil.copytree(kept / "kept" / name, kept / name, symlinks=True)
    return Interrupted(kept / "source", kept / "out")


def resume(run: Interrupted, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the same command again, with other options."""
    return run_in_process("convert", *run, *SIZE, "--quiet", *options)


def whole(run: Interrupted, *options: str) -> dict[str, str]:
    """Return the checksums of an uninterrupted run of the source as it is now."""
    fresh = run.output.with_name("fresh")
    assert run_in_process("convert", run.source, fresh, *SIZE, "--quiet", *options).returncode == 0
    found = digests(fresh)
    shutil.rmtree(fresh)
    return found


def at_the_same_time(change: Damage, name: str = SHARD) -> Damage:
    """Change a file and restore its modification time."""

    def damage(folder: Path) -> None:
        before = (folder / name).stat()
        change(folder)
        os.utime(folder / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    return damage


def later(folder: Path) -> None:
    """Set the modification time of a shard a little later."""
    after = (folder / SHARD).stat().st_mtime_ns + 1000
    os.utime(folder / SHARD, ns=(after, after))


def other_weights(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    data[begin:] = bytes(byte ^ 1 for byte in data[begin:])
    (folder / SHARD).write_bytes(data)


def swapped(header: bytes) -> bytes:
    """Swap the names of two tensors of one shape; the header keeps its length."""
    one, other = b"0.self_attn.k_proj", b"0.self_attn.v_proj"
    return header.replace(one, b"\0").replace(other, one).replace(b"\0", other)


def rename_shard(folder: Path) -> None:
    (folder / LAST).rename(folder / "last.safetensors")
    edit_json(folder / INDEX, rename_in_index)


def rename_in_index(index: dict) -> None:
    names = {name for name, shard in index["weight_map"].items() if shard == LAST}
    index["weight_map"].update(dict.fromkeys(names, "last.safetensors"))


def add_shard(folder: Path) -> None:
    entry = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    write_shard(folder / "more.safetensors", {"extra": entry}, b"x")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update(extra="more.safetensors"))


def test_an_interrupted_run_resumes_with_the_missing_shards(run):
    """Finished shards are not written again, and the bytes are those of an uninterrupted run."""
    finished = {file: file.stat().st_mtime_ns for file in run.output.glob("*.safetensors")}
    assert not (run.output / INDEX).exists()
    report = gptoss_stream.convert(*run, max_shard_size="150KB")
    assert report.bytes_resumed == sum(file.stat().st_size for file in finished)
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    assert digests(run.output) == whole(run)


# What differs, and what the line must contain.
SOURCES = {
    "another time of a shard": (later, "source_files"),
    "another size of a shard": (
        at_the_same_time(header_text(lambda text: text + b" " * 8)),
        "source_files",
    ),
    "another header of a shard": (at_the_same_time(header_text(swapped)), "differs in"),
    "other weights at the same time": (at_the_same_time(other_weights), "source_files"),
    "another name of a shard": (rename_shard, "source_files"),
    "one shard more": (add_shard, "source_files"),
    "another value in config.json": (config(rope_theta=10_000), "config"),
    "a value of config.json that is not converted": (config(note="another"), "config"),
    "other weights according to config.json": (config(attention_bias=False), "differs in"),
    "a changed tokenizer file": (
        text("tokenizer.json", b'{"version": "2"}'),
        "copied_files (tokenizer.json)",
    ),
    "a tokenizer file of the same size": (
        text("tokenizer.json", b"[]"),
        "copied_files (tokenizer.json)",
    ),
    "a new tokenizer file": (
        text("tokenizer_config.json", b"{}"),
        "copied_files (tokenizer_config.json)",
    ),
    "a missing tokenizer file": (gone("tokenizer.json"), "copied_files (tokenizer.json)"),
    "a new chat template": (
        text("chat_template.jinja", b"{{ messages }}"),
        "copied_files (chat_template.jinja)",
    ),
    "one shard less": (gone(INDEX, LAST), "tensors missing that config.json calls for"),
}
OPTIONS = {
    "float16": (["--dtype", "float16"], "dtype"),
    "float32": (["--dtype", "float32"], "dtype"),
    "a smaller size": (["--max-shard-size", "100KB"], "max_shard_size"),
    "a larger size": (["--max-shard-size", "5GB"], "max_shard_size"),
    "size and dtype": (
        ["--max-shard-size", "5GB", "--dtype", "float32"],
        "dtype (was bfloat16, now float32); max_shard_size (was 150000, now 5000000000)",
    ),
    "checksums": (["--checksums"], "checksums"),
    **{
        f"format {name}": (["--to", name], "format")
        for name in formats.names()
        if name != "transformer-lens"
    },
}


def contents(run: Interrupted) -> tuple[dict[str, str], dict[str, str]]:
    """Return the checksums of all files of both folders, except lock and guard, which change."""
    changing = (f"{WORK_NAME}/lock", f"{WORK_NAME}/run.guard")
    output = {name: digest for name, digest in digests(run.output).items() if name not in changing}
    return digests(run.source), output


def assert_refused(run: Interrupted, options: list[str], *words: str) -> None:
    """Assert that resuming fails with one line that contains these words, and changes nothing."""
    before = contents(run)
    done = resume(run, *options)
    assert_clean_error(done, 2)
    assert all(word in done.stderr for word in words), done.stderr
    assert contents(run) == before


@pytest.mark.parametrize(("damage", "reason"), SOURCES.values(), ids=SOURCES.keys())
def test_another_source_is_refused(damage, reason, run):
    """The line says what differs, nothing is changed, and --overwrite starts from the beginning."""
    damage(run.source)
    if "missing" in reason:  # not a valid source any more
        assert_refused(run, [], reason)
        return
    assert_refused(run, [], reason, "unfinished run", "--overwrite")
    assert resume(run, "--overwrite").returncode == 0
    assert digests(run.output) == whole(run)


@pytest.mark.parametrize(("options", "reason"), OPTIONS.values(), ids=OPTIONS.keys())
def test_other_options_are_refused(options, reason, run):
    """The line says what differs, nothing is changed, and --overwrite starts from the beginning."""
    assert_refused(run, options, reason, "unfinished run", "--overwrite")
    assert resume(run, *options, "--overwrite").returncode == 0
    assert digests(run.output) == whole(run, *options)
    assert resume(run, *options, "--overwrite").returncode == 0


def test_a_source_at_another_path_is_resumed(run):
    """Files are compared by name, size, time and header: a disk may be mounted at another path."""
    expected = whole(run)
    other = Interrupted(run.source.rename(run.source.with_name("moved")), run.output)
    try:
        assert resume(other).returncode == 0
        assert digests(run.output) == expected
    finally:
        other.source.rename(run.source)


STATES = {
    "of another version": (lambda s: s.update(version="0.0.1"), "version"),
    "of another tool": (lambda s: s.update(tool="another"), "tool"),
    "of another schema": (lambda s: s.update(schema=2), "schema 2"),
    "of another format": (lambda s: s.update(source_format="another"), "source_format"),
    "without its source": (lambda s: s.pop("source_files"), "source_files"),
    "without its files": (lambda s: s.pop("files"), "damaged"),
    "with a number for its files": (lambda s: s.update(files=5), "damaged"),
    "with numbers for file names": (lambda s: s.update(files=[1, 2]), "damaged"),
    "with no files": (lambda s: s.update(files=[]), "damaged"),
    "with a file in the parent folder": (
        lambda s: s["files"].append("../source/config.json"),
        "damaged",
    ),
    "with a file in the parent of the parent folder": (
        lambda s: s["files"].append("a/../../x"),
        "damaged",
    ),
    "with a file at an absolute path": (
        lambda s: s["files"].append(s["source"] + "/config.json"),
        "damaged",
    ),
}
TEXTS = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "an array": lambda text: b"[]",
    "null": lambda text: b"null",
    "a string": lambda text: b'"files"',
    "zeros": lambda text: bytes(len(text)),
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "with a key twice": lambda text: text.replace(b'"dtype"', b'"format"'),
    "nested too deeply": lambda text: b'{"files":' * 10_000,
}


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["resumed", "overwritten"])
@pytest.mark.parametrize(("change", "reason"), STATES.values(), ids=STATES.keys())
def test_another_state_is_refused(change, reason, options, run):
    """Without a valid list of the tool's files, --overwrite is refused too and deletes nothing."""
    edit_json(run.output / WORK_NAME / "run.json", change)
    if options and reason in ("version", "tool", "source_format", "source_files"):
        assert resume(run, *options).returncode == 0
        assert digests(run.output) == whole(run)
    else:
        assert_refused(run, options, reason)


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["resumed", "overwritten"])
@pytest.mark.parametrize("change", TEXTS.values(), ids=TEXTS.keys())
def test_a_damaged_state_is_refused(change, options, run):
    """Also with --overwrite, since the state does not say which files may be deleted."""
    state = run.output / WORK_NAME / "run.json"
    state.write_bytes(change(state.read_bytes()))
    assert_refused(run, options, "run.json", "damaged")


def test_files_without_a_state_are_not_the_tools(run):
    (run.output / WORK_NAME / "run.json").unlink()
    assert_refused(run, [], "not this tool's")
    assert_refused(run, ["--overwrite"], "not this tool's")


HARMLESS = {
    "a missing shard": lambda run: min(run.output.glob("*.safetensors")).unlink(),
    "a truncated shard": lambda run: os.truncate(min(run.output.glob("*.safetensors")), 100_000),
    "a file in the work folder": lambda run: (run.output / WORK_NAME / "x.safetensors").write_bytes(
        b"x" * 999
    ),
    "a truncated small file": lambda run: os.truncate(run.output / "tl_config.json", 10),
    "a missing small file": lambda run: (run.output / "source_config.json").unlink(),
    "a missing lock file": lambda run: (run.output / WORK_NAME / "lock").unlink(),
    "a model card": lambda run: (run.source / "README.md").write_text("# A model"),
    "a PyTorch file": lambda run: (run.source / "pytorch_model.bin").write_bytes(b"PK"),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_harmless_changes_are_resumed(change, run):
    """The bytes are those of an uninterrupted run."""
    change(run)
    done = resume(run)
    assert done.returncode == 0, done.stderr
    assert digests(run.output) == whole(run)


@pytest.mark.parametrize("options", [["--workers", "1"], ["--max-shard-size", "150000"]])
def test_options_that_do_not_change_the_bytes_are_resumed(options, run):
    assert resume(run, *options).returncode == 0
    assert digests(run.output) == whole(run)


def test_a_source_through_a_link_is_resumed(run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(run.source)
    monkeypatch.chdir(tmp_path)
    assert resume(Interrupted(Path("link"), run.output)).returncode == 0
    assert digests(run.output) == whole(run)


def test_a_copied_file_that_changes_before_it_is_copied(run):
    """It is not what the state of the run says: no other run could be refused for it."""
    shutil.rmtree(run.output)

    def change(plan) -> None:
        (run.source / "tokenizer.json").write_text('{"version": "2"}')

    with pytest.raises(gptoss_stream.CheckpointError, match=r"tokenizer.json: it changed while"):
        gptoss_stream.convert(*run, max_shard_size="150KB", on_plan=change)
    assert not list(run.output.glob("*.safetensors"))
    assert not (run.output / "tokenizer.json").exists()
    assert_refused(run, [], "copied_files (tokenizer.json)", "unfinished run")


def reformatted(name: str) -> Damage:
    """Write a JSON file with the same value in other bytes."""
    return lambda folder: edit_json(folder / name, lambda value: None)


# It is not specified whether these count as a change.
EITHER = {
    "an index in other bytes": reformatted(INDEX),
    "a configuration in other bytes": reformatted(CONFIG),
    "no index": gone(INDEX),
}


@pytest.mark.parametrize("damage", EITHER.values(), ids=EITHER.keys())
def test_small_files_are_never_mixed(damage, run):
    """The run is refused, or the output is that of the source as it is now."""
    damage(run.source)
    before = contents(run)[1]
    done = resume(run)
    if done.returncode == 0:
        assert digests(run.output) == whole(run)
    else:
        assert_clean_error(done, 2)
        assert "--overwrite" in done.stderr
        assert contents(run)[1] == before
        assert resume(run, "--overwrite").returncode == 0
        assert digests(run.output) == whole(run)
