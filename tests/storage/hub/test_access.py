"""Tokens, the cache, and what cannot be read at all."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest
from hub_cases import (
    DATA,
    MISSING_SOURCES,
    NAME,
    NOW,
    OUT,
    SIZE,
    TOKEN,
    WRONG,
    assert_no_secret,
    finished,
    python,
)
from hub_runs import after, environment
from runs import WORK_NAME, assert_clean_error
from stand_in_hub import Fault, StandInHub, first


@pytest.mark.parametrize("way", ["option", "variable"])
def test_a_private_repository_is_read_with_a_token(way, hub, cli, released, whole, tmp_path):
    """Only the Hub sees the token, and it is written nowhere."""
    hub.tokens.add(TOKEN)
    hub.add_folder(NAME, released, private=True)
    options = ["--token", TOKEN] if way == "option" else []
    more = {"HF_TOKEN": TOKEN} if way == "variable" else {}
    hub.faults.append(after(20, Fault("status", 500), DATA))
    done = cli("convert", NAME, "out", *SIZE, *options, **more)
    assert done.returncode == 3
    assert (tmp_path / "out" / WORK_NAME / "run.json").exists()
    assert_no_secret(done, tmp_path)
    hub.faults.clear()
    done = cli("convert", NAME, "out", *SIZE, *options, "--json", **more)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert_no_secret(done, tmp_path)
    for request in hub.requests:
        if request.path != "/api/agent-harnesses":  # huggingface_hub's own
            assert request.has_token == (request.origin == "hub"), request
    assert cli("inspect", NAME, *options, **more).returncode == 0
    assert cli("verify", NAME, "out", *options, **more).returncode == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([], "no repository of the Hub that you can see; check the name, or log in"),
        (["--token", WRONG], "log in with `hf auth login`, or give another --token"),
    ],
)
def test_without_the_right_token_the_error_says_what_to_do(
    options, word, hub, convert, released, tmp_path
):
    hub.tokens.add(TOKEN)
    hub.add_folder(NAME, released, private=True)
    done = convert(NAME, "out", *options)
    assert_clean_error(done, 2)
    assert word in done.stderr
    assert_no_secret(done)
    assert not (tmp_path / "out").exists()


def test_a_gated_repository_is_opened_with_a_token(hub, convert, released, whole, tmp_path):
    hub.tokens.add(TOKEN)
    hub.add_folder(NAME, released, gated=True)
    done = convert(NAME, "out")
    assert_clean_error(done, 2)
    assert f"accept the conditions on the page of {NAME}" in done.stderr
    assert convert(NAME, "out", "--token", TOKEN).returncode == 0
    assert finished(tmp_path / "out") == whole(released)


def test_warnings_of_the_client_contain_no_secret(hub, begin, released, whole, tmp_path, served):
    """The client warns of an interrupted download, and names the address."""
    hub.tokens.add(TOKEN)
    faults = [Fault("drop_after", 0), Fault("drop_after", 50_000), Fault("status", 429, NOW)]
    runs = {}
    for number, fault in enumerate(faults):
        name = f"openai/warned-{number}"
        hub.add_folder(name, released, private=True)
        of_it = lambda r, name=name: r.range is None and f"/lfs/{name}/" in r.path  # noqa: E731
        hub.faults.append(first(1, fault, of_it))
        command = ("convert", name, f"out-{number}", *SIZE, "--download")
        runs[tmp_path / f"out-{number}"] = begin(*command, HF_TOKEN=TOKEN)
    ended = {output: run.done() for output, run in runs.items()}  # all, before files are looked at
    for output, done in ended.items():
        assert done.returncode == 0
        assert "?…" in done.stderr, "it did not warn"
        assert_no_secret(done, tmp_path, served[1].home)
        assert finished(output) == whole(released)


def downloaded_files(hub: StandInHub) -> list[str]:
    """Return the files of the CDN that were sent completely."""
    return [r.path for r in hub.requests if r.origin == "cdn" and r.range is None]


def test_offline_the_cache_is_read(hub, released, another, whole, tmp_path):
    hub.add_folder(NAME, released)
    command = ["-m", "gptoss_stream", "convert", NAME, "out", *SIZE, "--quiet"]
    without = python(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert_clean_error(without, 2)
    assert "HF_HUB_OFFLINE is set, and it is not in the cache" in without.stderr
    download = f"import huggingface_hub as h; h.snapshot_download({NAME!r})"
    assert python(hub, tmp_path, "-c", download).returncode == 0
    hub.add_folder(NAME, another)
    hub.reset_counts()
    done = python(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert hub.requests == []
    command = [*command[:3], "out", "hf://tester/out"]
    written = python(hub, tmp_path, *command, HF_HUB_OFFLINE="1")
    assert_clean_error(written, 2)
    assert "HF_HUB_OFFLINE is set" in written.stderr


def test_a_file_is_downloaded_once(hub, cli, convert, released, whole, tmp_path):
    name = "openai/downloaded"
    hub.add_folder(name, released)
    done = convert(name, "out", "--download")
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released)
    assert len(downloaded_files(hub)) == len({*downloaded_files(hub)})
    assert len(downloaded_files(hub)) == len(list(released.glob("*.safetensors")))
    for options in (["--dtype", "float32"], ["--to", "hf"], ["--layers", "0", "--download"]):
        hub.reset_counts()
        assert convert(name, "other", *options, "--overwrite").returncode == 0
        assert not [r for r in hub.requests if r.origin == "cdn" and r.method == "GET"]
        assert finished(tmp_path / "other") == whole(released, *options[:2])


def test_only_what_is_needed_is_downloaded(hub, convert, released, whole, tmp_path):
    name = "openai/downloaded-in-part"
    hub.add_folder(name, released)
    options = ["--only", "embeddings", "--exclude", "*unembed*"]
    done = convert(name, "out", "--download", *options)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "out") == whole(released, *options)
    assert len(downloaded_files(hub)) == 1


def test_incomplete_files_in_the_cache_are_not_used(
    hub, convert, released, whole, served, tmp_path
):
    name = "openai/downloaded-badly"
    hub.add_folder(name, released)
    assert convert(name, "out", "--download").returncode == 0
    cached = sorted((served[1].home / "hf/hub/models--openai--downloaded-badly/blobs").iterdir())
    cut = max(cached, key=lambda blob: blob.stat().st_size)
    cut.write_bytes(cut.read_bytes()[:-1])
    hub.reset_counts()
    for options in ([], ["--download"]):
        done = convert(name, "out", "--overwrite", *options)
        assert done.returncode == 0, done.stderr
        assert finished(tmp_path / "out") == whole(released)
    assert {r.path.rsplit("/")[-1] for r in hub.requests if r.origin == "cdn"} == {cut.name}


@pytest.mark.parametrize("number", range(len(MISSING_SOURCES)))
def test_a_missing_source_is_named(number, refused):
    done, output = refused[0][number], refused[1]
    assert_clean_error(done, 2)
    assert MISSING_SOURCES[number][2] in done.stderr
    assert not output.exists()


@pytest.fixture
def closed() -> str:
    """An address at which no server listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_hub_that_is_down_is_reported_soon(closed, released, tmp_path):
    """Also with the default settings of a user."""
    start = time.monotonic()
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "gptoss_stream", "convert", source, output, "--quiet"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment(closed, tmp_path),
        )
        for source, output in ((NAME, "out"), (released, f"hf://{OUT}"))
    ]
    for run in runs:
        _, said = run.communicate(timeout=60)
        assert time.monotonic() - start < 15
        assert_clean_error(subprocess.CompletedProcess(run.args, run.returncode, "", said), 3)
        assert "the Hub cannot be reached" in said


@pytest.mark.parametrize(("source", "output"), [(NAME, "out"), ("source", "hf://tester/out")])
def test_a_server_that_is_not_a_hub_is_detected(source, output, hub, convert, released, tmp_path):
    (tmp_path / "source").symlink_to(released)
    hub.add_folder(NAME, released)
    hub.faults.append(after(0, Fault("html"), ""))
    done = convert(source, output)
    assert_clean_error(done, 3)
    assert "the server's answer is not one of the Hub" in done.stderr
    assert not (tmp_path / "out").exists()
