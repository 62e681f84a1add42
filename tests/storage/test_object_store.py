"""Buckets: s3fs and other stores of fsspec, against a server of S3 on loopback (moto)."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from math import inf
from pathlib import Path

import boto3
import fsspec
import pytest
from loopback import Proxy, Reply, flipped, halved, lost_answer, no_answer, short, status
from runs import (
    INDEX_NAME,
    ROOT,
    WORK_NAME,
    assert_clean_error,
    convert_command,
    digests,
    run_here,
    shards_there,
)

import gptoss_stream
from gptoss_stream.errors import MachineError
from gptoss_stream.storage import retries
from gptoss_stream.storage.object_store import ObjectStore

RECORD, SUMS, RUN = "gptoss_stream.json", "SHA256SUMS", f"{WORK_NAME}/run.json"
SHARDS = [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
KEY, SECRET = "AKIATESTKEY", "tHeSeCrEtOfIt"
MOTO = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def error(code: str) -> bytes:
    """What S3 says with a status that is none of success."""
    return f"<Error><Code>{code}</Code><Message>It is {code}.</Message></Error>".encode()


DENIED = status(403, error("AccessDenied"))
SLOW_DOWN = status(503, error("SlowDown"))
INTERNAL = status(500, error("InternalError"))


class Store:
    """A bucket: as the tool sees it, through a proxy, and as it is."""

    numbers = itertools.count()

    def __init__(self, client, proxy: Proxy) -> None:
        self.bucket = f"bucket-{next(self.numbers)}"
        self.proxy = proxy
        self.client = client
        self.client.create_bucket(Bucket=self.bucket)

    def url(self, folder: str = "out") -> str:
        return f"s3://{self.bucket}/{folder}"

    def write(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)

    def fill(self, source: Path, folder: str = "source") -> str:
        """Copy a folder into it; gives its URL."""
        for file in source.iterdir():
            self.write(f"{folder}/{file.name}", file.read_bytes())
        return self.url(folder)

    def objects(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket)
        return [entry["Key"] for entry in found.get("Contents", ())]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def digests(self, folder: str = "out") -> dict[str, str]:
        start = f"{folder}/" if folder else ""
        return {
            key.removeprefix(start): hashlib.sha256(self.read(key)).hexdigest()
            for key in self.objects()
            if key.startswith(start)
        }

    def puts(self) -> list[str]:
        """The names of the objects that were written, one after another."""
        return [r.path.removeprefix(f"/{self.bucket}/out/") for r in self.proxy.asked("^PUT ")]


@pytest.fixture(scope="module")
def moto():
    """A server of S3, with a proxy before it: a client of boto3 and the proxy."""
    with subprocess.Popen(
        [sys.executable, "-c", MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        upstream = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        with Proxy(upstream) as proxy:
            yield boto3.client("s3", endpoint_url=upstream, **keys), proxy
        process.kill()


@pytest.fixture
def s3(moto, monkeypatch, tmp_path):
    """A bucket of one's own, in an environment that leads to it."""
    client, proxy = moto
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # the tool tries again, and not the client too
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    monkeypatch.setattr(retries, "FIRST_DELAY", 0.001)
    proxy.mend()
    proxy.requests.clear()
    proxy.rate = inf
    return Store(client, proxy)


@pytest.fixture
def new_clients():
    """None that an earlier test has made, and none of these for a later one."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory) -> dict[str, str]:
    """What a conversion on this machine gives, with checksums."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert convert(checkpoints(), output, "--checksums").returncode == 0
    return digests(output)


def convert(source, output, *options):
    """A conversion in this process."""
    size = ("--max-shard-size", "300KB", "--quiet")
    return run_here("convert", source, output, *size, *options)


def assert_done(done) -> None:
    assert (done.returncode, done.stderr) == (0, "")


def data_of(sums: dict[str, str]) -> dict[str, str]:
    """Without what tells of the source and the options."""
    return {name: sums[name] for name in sums if name not in (RECORD, SUMS)}


def assert_nothing_wrong(s3: Store, whole: dict[str, str]) -> None:
    """What is there is right, and with an index all is."""
    found = s3.digests()
    found = {n: d for n, d in found.items() if not n.startswith(f"{WORK_NAME}/")}
    assert found.items() <= whole.items()
    assert INDEX_NAME not in found or found == whole


