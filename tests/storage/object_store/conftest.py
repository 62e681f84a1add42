"""A server of S3 on loopback (moto), with a proxy before it."""

from __future__ import annotations

import os
import subprocess
import sys
from math import inf

import boto3
import fsspec
import pytest
from loopback import Proxy
from object_store_cases import KEY, MOTO, SECRET, Bucket, convert
from runs import (
    digests,
)

from gptoss_stream.storage import retries


@pytest.fixture(scope="session")
def moto():
    """A server of S3, with a proxy before it: a client of boto3 and the proxy.

    There is one for all tests, since s3fs caches its clients with their endpoint.
    """
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
    """A new bucket, and an environment with its endpoint and keys."""
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
        "AWS_MAX_ATTEMPTS": "1",  # only the tool retries, not the client too
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    monkeypatch.setattr(retries, "FIRST_DELAY", 0.001)
    proxy.mend()
    proxy.requests.clear()
    proxy.rate = inf
    return Bucket(client, proxy)


@pytest.fixture
def new_clients():
    """Clear the cached clients, before and after the test."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def whole(checkpoints, tmp_path_factory) -> dict[str, str]:
    """The output of a local conversion, with checksums."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert convert(checkpoints(), output, "--checksums").returncode == 0
    return digests(output)
