"""A source that changes during the run, is also the output, or has an index with bad file names.

The output is correct or absent, and the source is never written to.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from disks import mounted
from runs import (
    INDEX_NAME,
    ROOT,
    WORK_NAME,
    assert_clean_error,
    assert_nothing_half_written,
    convert_command,
    digests,
    disturb,
    interrupted,
    run,
    seconds_of_writing,
)

import gptoss_stream

SHARD = "model.safetensors"
INDEXED = "model-00001-of-00001.safetensors"


# --- a source that changes during the run ---------------------------------------------------------


def blanked(file: Path) -> bytes:
    """A shard's bytes with zeros in the second half: valid, with other values."""
    data = file.read_bytes()
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 3)


def overwrite(file: Path) -> None:
    with open(file, "r+b") as opened:
        opened.write(blanked(file))


def replace(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(blanked(file))
    other.rename(file)


def replace_by_one_of_the_same_age(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(blanked(file))
    shutil.copystat(file, other)
    other.rename(file)


QUICK = (truncate, overwrite, replace_by_one_of_the_same_age, Path.unlink)


@pytest.mark.parametrize(
    ("change", "count"),
    [(change, 4) for change in QUICK]
    + [pytest.param(change, 50, marks=pytest.mark.slow) for change in (*QUICK, replace)],
)
def test_a_shard_that_changes_during_the_run(change, count, checkpoints, tmp_path):
    """The run ends with the correct output or with a clean error, and not by a signal.

    Every finished file was written from the old bytes only. Moments are a matter of chance: there
    are more trials, up to ten times as many, until half of them were during a run.
    """
    original = checkpoints(
        layers=3,
        experts=8,
        hidden_size=288,
        intermediate_size=288,
        vocab_size=3000,
        max_shard_size="500KB",
    )
    source, output = tmp_path / "source", tmp_path / "out"
    shutil.copytree(original, source)
    command = convert_command(source, output, "--max-shard-size", "1MB")
    seconds = seconds_of_writing(command, output)
    whole = digests(output)
    chance = random.Random(count)
    live = 0
    for number in range(10 * count):
        if number >= count and live >= count / 2:
            break
        shutil.rmtree(output)
        victim = chance.choice(sorted(source.glob("*.safetensors")))
        files = chance.randrange(len(whole) // 2)  # later, most of it has been read
        pause = chance.uniform(0, seconds / len(whole))
        done, running = disturb(command, output, partial(change, victim), files, pause)
        live += running
        if done.returncode == 0:
            assert digests(output) == whole, victim.name
        else:
            assert_clean_error(done, 2, 3)
            assert_nothing_half_written(output, whole)
        victim.unlink(missing_ok=True)
        shutil.copy2(original / victim.name, victim)
    assert live >= count / 2


# --- an output that is the source -----------------------------------------------------------------


def link(source: Path) -> Path:
    """A symbolic link to a folder, beside it."""
    (source.parent / "link").symlink_to(source)
    return source.parent / "link"


def url(folder: Path) -> str:
    return f"file://{folder}"


ALIASES: dict[str, Callable[[Path], Path | str]] = {
    "the same folder": lambda source: source,
    "a folder inside": lambda source: source / "out",
    "a folder deep inside": lambda source: source / "a/b/../c",
    "the folder around": lambda source: source.parent,
    "a link": link,
    "a folder behind a link": lambda source: link(source) / "out",
    "a slash at the end": lambda source: f"{source}/",
    "two dots": lambda source: f"{source}/../{source.name}",
    "a relative path": lambda source: os.path.relpath(source, ROOT),
    "a URL": url,
    "a URL of a folder inside": lambda source: url(source / "out"),
    "a URL of a link": lambda source: url(link(source)),
    "in the home folder": lambda source: f"~/{source.name}",
}


def everything(folder: Path) -> dict[Path, tuple[int, int]]:
    """The size and time of change of everything below a folder."""
    return {
        path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in sorted(folder.rglob("*"))
    }


def assert_refused_before_any_write(source: Path, output: Path | str) -> None:
    before = digests(source), everything(source.parent)
    done = run(
        convert_command(source, output, "--overwrite"),
        env={**os.environ, "HOME": str(source.parent)},
    )
    assert_clean_error(done, 2)
    assert "are the same folder, or one is inside the other" in done.stderr
    assert (digests(source), everything(source.parent)) == before


@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES.keys())
def test_an_output_that_is_the_source_by_another_name(alias, tiny):
    """It is refused before anything is written, even with --overwrite."""
    assert_refused_before_any_write(tiny, alias(tiny))


MOUNTED = {
    "the same folder": ("source", "."),
    "a folder inside, which does not exist yet": ("source", "a/b"),
    "the folder around": (".", "."),
}


@pytest.mark.parametrize("what", ["source", "reference", "adapter"])
@pytest.mark.parametrize(("bound", "output"), MOUNTED.values(), ids=MOUNTED.keys())
def test_an_output_that_is_mounted_at_another_place(bound, output, what, checkpoints, tmp_path):
    """Only device and inode show that it is what is read."""
    (tmp_path / "home").mkdir()
    source = tmp_path / "home/source"
    if what == "adapter":
        gptoss_stream.synth_adapter(source, layers=2)
    else:
        shutil.copytree(checkpoints(layers=2), source)
    options = () if what == "source" else (f"--{what}", str(source))
    if what == "reference":
        options = (*options, "--to", "hf-mxfp4")
    read = source if what == "source" else checkpoints(layers=2, format="hf")
    with mounted(tmp_path / "mounted", "--bind", str(tmp_path / "home" / bound)) as there:
        before = digests(tmp_path)
        done = run(convert_command(read, there / output, "--overwrite", *options))
        assert_clean_error(done, 2)
        assert f"output and {what} (" in done.stderr
        assert "are the same folder, or one is inside the other" in done.stderr
        assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("bound", "output"), [("source", ""), ("source", "out"), (".", ""), (".", "source/out")]
)
def test_an_output_on_another_mount_of_the_source(bound, output, tiny, tmp_path_factory):
    """It is refused although the two paths have nothing in common."""
    with mounted(tmp_path_factory.mktemp("mount"), "--bind", str(tiny.parent / bound)) as mount:
        assert_refused_before_any_write(tiny, mount / output)


def test_an_output_whose_name_differs_in_case(tiny, tmp_path):
    """It is another folder, or on a case-insensitive file system the source, which is refused."""
    before = digests(tiny)
    done = run(convert_command(tiny, tiny.with_name("SOURCE")))
    assert done.returncode == (2 if (tmp_path / "Source").exists() else 0), done.stderr
    assert digests(tiny) == before


def link_shard(source: Path, output: Path) -> None:
    shard = next(output.glob("*.safetensors"))
    shard.unlink()
    shard.hardlink_to(source / SHARD)


def link_leftovers(source: Path, output: Path, make_link: Callable) -> None:
    """Link files of an unfinished run to the source."""
    shards = [shard.name for shard in output.glob("*.safetensors")]
    shutil.rmtree(output)
    interrupted(source, output)
    for name in ("run.json.partial", *shards):
        make_link(source / SHARD, output / WORK_NAME / name)


def link_folder(source: Path, output: Path) -> None:
    templates = "additional_chat_templates"
    (source / templates).mkdir()
    (source / templates / "tool.jinja").write_text("{{ tools }}")
    assert run(convert_command(source, output, "--overwrite")).returncode == 0
    shutil.rmtree(output / templates)
    (output / templates).symlink_to(source / templates)


def link_work_folder(source: Path, output: Path) -> None:
    (output / WORK_NAME).symlink_to(source)


def link_work_folder_of_a_new_output(source: Path, output: Path) -> None:
    shutil.rmtree(output)
    output.mkdir()
    (output / WORK_NAME).symlink_to(source)


HARD = partial(link_leftovers, make_link=os.link)
SYMBOLIC = partial(link_leftovers, make_link=os.symlink)
LINKS = {
    "a shard": (link_shard, "--overwrite"),
    "hard links as leftovers": (HARD, "--quiet"),
    "hard links as leftovers, replaced": (HARD, "--overwrite"),
    "symbolic links as leftovers": (SYMBOLIC, "--quiet"),
    "symbolic links as leftovers, replaced": (SYMBOLIC, "--overwrite"),
    "a folder": (link_folder, "--overwrite"),
    "the work folder": (link_work_folder, "--overwrite"),
    "the work folder of a new output": (link_work_folder_of_a_new_output, "--quiet"),
}


@pytest.mark.parametrize(("make_links", "option"), LINKS.values(), ids=LINKS.keys())
def test_an_output_that_has_links_to_the_source(make_links, option, tiny, tmp_path):
    """It is resumed, replaced or refused, and the source stays as it is."""
    output = tmp_path / "out"
    assert run(convert_command(tiny, output)).returncode == 0
    shards = digests(output, "*.safetensors")
    make_links(tiny, output)
    before = digests(tiny)
    done = run(convert_command(tiny, output, option))
    assert digests(tiny) == before
    if done.returncode:
        assert_clean_error(done, 2)
    else:
        assert digests(output, "*.safetensors") == shards


# --- names in an index ----------------------------------------------------------------------------


Put = Callable[[Path], object]
"""Puts something into a checkpoint's folder, and returns the name for its index."""


def copied_to(name: str) -> Put:
    """The real shard, whose only fault is its name."""

    def put(source: Path) -> str:
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / INDEXED, source / name)
        return name

    return put