def staged(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "cache" / "gptoss_stream").rglob("*")]


# -------------------------------------------------------------------------------- from end to end


def test_from_a_folder_to_a_bucket(s3, checkpoints, whole, tmp_path):
    """The same files, the record too; what says that a run is under way is first and last to
    change, and of the files the index is the last."""
    under_way = []

    def look(request, answer):
        under_way.append(f"out/{RUN}" in s3.objects())
        return answer(request)

    s3.proxy.spoil("PUT .*(safetensors|json)$", look, skip=1)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    puts = s3.puts()
    assert puts[0] == RUN
    assert puts[-1] == INDEX_NAME
    sums = [f".gptoss_stream/{name}.sha256" for name in whole if name.endswith(".safetensors")]
    assert sorted(puts) == sorted([*whole, RUN, *sums])
    assert s3.proxy.requests[-1].method == "DELETE"
    assert under_way == [True] * (len(whole) - 1)  # not asked at SHA256SUMS
    assert staged(tmp_path) == []


def test_from_a_bucket_to_a_folder(s3, checkpoints, whole, tmp_path):
    source = s3.fill(checkpoints(max_shard_size="200KB"))
    assert_done(convert(source, tmp_path / "out"))
    assert data_of(digests(tmp_path / "out")) == data_of(whole)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["source"] == source


def test_from_the_root_of_a_bucket_to_that_of_another(s3, checkpoints, whole):
    other = Store(s3.client, s3.proxy)
    for file in checkpoints().iterdir():
        other.write(file.name, file.read_bytes())
    assert_done(convert(f"s3://{other.bucket}", f"s3://{s3.bucket}/"))
    assert data_of(s3.digests("")) == data_of(whole)


def test_neighbours_and_empty_folders_are_none_of_its_business(s3, checkpoints, whole):
    for key in ("out2/x", "out.json", "out/", "other/out/x"):
        s3.write(key, b"")
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert_done(convert(checkpoints(), s3.url(), "--checksums", "--overwrite"))
    assert {n: d for n, d in s3.digests().items() if n} == whole
    assert {"out2/x", "out.json", "other/out/x"} <= {*s3.objects()}


def test_a_finished_run_is_not_done_again(s3, checkpoints, tmp_path):
    assert_done(convert(checkpoints(), s3.url()))
    s3.proxy.requests.clear()
    done = run_here("convert", checkpoints(), s3.url(), "--max-shard-size", "300KB")
    assert "nothing to do: all shards were already written" in done.stdout
    assert s3.proxy.asked("^(PUT|POST|DELETE)") == []
    assert staged(tmp_path) == []


def test_parts_of_a_large_shard(s3, checkpoints, tmp_path):
    """A shard that goes in several parts, of which one is wrong at first."""
    large = checkpoints(layers=1, experts=2, hidden_size=1440, vocab_size=6000)
    assert_done(run_here("convert", large, tmp_path / "near", "--quiet"))
    s3.proxy.spoil("PUT .*partNumber=2", flipped, times=1)
    assert_done(run_here("convert", large, s3.url(), "--quiet"))
    assert s3.digests() == digests(tmp_path / "near")
    shard = s3.client.head_object(Bucket=s3.bucket, Key="out/model.safetensors")
    assert shard["ContentLength"] > 2 * (16 << 20)
    assert shard["ETag"].endswith('-3"')
    assert len(s3.proxy.asked("PUT .*partNumber")) == 6, "found out, and sent again"


# ----------------------------------------------------------------------------------- interrupted


@contextmanager
def process(source: Path, url: str, *options: str):
    """A conversion in a process of its own, which is killed in the end."""
    command = convert_command(source, url, *options)
    pipe = subprocess.PIPE
    running = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def killed(s3: Store, source: Path, pattern: str, skip: int, is_done: bool) -> bool:
    """Kill a run at a request that has this pattern, after so many others, before or after it is
    done; tells whether the run came so far."""
    arrived, until = threading.Event(), threading.Event()

    def hold(request, answer):
        reply = answer(request) if is_done else None
        arrived.set()
        until.wait(30)
        return reply or Reply(0)

    s3.proxy.spoil(pattern, hold, skip=skip)
    with process(source, s3.url(), "--checksums") as running:
        while running.poll() is None and not arrived.wait(0.01):
            pass
        ended = running.poll()
    until.set()
    s3.proxy.mend()
    assert ended in (None, 0)
    return ended is None


def assert_written_once(s3: Store) -> None:
    """A shard that had arrived was never sent again."""
    arrived = [r.path for r in s3.proxy.asked("PUT .*safetensors$") if r.status == 200]
    assert len(arrived) == len({*arrived})


def test_kills_in_a_chain(s3, checkpoints, whole, tmp_path):
    """Each at another request, seldom where the last one was."""
    chance = random.Random(5)
    kills = 0
    while kills < 4 and killed(
        s3, checkpoints(), "", chance.randrange(6, 13), chance.random() < 0.5
    ):
        kills += 1
        assert_nothing_wrong(s3, whole)
    assert kills >= 3
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    assert_written_once(s3)
    assert staged(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("is_done", [False, True])
def test_a_kill_at_any_request(s3, checkpoints, whole, tmp_path, is_done):
    for number in itertools.count():
        s3.proxy.requests.clear()
        other = Store(s3.client, s3.proxy)
        alive = killed(other, checkpoints(), "", number, is_done)
        assert_nothing_wrong(other, whole)
        assert_done(convert(checkpoints(), other.url(), "--checksums"))
        assert other.digests() == whole, number
        assert_written_once(other)
        assert staged(tmp_path) == [], number
        if not alive:
            assert number > 20
            break


def test_a_kill_right_before_the_end(s3, checkpoints, whole, tmp_path):
    """All has arrived, and what is left here is deleted all the same."""
    assert killed(s3, checkpoints(), f"DELETE .*{RUN}", 0, is_done=True)
    assert s3.digests() == whole
    assert staged(tmp_path) != []
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    assert staged(tmp_path) == []


def test_ctrl_c_while_a_slow_store_is_waited_for(s3, checkpoints, whole):
    until = threading.Event()

    def hold(request, answer):
        until.wait(30)
        return Reply(0)

    s3.proxy.spoil("PUT .*safetensors$", hold, skip=1)
    with process(checkpoints(), s3.url(), "--checksums") as running:
        while running.poll() is None and len(s3.proxy.asked("PUT .*safetensors$")) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=5)
    until.set()
    s3.proxy.mend()
    assert (running.returncode, out) == (130, "")
    assert err == "gptoss_stream: interrupted; run the same command again to resume\n"
    assert_nothing_wrong(s3, whole)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    assert_written_once(s3)


@pytest.mark.parametrize(
    ("how", "staging"), [(no_answer, "the same"), (INTERNAL, "another"), (DENIED, "the same")]
)
def test_a_server_that_fails_and_recovers(s3, checkpoints, whole, tmp_path, how, staging):
    s3.proxy.spoil("PUT .*safetensors$", how, skip=2)
    assert_clean_error(convert(checkpoints(), s3.url(), "--checksums"), 2, 3)
    assert len([name for name in s3.digests() if name in SHARDS]) == 2
    assert_nothing_wrong(s3, whole)
    s3.proxy.mend()
    elsewhere = ("--staging", str(tmp_path / "other")) if staging == "another" else ()
    assert_done(convert(checkpoints(), s3.url(), "--checksums", *elsewhere))
    assert s3.digests() == whole
    # Of what another machine has sent the sum is not known.
    if staging == "the same":
        assert_written_once(s3)
        assert staged(tmp_path) == []


@pytest.mark.parametrize("how", [no_answer, lost_answer, INTERNAL, SLOW_DOWN])
def test_a_server_that_fails_for_a_while(s3, checkpoints, whole, tmp_path, how):
    for what in ("PUT .*tensors$", "PUT .*json$", "GET .*list-type", "HEAD .*tensors$", "DELETE"):
        s3.proxy.spoil(what, how, times=2)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    assert staged(tmp_path) == []


