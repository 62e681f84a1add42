"""Reading a remote checkpoint in any order: right bytes, few requests, bounded memory.

The server is real, on loopback. The large file has three experts of the size of gpt-oss-120b.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from large_server import (
    DATA,
    EXPERT,
    MIB,
    NAME,
    ROWS,
    SHAPES,
    Gate,
    assert_nothing_twice,
    in_threads,
    info_of,
    large,
    nbytes_of,
    online,
    ranges_of,
    read_expert,
    read_tile,
    server,
    settle,
    traffic,
)
from loopback import FileServer
from runs import ROOT

from gptoss_stream.checkpoint.block_fetcher import BlockFetcher
from gptoss_stream.checkpoint.block_reader import BlockReader
from gptoss_stream.checkpoint.local_reader import LocalReader
from gptoss_stream.checkpoint.metadata import read_metadata
from gptoss_stream.checkpoint.reader import ElementRange
from gptoss_stream.storage.block_cache import BlockCache
from gptoss_stream.storage.http_folder import HttpFolder
from gptoss_stream.storage.local_folder import LocalFolder

__all__ = ["large", "online", "server"]  # fixtures
pytestmark = pytest.mark.usefixtures("online")


# -------------------------------------------------------------------------------------- right bytes


@pytest.mark.parametrize(("block", "budget"), [(1000, 0), (777, 3000), (4096, 50_000), (MIB, MIB)])
@pytest.mark.parametrize("has_cache", [False, True])
def test_values_are_those_of_the_files(checkpoints, tmp_path, block, budget, has_cache):
    """Any range of any tensor, in several shards, twice."""
    folder, chosen = checkpoints(layers=2, max_shard_size="200KB"), random.Random(block)
    cache = BlockCache(tmp_path, 10 * MIB) if has_cache else None
    with (
        FileServer(folder) as server,
        LocalReader(read_metadata(LocalFolder(folder))) as local,
        BlockReader(read_metadata(HttpFolder(server.url)), budget, block, cache) as reader,
    ):
        for tensor in [*reader.info.tensors.values()] * 2:
            count = int(np.prod(tensor.shape))
            first = chosen.randrange(count)
            elements = chosen.randint(1, count - first)
            with (
                local.read(tensor, first, (elements,)) as expected,
                reader.read(tensor, first, (elements,)) as found,
            ):
                assert found.dtype == expected.dtype
                assert np.array_equal(found.view(np.uint8), expected.view(np.uint8))
        reader.check_unchanged()


@pytest.mark.parametrize("budget", [0, 1, MIB, 3 * MIB, 8 * MIB])
def test_a_read_of_more_than_the_budget(server, large, budget):
    with BlockReader(info_of(server), budget) as reader:
        for name in EXPERT:
            with reader.read(reader.info.tensors[name], 0, SHAPES[name]) as found:
                assert np.array_equal(found, large.data[name])
    settle(server)
    assert nbytes_of(server) <= large.nbytes + 3 * MIB


def test_nothing_is_read_for_no_elements(server):
    with BlockReader(info_of(server)) as reader:
        with reader.read(reader.info.tensors["blocks"], 7, (0, 3)) as found:
            assert found.shape == (0, 3)
        assert traffic(server) == []


# --------------------------------------------------------------------------------- few requests


@pytest.mark.parametrize("expert", [0, 1, 2])
def test_one_expert_takes_two_requests_and_little_more_than_its_bytes(server, large, expert):
    with BlockReader(info_of(server)) as reader:
        with reader.prefetch(ranges_of(reader.info, expert)):
            read_expert(reader, large, expert)
        needed = sum(EXPERT.values())
        # One if the last block of the blocks is the first of the scales.
        assert len(traffic(server)) == (2 if expert < 2 else 1)
        assert needed <= nbytes_of(server) <= needed + 3.2 * MIB  # the rest of four blocks
        before = len(traffic(server))
        read_expert(reader, large, expert)
        assert len(traffic(server)) == before, "blocks in memory were fetched again"


def test_smaller_blocks_take_less_traffic(server, large):
    with BlockReader(info_of(server), block_nbytes=MIB // 4) as reader:
        with reader.prefetch(ranges_of(reader.info, 1)):
            read_expert(reader, large, 1)
        assert len(traffic(server)) == 2
        assert nbytes_of(server) <= 1.08 * sum(EXPERT.values())


def test_without_a_prefetch_each_block_is_fetched_once(server, large):
    with BlockReader(info_of(server)) as reader:
        read_expert(reader, large, 1)
        assert_nothing_twice(server)
        assert max(nbytes for _, nbytes in traffic(server)) <= 2 * MIB


def test_a_single_read_joins_its_blocks(server, large):
    with BlockReader(info_of(server)) as reader:
        read_tile(reader, large, "blocks", 1, 0, 5760)
        assert len(traffic(server)) == 1


def test_blocks_in_memory_are_not_requested_again_between_others(server, large):
    with BlockReader(info_of(server)) as reader:
        read_tile(reader, large, "blocks", 0, 2880, 100)
        with reader.prefetch(ranges_of(reader.info, 0)):
            read_expert(reader, large, 0)
        assert_nothing_twice(server)
        assert len(traffic(server)) == 4


def in_tiles(info, experts: range) -> list[ElementRange]:
    """The ranges of experts in the order in which `read_expert` reads them."""
    return [
        ElementRange(whole.raw, whole.first + row * whole.count // 5760, ROWS * whole.count // 5760)
        for expert in experts
        for row in range(0, 5760, ROWS)
        for whole in ranges_of(info, expert)
    ]


def test_a_prefetch_of_more_than_the_budget_goes_on_as_blocks_are_read(server, large):
    budget = 8 * MIB
    with BlockReader(info_of(server), budget, MIB // 4) as reader:
        with reader.prefetch(in_tiles(reader.info, range(3))):
            settle(server)
            assert budget / 2 < nbytes_of(server) <= budget * 3 / 4
            for expert in range(3):
                read_expert(reader, large, expert)
        assert nbytes_of(server) <= large.nbytes + MIB / 2  # one block is used twice, far apart
        assert len(traffic(server)) <= 16


def test_a_read_that_had_to_wait_makes_room_for_more(server, large):
    """Without another read, the prefetch goes on."""
    info, gate, budget = info_of(server), Gate(), 8 * MIB
    server.spoil(DATA, gate)
    with BlockReader(info, budget, MIB // 4) as reader, reader.prefetch(ranges_of(info, 0, 3)):
        gate.wait_for(3)
        threading.Timer(0.2, gate.opened.set).start()
        read_tile(reader, large, "blocks", 0, 0, 1440)
        settle(server)
        assert nbytes_of(server) > budget * 3 / 4


def test_a_prefetch_in_another_order_costs_little_more(server, large):
    budget = 8 * MIB
    with BlockReader(info_of(server), budget, MIB // 4) as reader:
        with reader.prefetch(ranges_of(reader.info, 0, 3)):
            settle(server)
            for expert in range(3):
                read_expert(reader, large, expert)
        assert nbytes_of(server) <= large.nbytes + budget / 2
        assert len(traffic(server)) <= 24


def test_a_prefetch_that_is_given_up_stops_and_leaves_its_memory(server, large):
    budget = 8 * MIB
    with BlockReader(info_of(server), budget) as reader:
        for _ in range(3):
            with reader.prefetch(ranges_of(reader.info, 0, 3)):
                pass
        settle(server)
        before = nbytes_of(server)
        assert before <= budget
        assert not reader._blocks._ahead
        assert not reader._blocks._unread
        with reader.prefetch([ElementRange(reader.info.tensors["blocks"], 2 * EXPERT["blocks"],
                                           EXPERT["blocks"])]):  # fmt: skip
            settle(server)
            assert nbytes_of(server) - before > budget / 2


def test_four_requests_at_a_time(server, large):
    info, gate = info_of(server), Gate()
    server.spoil(DATA, gate)
    with BlockReader(info, 16 * MIB) as reader:
        threads = [
            threading.Thread(target=read_tile, args=(reader, large, "blocks", e, row, 10))
            for e in range(3)
            for row in (0, 1500, 3000, 4500)
        ]
        for thread in threads:
            thread.start()
        gate.wait_for(4)
        time.sleep(0.2)
        assert gate.most == 4
        gate.opened.set()
        for thread in threads:
            thread.join()
        assert gate.most == 4
        assert len(traffic(server)) == 12


def test_threads_that_want_the_same_block_fetch_it_once(server, large):
    server.rate = 20e6
    with BlockReader(info_of(server)) as reader:
        same = [lambda: read_expert(reader, large, 1)] * 4
        assert in_threads(*same) == [None] * 4
        assert_nothing_twice(server)


@pytest.mark.parametrize("budget", [MIB, 4 * MIB, 16 * MIB])
def test_threads_at_random_with_prefetches(server, large, budget):
    """Under memory that is too small for them: right, and no thread waits forever."""

    def work(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(12):
            expert = chosen.randrange(3)
            with reader.prefetch(ranges_of(reader.info, expert)):
                for _ in range(4):
                    row = chosen.randrange(5760 - ROWS)
                    read_tile(reader, large, chosen.choice([*EXPERT]), expert, row)

    with BlockReader(info_of(server), budget, MIB // 4) as reader:
        assert in_threads(*(lambda seed=seed: work(seed) for seed in range(4))) == [None] * 4


# ------------------------------------------------------------------------------------------ memory


def test_memory_is_bounded_all_the_time(server, large, monkeypatch):
    used = []
    make_room = BlockFetcher._make_room

    def recording(self):
        make_room(self)
        kept = [*self._read.values(), *self._unread.values()]
        used.append(sum(m.nbytes for m in kept) + sum(fetch.nbytes for fetch in self._running))

    monkeypatch.setattr(BlockFetcher, "_make_room", recording)
    budget = 8 * MIB
    with (
        BlockReader(info_of(server), budget) as reader,
        reader.prefetch(ranges_of(reader.info, 0, 3)),
    ):
        in_threads(*(lambda e=e: read_expert(reader, large, e) for e in range(3)))
    assert budget * 0.8 < max(used) <= budget


PROCESS = """
import sys
from gptoss_stream._utils.memory import peak_rss_nbytes
from gptoss_stream.checkpoint.metadata import CheckpointInfo, read_header
from gptoss_stream.checkpoint.block_reader import BlockReader
from gptoss_stream.checkpoint.reader import ElementRange
from gptoss_stream.storage.http_folder import HttpFolder
location = HttpFolder(sys.argv[1])
shard, tensors, _ = read_header(location, "model.safetensors")
tensor, tile = tensors["x"], 1 << 20
with BlockReader(CheckpointInfo(location, {}, (shard,), tensors), int(sys.argv[2])) as reader:
    with reader.read(tensor, 0, (tile,)):
        before = peak_rss_nbytes()
    with reader.prefetch([ElementRange(tensor, 0, tensor.nbytes)]):
        for first in range(0, tensor.nbytes, tile):
            with reader.read(tensor, first, (tile,)):
                pass
print(peak_rss_nbytes() - before)
"""


def test_the_process_frees_the_blocks_that_are_dropped(tmp_path):
    """Apart from what the HTTP client and its threads take, some 25 MB."""
    nbytes, budget = 128 * MIB, 16 * MIB
    header = {"x": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    (tmp_path / NAME).write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / NAME, 8 + len(text) + nbytes)
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}
    with FileServer(tmp_path) as server:
        command = [sys.executable, "-c", PROCESS, server.url, str(budget)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=50, env=environment
        )
    assert done.returncode == 0, done.stderr
    assert budget / 2 < int(done.stdout) < budget + 40 * MIB


def test_each_block_has_memory_of_its_own(server, large):
    """Or a block that is kept would keep all that was fetched with it."""
    with BlockReader(info_of(server)) as reader:
        read_tile(reader, large, "blocks", 0, 0, 5760)
        kept = [*reader._blocks._read.values()]
        assert len(kept) == 8
        assert not any(np.shares_memory(a, b) for a, b in pairwise(kept))
        for block in kept:
            owner = block
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            assert owner.nbytes <= MIB + 4096
