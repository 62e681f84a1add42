"""Shared by the tests of object stores: a bucket, runs and checks."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import threading
from contextlib import AbstractContextManager
from pathlib import Path

from loopback import Proxy, Reply, status
from runs import (
    INDEX_NAME,
    WORK_NAME,
    convert_command,
    run_in_process,
    started,
)

RECORD, CHECKSUMS, RUN = "gptoss_stream.json", "SHA256SUMS", f"{WORK_NAME}/run.json"


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
    """Return the body of an error reply of S3."""
    return f"<Error><Code>{code}</Code><Message>It is {code}.</Message></Error>".encode()


DENIED = status(403, error("AccessDenied"))


class Bucket:
    """A bucket: the tool uses it through a proxy, the tests use it directly."""

    numbers = itertools.count()

    def __init__(self, client, proxy: Proxy) -> None:
        self.name = f"bucket-{next(self.numbers)}"
        self.proxy = proxy
        self.client = client
        self.client.create_bucket(Bucket=self.name)

    def url(self, folder: str = "out") -> str:
        return f"s3://{self.name}/{folder}"

    def write(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def fill(self, source: Path, folder: str = "source") -> str:
        """Copy a folder to the bucket; returns its URL."""
        for file in source.iterdir():
            self.write(f"{folder}/{file.name}", file.read_bytes())
        return self.url(folder)

    def objects(self) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.name)
        return [entry["Key"] for entry in found.get("Contents", ())]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def digests(self, folder: str = "out") -> dict[str, str]:
        start = f"{folder}/" if folder else ""
        return {
            key.removeprefix(start): hashlib.sha256(self.read(key)).hexdigest()
            for key in self.objects()
            if key.startswith(start)
        }

    def puts(self) -> list[str]:
        """Return the names of the objects that were written, in order."""
        return [r.path.removeprefix(f"/{self.name}/out/") for r in self.proxy.requests_for("^PUT ")]


def convert(source, output, *options):
    """Convert in this process."""
    size = ("--max-shard-size", "300KB", "--quiet")
    return run_in_process("convert", source, output, *size, *options)


def assert_done(done) -> None:
    assert (done.returncode, done.stderr) == (0, "")


def data_of(checksums: dict[str, str]) -> dict[str, str]:
    """Return the checksums of the files that depend on the data only, not on source and options."""
    return {name: checksums[name] for name in checksums if name not in (RECORD, CHECKSUMS)}


def assert_nothing_wrong(s3: Bucket, whole: dict[str, str]) -> None:
    """Check that the files are right, and that all exist if there is an index."""
    found = s3.digests()
    found = {n: d for n, d in found.items() if not n.startswith(f"{WORK_NAME}/")}
    assert found.items() <= whole.items()
    assert INDEX_NAME not in found or found == whole


def staged(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "cache" / "gptoss_stream").rglob("*")]


def process(source: Path, url: str, *options: str) -> AbstractContextManager[subprocess.Popen[str]]:
    """Convert in another process, which is killed at the end of the block."""
    return started(convert_command(source, url, *options))


def killed(s3: Bucket, source: Path, pattern: str, skip: int, is_done: bool) -> bool:
    """Kill a run at a request.

    Args:
        s3: The bucket to write to.
        source: The checkpoint.
        pattern: The pattern of the request (see `loopback.Server.spoil`).
        skip: The number of matching requests before it.
        is_done: Whether the request is carried out before the kill.

    Returns:
        Whether the run sent that request; otherwise it has finished.
    """
    arrived, until = threading.Event(), threading.Event()

    def delay(request, answer):
        reply = answer(request) if is_done else None
        arrived.set()
        until.wait(30)
        return reply or Reply(0)

    s3.proxy.spoil(pattern, delay, skip=skip)
    with process(source, s3.url(), "--checksums") as running:
        while running.poll() is None and not arrived.wait(0.01):
            pass
        ended = running.poll()
    until.set()
    s3.proxy.mend()
    assert ended in (None, 0)
    return ended is None


def assert_written_once(s3: Bucket) -> None:
    """Check that no uploaded shard was uploaded again."""
    arrived = [r.path for r in s3.proxy.requests_for("PUT .*safetensors$") if r.status == 200]
    assert len(arrived) == len({*arrived})


def nothing(s3: Bucket, monkeypatch) -> None:
    """Change nothing."""