@pytest.mark.parametrize(
    ("how", "times"),
    [(no_answer, 2), (short, 2), (halved, 2), (SLOW_DOWN, 2), (short, inf), (INTERNAL, inf)],
)
def test_a_source_that_is_badly_read(s3, checkpoints, whole, tmp_path, how, times):
    source = s3.fill(checkpoints(max_shard_size="200KB"))
    s3.proxy.spoil("GET .*safetensors$", how, times=times, skip=13)
    done = convert(source, tmp_path / "out")
    if times == inf:
        assert_clean_error(done, 3)
        s3.proxy.mend()
        done = convert(source, tmp_path / "out")
    assert_done(done)
    assert data_of(digests(tmp_path / "out")) == data_of(whole)


# ------------------------------------------------------------------------------- what has arrived


def test_what_arrives_wrong_is_sent_again(s3, checkpoints, whole):
    s3.proxy.spoil("PUT .*safetensors$", flipped, times=2)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole


def test_what_arrives_wrong_for_ever_does_not_stay(s3, checkpoints, whole):
    """Or the next run would take it for finished."""
    s3.proxy.spoil(f"PUT .*{SHARDS[2]}$", flipped)
    done = convert(checkpoints(), s3.url(), "--checksums")
    assert_clean_error(done, 3)
    assert f"{s3.url()}/{SHARDS[2]}: " in done.stderr
    assert_nothing_wrong(s3, whole)
    s3.proxy.mend()
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole


def test_etags_that_only_look_like_sums(s3, checkpoints, whole):
    """As of objects that are encrypted: one is read back, which shows it."""

    def other_etag(request, answer):
        reply = answer(request)
        if "ETag" in reply.headers:
            reply.headers["ETag"] = reply.headers["ETag"][::-1]
        return reply

    s3.proxy.spoil("^(PUT|HEAD) ", other_etag)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    assert [r.name for r in s3.proxy.asked("GET .*out/")] == ["run.json"]
    assert_written_once(s3)


def test_a_wrong_file_is_told_from_an_etag_that_is_no_sum(s3):
    bucket = ObjectStore(s3.url())
    s3.proxy.spoil("PUT", flipped)
    with pytest.raises(MachineError, match=f"{s3.url()}/x: "):
        bucket.put({"x": b"some bytes"}, {})
    assert s3.objects() == []
    s3.proxy.mend()
    bucket.put({"x": b"some bytes"}, {})
    assert s3.read("out/x") == b"some bytes"


# ----------------------------------------------------------------------- whose is what is there


def test_overwriting_deletes_what_the_tool_made(s3, checkpoints, whole):
    assert_done(convert(checkpoints(), s3.url(), "--checksums", "--max-shard-size", "150KB"))
    before = {*s3.digests()}
    assert_done(convert(checkpoints(), s3.url(), "--overwrite"))
    assert data_of(s3.digests()) == data_of(whole)
    assert SUMS in before
    assert SUMS not in s3.digests()
    deleted = [r.name for r in s3.proxy.asked("DELETE") if not r.name.endswith(".sha256")]
    _, index, *_, record, _ = deleted
    assert (index, record) == (INDEX_NAME, RECORD)


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_options_are_refused(s3, checkpoints, tmp_path, is_finished):
    if not is_finished:
        s3.proxy.spoil("PUT .*safetensors$", DENIED, skip=1)
    convert(checkpoints(), s3.url())
    s3.proxy.mend()
    before = s3.digests()
    done = convert(checkpoints(), s3.url(), "--dtype", "float32", "--staging", tmp_path / "other")
    assert_clean_error(done, 2)
    assert f"{s3.url()}: it holds {'a finished' if is_finished else 'an unfinished'}" in done.stderr
    assert "differs in dtype (was bfloat16, now float32)" in done.stderr
    assert s3.digests() == before


def test_foreign_objects_are_refused(s3, checkpoints, tmp_path):
    s3.write("out/notes/mine.txt", b"mine")
    for options in ((), ("--overwrite",)):
        done = convert(checkpoints(), s3.url(), *options)
        assert_clean_error(done, 2)
        assert "files that are not this tool's (notes)" in done.stderr
    assert s3.objects() == ["out/notes/mine.txt"]
    assert staged(tmp_path) == []


# -------------------------------------------------------------------------------- space and pace


