"""Google Cloud Storage and Azure Blob Storage, each by its emulator.

Slow. They install nothing: what is missing (gcsfs, gcp-storage-emulator; adlfs and, from npm,
`azurite-blob` on the PATH) is skipped.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from object_store_cases import data_of
from runs import ROOT, convert_command, digests

pytestmark = pytest.mark.slow

# The account and the key that Azurite documents.
AZURE = (
    "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey="
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==;"
    "BlobEndpoint=http://127.0.0.1:{port}/devstoreaccount1;"
)
CREATE_CONTAINER = """
import sys
from azure.storage.blob import BlobServiceClient
BlobServiceClient.from_connection_string(sys.argv[1]).create_container("bucket")
"""
PUT = """
import resource, sys
from pathlib import Path
from gptoss_stream.storage.open_location import open_writable_location
location = open_writable_location(sys.argv[1])
location.put({"shard": Path(sys.argv[2])}, {})
assert location.listing()["shard"].nbytes == Path(sys.argv[2]).stat().st_size
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, folder: Path, **environment: str):
    """Run a server until the end of the block."""
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env={**os.environ, **environment}
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module", params=["gs", "abfs"])
def store(request, tmp_path_factory):
    """The URL of a bucket, and the environment in which it is used."""
    port, folder = free_port(), tmp_path_factory.mktemp("store")
    if request.param == "gs":
        if not (find_spec("gcsfs") and find_spec("gcp_storage_emulator")):
            pytest.skip("needs gcsfs and gcp-storage-emulator")
        command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--default-bucket", "bucket"]
        with running(command, port, folder, STORAGE_BASE=str(folder), STORAGE_DIR="data"):
            address = f"http://127.0.0.1:{port}"
            # Otherwise it asks Google for the kind of the bucket.
            yield "gs", {"STORAGE_EMULATOR_HOST": address, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": ""}
        return
    azurite = shutil.which("azurite-blob")
    if not (find_spec("adlfs") and azurite):
        pytest.skip("needs adlfs and azurite-blob")
    command = [azurite, "--silent", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with running([*command, "--location", str(folder), "--skipApiVersionCheck"], port, folder):
        account = AZURE.format(port=port)
        subprocess.run([sys.executable, "-c", CREATE_CONTAINER, account], check=True)
        yield "abfs", {"AZURE_STORAGE_CONNECTION_STRING": account}


def run(command: list[str], environment: dict[str, str]) -> str:
    """Run a command and return what it prints."""
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_and_back(store, checkpoints, tmp_path):
    """A conversion to a bucket, which is resumed and overwritten, and one from it."""
    protocol, environment = store
    url, source = f"{protocol}://bucket/out", checkpoints(layers=2)

    def convert(source, output, *options):
        return run([*convert_command(source, output, *options)], environment)

    convert(source, url, "--to", "openai", "--checksums")
    stated = convert(source, url, "--to", "openai", "--checksums", "--json")
    assert '"bytes_resumed": 0' not in stated
    convert(source, url, "--to", "hf", "--overwrite")
    convert(url, tmp_path / "back", "--to", "transformer-lens")
    convert(source, tmp_path / "direct", "--to", "transformer-lens")
    back, direct = (data_of(digests(tmp_path / name)) for name in ("back", "direct"))
    for name in ("source_config.json", "README.md"):  # of another format
        del back[name], direct[name]
    assert back == direct


@pytest.mark.parametrize("megabytes", [200, 400])
def test_the_memory_of_an_upload(megabytes, store, tmp_path):
    """It does not grow with the shard. The emulator of Google takes quadratic time."""
    protocol, environment = store
    shard, block = tmp_path / "shard", os.urandom(1 << 20)
    with open(shard, "wb") as file:
        for _ in range(megabytes * (5 if protocol == "abfs" else 1)):
            file.write(block)
    url = f"{protocol}://bucket/memory-{megabytes}"
    assert int(run([sys.executable, "-c", PUT, url, str(shard)], environment)) < 200
