"""Repositories that contain an earlier output or files of another user."""

from __future__ import annotations

import pytest
from hub_cases import (
    NAME,
    OUT,
    PUT,
    RECORD,
    TOKEN,
    WRONG,
    assert_no_secret,
    commits,
    contents,
    requested,
    shards,
    staged,
)
from hub_runs import after
from runs import assert_clean_error
from stand_in_hub import Fault


def test_overwrite_replaces_an_output(hub, convert, released, another, whole):
    """By other options or another source; only what the tool wrote is deleted."""
    assert convert(released, f"hf://{OUT}").returncode == 0
    card = {"README.md": b"# Mine", ".gitattributes": b"* text\n"}
    hub.add_repo(OUT, {**hub.files(OUT), **card})
    for source, options, word in (
        (released, ["--dtype", "float32"], "dtype"),
        (released, ["--to", "hf"], "format"),
        (another, [], "source_files"),
    ):
        before = contents(hub)
        refused = convert(source, f"hf://{OUT}", *options)
        assert_clean_error(refused, 2)
        assert f"a finished run that differs in {word}" in refused.stderr
        assert "--overwrite" in refused.stderr
        assert contents(hub) == before
        done = convert(source, f"hf://{OUT}", *options, "--overwrite")
        assert done.returncode == 0, done.stderr
        assert contents(hub) == whole(source, *options)
        for name, data in card.items():
            assert bytes(hub.files(OUT)[name].data) == data


def test_an_unfinished_output_of_another_run_is_refused(hub, convert, released, whole, tmp_path):
    hub.faults.append(after(2, Fault("status", 403), PUT))
    assert convert(released, f"hf://{OUT}").returncode == 2
    hub.faults.clear()
    before, n = contents(hub), len(commits(hub))
    for machine in ("this", "another"):
        done = convert(released, f"hf://{OUT}", "--dtype", "float32", machine=machine)
        assert_clean_error(done, 2)
        assert "differs in dtype (was bfloat16, now float32)" in done.stderr
    assert (contents(hub), len(commits(hub))) == (before, n)
    done = convert(released, f"hf://{OUT}", "--dtype", "float32", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert contents(hub) == whole(released, "--dtype", "float32")


def test_foreign_files_are_kept(hub, convert, released, whole):
    """With or without --overwrite; so are those of the source."""
    hub.add_repo(OUT, {"weights.bin": b"mine", "README.md": b"# Mine"})
    hub.add_folder(NAME, released)
    for output, word in ((OUT, "weights.bin"), (NAME, "")):
        before = hub.files(output)
        for options in ([], ["--overwrite"]):
            done = convert(NAME, f"hf://{output}", *options)
            assert_clean_error(done, 2)
            assert "it holds files that are not this tool's" in done.stderr
            assert word in done.stderr
        assert hub.files(output) == before
        assert len(hub.repos[output].commits) == 1
    # A folder beside them is ours.
    assert convert(NAME, f"hf://{OUT}/converted").returncode == 0
    found = {n.removeprefix("converted/"): d for n, d in contents(hub).items()}
    assert found.keys() - whole(released).keys() == {"weights.bin", RECORD, "README.md"}
    assert found.items() >= whole(released).items()


def test_a_refused_listing_is_not_an_empty_repository(hub, convert, released):
    """Otherwise files would be written among foreign files."""
    hub.add_repo(OUT, {"weights.bin": b"mine"})
    for status in (400, 403):
        hub.faults.append(after(0, Fault("status", status), r"GET .*/tree/"))
        done = convert(released, f"hf://{OUT}")
        assert_clean_error(done, 2, 3)
        assert len(hub.repos[OUT].commits) == 1
        hub.faults.clear()


@pytest.mark.parametrize("options", [[], ["--token", WRONG]], ids=["no token", "a wrong one"])
def test_writing_needs_the_right_token(options, hub, convert, released, tmp_path):
    hub.tokens.add(TOKEN)
    done = convert(released, f"hf://{OUT}", *options)
    assert_clean_error(done, 2)
    assert "log in with `hf auth login`" in done.stderr
    assert_no_secret(done)
    assert hub.repos == {}
    assert staged(tmp_path) == []
    assert convert(released, f"hf://{OUT}", "--token", TOKEN).returncode == 0
    assert hub.repos[OUT].private


def test_deleted_shards_are_written_again(hub, convert, released, whole):
    assert convert(released, f"hf://{OUT}").returncode == 0
    files = dict(hub.files(OUT))
    lost = sorted(shards(hub))[2]
    del files[lost]
    hub.add_repo(OUT, files)
    hub.reset_counts()
    assert convert(released, f"hf://{OUT}").returncode == 0
    assert contents(hub) == whole(released)
    assert requested(hub).count("cdn PUT") <= 1


def test_a_shard_that_somebody_replaced_is_written_again(hub, convert, released, whole):
    """Also by another machine: its checksum is in the repository."""
    hub.faults.append(after(2, Fault("status", 403), PUT))
    assert convert(released, f"hf://{OUT}", "--checksums").returncode == 2
    hub.faults.clear()
    name = min(shards(hub))
    content = hub.files(OUT)[name]
    data = bytearray(content.read(0, content.nbytes))
    data[-1] ^= 1
    hub.add_repo(OUT, {**hub.files(OUT), name: bytes(data)})
    done = convert(released, f"hf://{OUT}", "--checksums", machine="another")
    assert done.returncode == 0, done.stderr
    assert contents(hub) == whole(released, "--checksums")
