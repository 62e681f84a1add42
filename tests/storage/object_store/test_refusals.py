"""Clear refusals, secrets, and other locations than S3."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import fsspec
import pytest
from object_store_cases import (
    DENIED,
    KEY,
    SECRET,
    Bucket,
    convert,
    data_of,
    nothing,
    process,
    staged,
)
from runs import (
    assert_clean_error,
    digests,
    run_in_process,
)

import gptoss_stream


def no_credentials(s3: Bucket, monkeypatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")


def server_down(s3: Bucket, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")


def listing_denied(s3: Bucket, monkeypatch) -> None:
    s3.proxy.spoil("GET .*list-type", DENIED)


def writing_denied(s3: Bucket, monkeypatch) -> None:
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
        source.format(s3.name) if source else checkpoints(),
        output.format(s3.name) if output else tmp_path / "out",
    )
    assert time.monotonic() - begun < 15
    assert_clean_error(done, code)
    assert words.format(s3.name) in done.stderr
    assert SECRET not in done.stderr
    assert "OfIt" not in done.stderr
    assert s3.objects() == []
    names = [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]]
    assert not [name for name in names if name.startswith("no-")], "a bucket was created"
    assert staged(tmp_path) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_server_that_is_down_is_reported_soon(s3, checkpoints, monkeypatch):
    """With all retries of the client and the tool."""
    server_down(s3, monkeypatch)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    begun = time.monotonic()
    with process(checkpoints(), s3.url()) as running:
        out, err = running.communicate(timeout=60)
    assert_clean_error(subprocess.CompletedProcess([], running.returncode, out, err), 3)
    assert time.monotonic() - begun < 30


def test_secrets_stay_secret(s3, checkpoints, tmp_path):
    """In everything that is printed and written, with debug logging."""
    source = s3.fill(checkpoints())
    kept = []

    def keep(request, answer):
        kept.append(request.body)
        return answer(request)

    s3.proxy.spoil("PUT .*json", keep)
    done = run_in_process("convert", source, s3.url(), "--json")
    assert done.returncode == 0, done.stderr
    texts = [done.stdout, done.stderr, *map(bytes.decode, kept)]
    assert len(texts) > 6
    for text in texts:
        assert KEY not in text
        assert SECRET not in text


def test_memory(checkpoints, tmp_path):
    """With the library, from and to fsspec's file system in memory."""
    local_output = tmp_path / "local"
    gptoss_stream.convert(checkpoints(), local_output, max_shard_size="300KB")
    url = f"memory://{tmp_path.name}"
    fs = fsspec.filesystem("memory")
    fs.put(str(checkpoints()), f"/{tmp_path.name}/source", recursive=True)
    location = gptoss_stream.open_location(f"{url}/source")
    output = gptoss_stream.open_writable_location(f"{url}/out")
    report = gptoss_stream.convert(location, output, max_shard_size="300KB", staging=tmp_path)
    assert report.output == f"{url}/out"
    fs.get(f"/{tmp_path.name}/out", str(tmp_path / "got"), recursive=True)
    assert data_of(digests(tmp_path / "got")) == data_of(digests(local_output))


class Died(BaseException):
    pass


def test_locations_in_which_files_appear_before_they_are_complete(
    checkpoints, tmp_path, monkeypatch
):
    """They get their final names when they are complete, and the partial file of a killed run is
    not a foreign file."""
    local_output, remote_output = tmp_path / "local", tmp_path / "remote"
    gptoss_stream.convert(checkpoints(), local_output, max_shard_size="300KB")
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
        gptoss_stream.convert(checkpoints(), f"file://{remote_output}", **options)
    assert all(target.endswith(".partial") for target in seen)
    written = digests(remote_output, "*.safetensors")
    assert len(written) == 2
    assert written.items() <= digests(local_output).items()
    gptoss_stream.convert(checkpoints(), f"file://{remote_output}", **options)
    assert digests(remote_output) == digests(local_output)