def created(name: str, create: Callable[[Path], object]) -> Put:
    def put(source: Path) -> str:
        create(source / name)
        return name

    return put


def device(file: Path) -> None:
    try:
        os.mknod(file, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        file.open("rb").close()
    except PermissionError:
        pytest.skip("needs the right to make and open a device file")


def link_out(file: Path) -> None:
    file.symlink_to(shutil.move(file.parent / INDEXED, file.parent.parent))


INDEX_NAMES: dict[str, Put] = {
    "absolute": lambda source: str(source / INDEXED),
    "outside": copied_to("../other.safetensors"),
    "in a folder": copied_to("sub/model.safetensors"),
    "with a dot": lambda source: f"./{INDEXED}",
    "a backslash": copied_to("..\\model.safetensors"),
    "NUL": lambda source: f"{INDEXED}\0",
    "empty": lambda source: "",
    "dots": lambda source: "..",
    "hidden": copied_to(".model.safetensors"),
    "another suffix": copied_to("model.bin"),
    "home": lambda source: f"~/{INDEXED}",
    "a pipe": created("pipe.safetensors", os.mkfifo),
    "a device": created("zero.safetensors", device),
    "a folder": created("folder.safetensors", Path.mkdir),
    "a link out": created("link.safetensors", link_out),
    "a link to itself": created("loop.safetensors", lambda file: file.symlink_to(file)),
    "one character too long": lambda source: "m" * 244 + ".safetensors",
    "much longer": lambda source: "m" * 100_000 + ".safetensors",
    "a similar letter": copied_to("m\u043edel.safetensors"),
    "a similar slash": copied_to("..\u2215model.safetensors"),
    "a line break": copied_to("model.safetensors\n"),
    "an escape sequence": copied_to("\x1b[2J.safetensors"),
    "a lone surrogate": lambda source: "\ud800.safetensors",
    "a number": lambda source: 7,
}


@pytest.mark.parametrize("put", INDEX_NAMES.values(), ids=INDEX_NAMES.keys())
def test_a_name_in_the_index_that_is_not_the_name_of_a_shard(put, tiny, tmp_path):
    """It is refused by one printable line; nothing is written, and the run does not block."""
    index = json.loads((tiny / INDEX_NAME).read_text())
    (tiny / SHARD).rename(tiny / INDEXED)  # a file named SHARD is read without the index
    name = put(tiny)
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (tiny / INDEX_NAME).write_text(json.dumps(index))
    before = everything(tmp_path)
    done = run(convert_command(tiny, tmp_path / "out"))
    assert_clean_error(done, 2)
    assert done.stderr.removesuffix("\n").isprintable()
    assert len(done.stderr) < 1000
    assert everything(tmp_path) == before