@pytest.mark.parametrize("most", [1, 2])
def test_few_shards_are_here_at_a_time(s3, checkpoints, whole, tmp_path, monkeypatch, most):
    """Also where the store is slow, and a large transpose goes through a scratch file."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 100_000)
    s3.proxy.rate = 3e6
    seen, over = Counter(), threading.Event()

    def callbacks():
        while not over.wait(0.002):
            seen[len(shards_there(tmp_path / "cache"))] += 1

    watcher = threading.Thread(target=callbacks)
    watcher.start()
    try:
        done = convert(checkpoints(), s3.url(), "--checksums", "--max-staged", str(most))
    finally:
        over.set()
        watcher.join()
    assert_done(done)
    assert s3.digests() == whole
    assert max(seen) == most
    assert staged(tmp_path) == []


# --------------------------------------------------------------------------- a source that changes


def test_a_source_that_changes_meanwhile(s3, checkpoints, whole, tmp_path):
    source = s3.fill(checkpoints(max_shard_size="200KB"))
    victim = sorted(key for key in s3.objects() if key.endswith("safetensors"))[2]

    def change(request, answer):
        s3.write(victim, s3.read(victim)[:-1000] + bytes(1000))
        return answer(request)

    headers = 2 * len([key for key in s3.objects() if key.endswith("safetensors")])
    s3.proxy.spoil("GET .*safetensors$", change, times=1, skip=headers + 1)
    done = convert(source, tmp_path / "out")
    assert_clean_error(done, 2)
    assert f"{victim}: it changed while it was being read" in done.stderr
    made = digests(tmp_path / "out", "*.safetensors")
    assert made.items() <= whole.items()
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    again = convert(source, tmp_path / "out")
    assert_clean_error(again, 2)
    assert "source_files" in again.stderr


def test_a_source_that_is_deleted_meanwhile(s3, checkpoints, tmp_path):
    source = s3.fill(checkpoints())

    def delete(request, answer):
        s3.client.delete_object(Bucket=s3.bucket, Key="source/model.safetensors")
        return answer(request)

    s3.proxy.spoil("GET .*safetensors$", delete, times=1, skip=2)
    done = convert(source, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "source/model.safetensors: it does not exist" in done.stderr
    assert digests(tmp_path / "out", "*.safetensors") == {}


# -------------------------------------------------------------------------------- clear refusals


def nothing(s3: Store, monkeypatch) -> None:
    """As it is."""


def no_credentials(s3: Store, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


def server_down(s3: Store, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")


def listing_denied(s3: Store, monkeypatch) -> None:
    s3.proxy.spoil("GET .*list-type", DENIED)


def writing_denied(s3: Store, monkeypatch) -> None:
    s3.proxy.spoil("PUT", DENIED)


@pytest.mark.parametrize(
    ("what", "source", "output", "code", "words"),
    [
        (no_credentials, None, "s3://{}/out", 3, "s3://{}/out: Unable to locate credentials"),
        (no_credentials, "s3://{}/x", None, 3, "s3://{}/x: Unable to locate credentials"),
        (server_down, None, "s3://{}/out", 3, "s3://{}/out: Could not connect"),
        (listing_denied, None, "s3://{}/out", 2, "s3://{}/out: no access (It is AccessDenied"),
        (listing_denied, "s3://{}/x", None, 2, "s3://{}/x: no access (It is AccessDenied"),
        (writing_denied, None, "s3://{}/out", 2, "run.json: no access (It is AccessDenied"),
        (nothing, "s3://{}/x", None, 2, "s3://{}/x: there are no files in it"),
        (nothing, "s3://no-{}/x", None, 2, "s3://no-{}/x: there are no files in it"),
        (nothing, None, "s3://no-{}/out", 2, "The specified bucket does not exist"),
        (nothing, None, "s3://", 2, "name a bucket"),
        (nothing, "s3:///x", None, 2, "name a bucket"),
        (nothing, "s3://key:tHeSeCrEt/OfIt@{}/x", None, 2, "a key in a URL is not used"),
        (nothing, None, "s3://key:tHeSeCrEtOfIt@{}/x", 2, "a key in a URL is not used"),
        (nothing, None, "ftp://me:tHeSeCrEtOfIt@127.0.0.1:1/x", 2, "ftp://127.0.0.1:1/x: "),
        (nothing, "nosuch://{}/x", None, 2, "Protocol not known: nosuch"),
        (nothing, None, "gs://{}/out", 2, "install gcsfs"),
        (nothing, "gs://{}/x", None, 2, "install gcsfs"),
    ],
)  # fmt: skip
def test_one_clear_line(
    s3, new_clients, checkpoints, monkeypatch, tmp_path, what, source, output, code, words
):
    what(s3, monkeypatch)
    begun = time.monotonic()
    done = convert(
        source.format(s3.bucket) if source else checkpoints(),
        output.format(s3.bucket) if output else tmp_path / "out",
    )
    assert time.monotonic() - begun < 15
    assert_clean_error(done, code)
    assert words.format(s3.bucket) in done.stderr
    assert SECRET not in done.stderr
    assert "OfIt" not in done.stderr
    assert s3.objects() == []
    names = [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]]
    assert not [name for name in names if name.startswith("no-")], "a bucket was made"
    assert staged(tmp_path) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_server_that_is_down_is_soon_given_up(s3, checkpoints, monkeypatch):
    """With all patience that the client and the tool have."""
    server_down(s3, monkeypatch)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    begun = time.monotonic()
    with process(checkpoints(), s3.url()) as running:
        out, err = running.communicate(timeout=60)
    assert_clean_error(subprocess.CompletedProcess([], running.returncode, out, err), 3)
    assert time.monotonic() - begun < 30


def test_secrets_stay_secret(s3, checkpoints, tmp_path):
    """In what is printed and written, and with words on everything."""
    source = s3.fill(checkpoints())
    kept = []

    def keep(request, answer):
        kept.append(request.body)
        return answer(request)

    s3.proxy.spoil("PUT .*json", keep)
    done = run_here("convert", source, s3.url(), "--json")
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, done.stderr, *map(bytes.decode, kept)]
    assert len(texts) > 6
    for text in texts:
        assert KEY not in text
        assert SECRET not in text


# ----------------------------------------------------------------------------------- other stores


def test_memory(checkpoints, tmp_path):
    """Through the library, from and to a store in memory."""
    near = tmp_path / "near"
    gptoss_stream.convert(checkpoints(), near, max_shard_size="300KB")
    url = f"memory://{tmp_path.name}"
    fs = fsspec.filesystem("memory")
    fs.put(str(checkpoints()), f"/{tmp_path.name}/source", recursive=True)
    location = gptoss_stream.open_location(f"{url}/source")
    store = gptoss_stream.open_writable_location(f"{url}/out")
    report = gptoss_stream.convert(location, store, max_shard_size="300KB", staging=tmp_path)
    assert report.output == f"{url}/out"
    fs.get(f"/{tmp_path.name}/out", str(tmp_path / "got"), recursive=True)
    assert data_of(digests(tmp_path / "got")) == data_of(digests(near))


class Died(BaseException):
    pass


def test_where_files_are_there_before_all_of_them_is(checkpoints, tmp_path, monkeypatch):
    """They get their names when they are whole, and what a run that died has left of one is not
    taken for somebody else's."""
    near, far = tmp_path / "near", tmp_path / "far"
    gptoss_stream.convert(checkpoints(), near, max_shard_size="300KB")
    local = fsspec.get_filesystem_class("file")
    put, seen = local.put_file, []

    def putting(self, source, target, **options):
        seen.append(target)
        if len(seen) == 3:
            Path(target).write_bytes(b"half of it")
            raise Died
        put(self, source, target, **options)

    monkeypatch.setattr(local, "put_file", putting)
    options = {"max_shard_size": "300KB", "staging": tmp_path / "staging"}
    with pytest.raises(Died):
        gptoss_stream.convert(checkpoints(), f"file://{far}", **options)
    assert all(target.endswith(".partial") for target in seen)
    made = digests(far, "*.safetensors")
    assert len(made) == 2
    assert made.items() <= digests(near).items()
    gptoss_stream.convert(checkpoints(), f"file://{far}", **options)
    assert digests(far) == digests(near)
