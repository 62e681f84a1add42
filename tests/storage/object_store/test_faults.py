"""Kills, and servers that fail."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from math import inf

import pytest
from loopback import Reply, halved, lost_answer, no_answer, short, status
from object_store_cases import (
    DENIED,
    RUN,
    SHARDS,
    Bucket,
    assert_done,
    assert_nothing_wrong,
    assert_written_once,
    convert,
    data_of,
    error,
    killed,
    process,
    staged,
)
from runs import (
    assert_clean_error,
    digests,
)

SLOW_DOWN = status(503, error("SlowDown"))


INTERNAL = status(500, error("InternalError"))


def test_kills_in_a_chain(s3, checkpoints, whole, tmp_path):
    """Each kill at another request."""
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
        other = Bucket(s3.client, s3.proxy)
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
    """Everything is uploaded, and the local files are deleted nevertheless."""
    assert killed(s3, checkpoints(), f"DELETE .*{RUN}", 0, is_done=True)
    assert s3.digests() == whole
    assert staged(tmp_path) != []
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    assert staged(tmp_path) == []


def test_ctrl_c_during_a_slow_upload(s3, checkpoints, whole):
    until = threading.Event()

    def delay(request, answer):
        until.wait(60)
        return Reply(0)

    s3.proxy.spoil("PUT .*safetensors$", delay, skip=1)
    with process(checkpoints(), s3.url(), "--checksums") as running:
        while running.poll() is None and len(s3.proxy.requests_for("PUT .*safetensors$")) < 2:
            time.sleep(0.01)
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
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
    # The checksums of files from another staging folder are not known.
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
def test_bad_replies_of_the_source(s3, checkpoints, whole, tmp_path, how, times):
    source = s3.fill(checkpoints(max_shard_size="200KB"))
    s3.proxy.spoil("GET .*safetensors$", how, times=times, skip=13)
    done = convert(source, tmp_path / "out")
    if times == inf:
        assert_clean_error(done, 3)
        s3.proxy.mend()
        done = convert(source, tmp_path / "out")
    assert_done(done)
    assert data_of(digests(tmp_path / "out")) == data_of(whole)
