"""A server of three experts of the size of gpt-oss-120b, for readers of remote files.

Import `large`, `server` and `online` as fixtures.
"""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import huggingface_hub.constants
import numpy as np
import pytest
from loopback import FileServer
from runs import time_limit

from gptoss_stream.checkpoint.metadata import CheckpointInfo, read_header
from gptoss_stream.checkpoint.reader import ElementRange
from gptoss_stream.storage import retries
from gptoss_stream.storage.http_folder import HttpFolder

NAME = "model.safetensors"
DATA = f"^GET /{NAME}"
MIB = 1 << 20
SHAPES = {"blocks": (3, 5760, 90, 16), "scales": (3, 5760, 90)}
EXPERT = {"blocks": 5760 * 90 * 16, "scales": 5760 * 90}
ROWS = 192  # in a tile


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(retries, "FIRST_DELAY", 0.001)
    with time_limit(60):
        yield


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a file of three experts, and their bytes."""
    folder, at, header, data = tmp_path_factory.mktemp("large"), 0, {}, {}
    for name, shape in SHAPES.items():
        data[name] = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
        nbytes = data[name].size
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    parts = [len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in data.values())]
    (folder / NAME).write_bytes(b"".join(parts))
    return SimpleNamespace(folder=folder, data=data, nbytes=at)


@pytest.fixture
def server(large):
    """A server of that file."""
    with FileServer(large.folder) as server:
        yield server


def info_of(server: FileServer, query: str = "") -> CheckpointInfo:
    location = HttpFolder(server.url + query)
    shard, tensors, _ = read_header(location, NAME)
    server.requests.clear()
    return CheckpointInfo(location, {}, (shard,), tensors)


def ranges_of(info, expert: int, count: int = 1) -> list[ElementRange]:
    return [
        ElementRange(info.tensors[name], expert * nbytes, count * nbytes)
        for name, nbytes in EXPERT.items()
    ]


def read_tile(reader, large, name: str, expert: int, row: int, rows: int = ROWS) -> None:
    """Read rows of an expert, and compare them with the file."""
    tensor, (_, _, *row_shape) = reader.info.tensors[name], SHAPES[name]
    first = expert * EXPERT[name] + row * int(np.prod(row_shape))
    with reader.read(tensor, first, (rows, *row_shape)) as found:
        assert not found.flags.writeable
        assert np.array_equal(found, large.data[name][expert, row : row + rows])


def read_expert(reader, large, expert: int) -> None:
    for row in range(0, 5760, ROWS):
        for name in EXPERT:
            read_tile(reader, large, name, expert, row)


def traffic(server) -> list[tuple[int, int]]:
    """The byte ranges that were requested, as first byte and number of bytes."""
    ranges = [r.headers["range"].removeprefix("bytes=") for r in server.requests_for(DATA)]
    pairs = [tuple(map(int, text.split("-"))) for text in ranges]
    return [(first, last + 1 - first) for first, last in pairs]


def nbytes_of(server) -> int:
    return sum(nbytes for _, nbytes in traffic(server))


def assert_nothing_twice(server) -> None:
    ranges = sorted(traffic(server))
    assert all(a + n <= b for (a, n), (b, _) in pairwise(ranges)), traffic(server)


def settle(server) -> None:
    """Wait until no more requests come."""
    count = -1
    while count != len(server.requests):
        count = len(server.requests)
        time.sleep(0.2)


class Gate:
    """A fault that keeps requests waiting, and counts those that wait at the same time."""

    def __init__(self) -> None:
        self.lock, self.opened = threading.Lock(), threading.Event()
        self.now = self.most = 0

    def __call__(self, request, answer):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.opened.wait(30)
        with self.lock:
            self.now -= 1
        return answer(request)

    def wait_for(self, number: int) -> None:
        while self.now < number:
            time.sleep(0.001)


def in_threads(*calls) -> list[BaseException | None]:
    """Run calls at the same time, and return what each raised."""
    errors: list[BaseException | None] = [None] * len(calls)

    def run(i: int) -> None:
        try:
            calls[i]()
        except BaseException as error:
            errors[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors
