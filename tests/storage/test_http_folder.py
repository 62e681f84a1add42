"""An HTTP server as the source: replies are checked, and secrets in its address are not shown."""

from __future__ import annotations

import json
import os
import re
import time
from math import inf
from pathlib import Path

import huggingface_hub.constants
import pytest
from loopback import (
    FileServer,
    Reply,
    gzipped,
    halved,
    lost_answer,
    no_answer,
    short,
    status,
    without,
)
from runs import assert_clean_error, digests, run_in_process

from gptoss_stream.storage import retries

RECORD = "gptoss_stream.json"
SECRET = "tHeSeCrEtOfIt"
DATA = r"^GET .*safetensors($|\?)"
LATER = r"^GET .*00002-of-.*safetensors($|\?)"


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def hasty(monkeypatch):
    """Retry without long waits."""
    monkeypatch.setattr(retries, "FIRST_DELAY", 0.001)


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory) -> dict[str, str]:
    """The output of a local conversion, without the record."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert convert(checkpoints(layers=2), output).returncode == 0
    return without_record(output)


@pytest.fixture
def server(several):
    """A checkpoint of several shards with an index, and a server of it."""
    with FileServer(several) as server:
        yield server


def convert(source, output, *options):
    """Convert in this process."""
    size = ("--max-shard-size", "300KB", "--quiet")
    return run_in_process("convert", source, output, *size, *options)


def without_record(output: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(output).items() if name != RECORD}


def assert_right(done, output: Path, whole: dict[str, str]) -> None:
    assert (done.returncode, done.stderr) == (0, "")
    assert without_record(output) == whole


# -------------------------------------------------------------------------------------- right bytes


@pytest.mark.parametrize("end", ["", "/"])
def test_several_shards_with_an_index(server, whole, tmp_path, end):
    assert_right(convert(server.url + end, tmp_path / "out"), tmp_path / "out", whole)
    assert json.loads((tmp_path / "out" / RECORD).read_text())["source"] == server.url
    assert all("range" in request.headers for request in server.requests_for(DATA))


def test_a_single_shard_in_a_subfolder_without_an_index(checkpoints, whole, tmp_path):
    folder = checkpoints(layers=2)
    (tmp_path / "x y").mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / "x y" / name).symlink_to(folder / name)
    with FileServer(tmp_path) as server:
        done = convert(server.url, tmp_path / "out", "--subfolder", "x y")
    assert_right(done, tmp_path / "out", whole)


def test_only_what_is_needed_is_read(server, tmp_path):
    assert convert(server.url, tmp_path / "out", "--only", "router").returncode == 0
    assert sum(int(r.headers["range"].partition("=")[2].split("-")[1])
               - int(r.headers["range"].partition("=")[2].split("-")[0])
               for r in server.requests_for(DATA)) < 60_000  # fmt: skip


def shifted(request, answer):
    """Other bytes than were requested, and the headers say so."""
    first, last = map(int, re.findall(r"\d+", request.headers["range"]))
    request.headers["range"] = f"bytes={first + 1}-{last + 1}"
    return answer(request)


def longer(request, answer):
    reply = answer(request)
    reply.body += b"more"
    return reply


def whole_file(request, answer):
    request.headers.pop("range")
    return answer(request)


def without_length(request, answer):
    reply = answer(request)
    reply.length = -1
    return reply


def short_without_length(request, answer):
    reply = short(request, answer)
    reply.length = -1
    return reply


BAD_REPLIES = {
    "500": status(500),
    "503": status(503, **{"Retry-After": "0"}),
    "no answer": no_answer,
    "lost": lost_answer,
    "half of it": short,
    "half of it, and it says so": halved,
    "half of it, without a length": short_without_length,
    "more": longer,
    "other bytes": shifted,
    "the whole file": whole_file,
    "gzip": gzipped,
    "no word of which bytes": without("Content-Range"),
}


@pytest.mark.parametrize("how", BAD_REPLIES)
def test_bad_replies_for_a_while(server, hasty, whole, tmp_path, how):
    server.spoil(DATA, BAD_REPLIES[how], times=2)
    server.spoil(LATER, BAD_REPLIES[how], times=2, skip=2)
    assert_right(convert(server.url, tmp_path / "out"), tmp_path / "out", whole)


@pytest.mark.parametrize("how", BAD_REPLIES)
def test_bad_replies_that_last(server, hasty, whole, tmp_path, how):
    """The error is one line, no finished shard is wrong, and the run resumes afterwards."""
    server.spoil(LATER, BAD_REPLIES[how], skip=2)  # its header is read
    done = convert(server.url, tmp_path / "out")
    assert_clean_error(done, 2, 3)
    assert "00002-of" in done.stderr
    assert without_record(tmp_path / "out").items() <= {**whole, **unfinished(tmp_path)}.items()
    server.mend()
    assert_right(convert(server.url, tmp_path / "out"), tmp_path / "out", whole)


def unfinished(tmp_path: Path) -> dict[str, str]:
    found = digests(tmp_path / "out")
    return {name: digest for name, digest in found.items() if name.startswith(".gptoss_stream/")}


@pytest.mark.parametrize("how", [without_length, without("Accept-Ranges")])
def test_headers_that_a_server_may_omit(server, whole, tmp_path, how):
    server.spoil("^GET" if how is without_length else "", how)
    assert_right(convert(server.url, tmp_path / "out"), tmp_path / "out", whole)


def test_a_server_that_names_no_version(server, whole, tmp_path):
    """A change cannot be noticed, which is said once."""
    server.spoil("", without("ETag"))
    done = convert(server.url, tmp_path / "out")
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert f"{server.url}: the server sends neither ETag nor Last-Modified" in done.stderr
    assert without_record(tmp_path / "out") == whole


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_redirects_are_followed(server, several, whole, tmp_path, code):
    with FileServer(several) as other:

        def elsewhere(request, answer):
            return Reply(code, {"Location": f"{other.url}{request.path}?signature={SECRET}"})

        server.spoil("", elsewhere)
        assert_right(convert(server.url, tmp_path / "out"), tmp_path / "out", whole)
        assert {request.method for request in server.requests} == {"HEAD", "GET"}
        assert len(other.requests_for(DATA)) == len(server.requests_for(DATA))


# ----------------------------------------------------------------------------------- one clear line


def loop(request, answer):
    return Reply(302, {"Location": request.path})


@pytest.mark.parametrize(
    ("pattern", "how", "code", "words"),
    [
        ("", status(404), 2, "config.json: missing"),
        ("index", status(404), 2, "no model.safetensors.index.json and no .safetensors file"),
        ("00002-of", status(404), 2, "1 of its 4 shards do not exist: model-00002"),
        ("^GET .*00002-of", status(404), 2, "00002-of-00003.safetensors: it does not exist (404)"),
        ("config", status(401), 2, "config.json: no access (401); check the address"),
        ("^GET .*00002-of", status(403), 2, "no access (403); check the address and"),
        ("^HEAD", status(405), 2, "the server gives no size for it (405)"),
        ("^HEAD", without_length, 2, "the server gives no size for it (200)"),
        (DATA, whole_file, 3, "does not honour byte ranges"),
        ("config", loop, 3, "no connection (TooManyRedirects)"),
        ("config", no_answer, 3, "no connection (RemoteProtocolError)"),
    ],
)
def test_one_clear_line(server, tmp_path, pattern, how, code, words):
    """An error that retries cannot solve is reported soon, in one line."""
    server.spoil(pattern, how)
    begun = time.monotonic()
    done = convert(f"{server.url}?key={SECRET}", tmp_path / "out")
    assert time.monotonic() - begun < 10
    assert_clean_error(done, code)
    assert f"error: {server.url}" in done.stderr
    assert words in done.stderr
    assert SECRET not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_server_that_is_down(tmp_path):
    begun = time.monotonic()
    done = convert(f"http://me:{SECRET}@127.0.0.1:1/x?key={SECRET}", tmp_path / "out")
    assert time.monotonic() - begun < 10
    assert_clean_error(done, 3)
    assert "error: http://127.0.0.1:1/x/config.json: no connection" in done.stderr
    assert SECRET not in done.stderr


def test_the_offline_mode_of_the_hub(server, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    done = convert(f"{server.url}?key={SECRET}", tmp_path / "out")
    assert_clean_error(done, 2)
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert SECRET not in done.stderr


# -------------------------------------------------------------------------- a source that changes


def test_a_file_that_changes_during_the_run(server, hasty, whole, tmp_path):
    victim = sorted(server.folder.glob("*.safetensors"))[2]

    def change(request, answer):
        data = victim.read_bytes()
        victim.write_bytes(data[:-1000] + bytes(1000))
        return answer(request)

    server.spoil(LATER, change, times=1, skip=2)
    done = convert(server.url, tmp_path / "out")
    assert_clean_error(done, 2)
    assert f"{victim.name}: it changed while it was being read" in done.stderr
    written = digests(tmp_path / "out", "*.safetensors")
    assert written.items() <= whole.items()
    done = convert(server.url, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "differs in source_files" in done.stderr


def test_a_tokenizer_that_changes_before_a_run_resumes(server, hasty, tmp_path):
    tokenizer = server.folder / "tokenizer.json"
    tokenizer.write_text("{}")
    server.spoil(LATER, status(404), skip=2)
    assert_clean_error(convert(server.url, tmp_path / "out"), 2)
    found = without_record(tmp_path / "out")
    server.mend()
    tokenizer.write_text("[]")
    done = convert(server.url, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "an unfinished run that differs in copied_files (tokenizer.json)" in done.stderr
    assert "tokenizer.json" in found
    assert {n: found[n] for n in found if "/" not in n} == {
        n: digest for n, digest in without_record(tmp_path / "out").items() if "/" not in n
    }


@pytest.mark.parametrize("header", ["ETag", "Last-Modified"])
def test_a_file_that_has_changed_after_it_was_read(server, hasty, whole, tmp_path, header):
    """The version is requested again before a shard gets its final name."""

    def dated(request, answer):
        reply = answer(request)
        if header == "Last-Modified" and "ETag" in reply.headers:
            reply.headers["Last-Modified"] = reply.headers.pop("ETag")
        return reply

    victim = sorted(server.folder.glob("*.safetensors"))[0]
    size = victim.stat().st_size

    def change(request, answer):
        reply = answer(request)
        last = int(request.headers["range"].rpartition("-")[2])
        if last == size - 1:
            os.utime(victim)
        return reply

    server.spoil("", dated)
    server.spoil(f"GET /{victim.name}", change)
    done = convert(server.url, tmp_path / "out")
    assert_clean_error(done, 2)
    assert f"{victim.name}: it changed while it was being read" in done.stderr
    assert digests(tmp_path / "out", "*.safetensors").items() <= whole.items()


# -------------------------------------------------------------------------------------- secrets


def test_secrets_in_an_address_are_used_and_not_shown(server, hasty, whole, tmp_path):
    """Query and password are sent with each request, and are in no output."""

    def guarded(request, answer):
        if request.query != f"key={SECRET}" or not request.headers.get("authorization"):
            return Reply(403)
        return answer(request)

    server.spoil("", guarded)
    url = f"{server.url}?key={SECRET}".replace("://", f"://me:{SECRET}@")
    for options in (("--json",), ("--overwrite",)):
        done = run_in_process("convert", url, tmp_path / "out", *options)
        assert done.returncode == 0, done.stderr
        assert f"reading {server.url}" in done.stderr
        assert SECRET not in done.stdout + done.stderr
    assert not [f for f in (tmp_path / "out").rglob("*") if SECRET.encode() in f.read_bytes()]
    for command in ("plan", "inspect"):
        done = run_in_process(command, url, *(["--json"] if command == "inspect" else []))
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
    refused = convert(url.replace("key=", "kex="), tmp_path / "other")
    assert_clean_error(refused, 2)
    assert SECRET not in refused.stderr


def test_an_http_server_cannot_be_written_to(server, checkpoints, tmp_path):
    done = convert(checkpoints(), f"{server.url}?key={SECRET}")
    assert_clean_error(done, 2)
    assert "an HTTP server cannot be written to" in done.stderr
    assert SECRET not in done.stderr
    assert server.requests == []


def test_a_slow_server(server, whole, tmp_path):
    server.rate = 2e6
    assert_right(convert(server.url, tmp_path / "out"), tmp_path / "out", whole)
    assert server.rate < inf
