"""Checks of uploads, earlier outputs, disk space, and sources that change."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from loopback import flipped
from object_store_cases import (
    CHECKSUMS,
    DENIED,
    RECORD,
    SHARDS,
    assert_done,
    assert_nothing_wrong,
    assert_written_once,
    convert,
    data_of,
    staged,
)
from runs import (
    INDEX_NAME,
    assert_clean_error,
    digests,
    shards_in,
)

from gptoss_stream.errors import MachineError
from gptoss_stream.storage.object_store import ObjectStore


def test_a_damaged_upload_is_repeated(s3, checkpoints, whole):
    s3.proxy.spoil("PUT .*safetensors$", flipped, times=2)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole


def test_an_upload_that_is_always_damaged_is_deleted(s3, checkpoints, whole):
    """Otherwise the next run would consider it finished."""
    s3.proxy.spoil(f"PUT .*{SHARDS[2]}$", flipped)
    done = convert(checkpoints(), s3.url(), "--checksums")
    assert_clean_error(done, 3)
    assert f"{s3.url()}/{SHARDS[2]}: " in done.stderr
    assert_nothing_wrong(s3, whole)
    s3.proxy.mend()
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole


def test_etags_that_only_look_like_checksums(s3, checkpoints, whole):
    """For example of encrypted objects: one is read back to find out."""

    def other_etag(request, answer):
        reply = answer(request)
        if "ETag" in reply.headers:
            reply.headers["ETag"] = reply.headers["ETag"][::-1]
        return reply

    s3.proxy.spoil("^(PUT|HEAD) ", other_etag)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    assert [r.name for r in s3.proxy.requests_for("GET .*out/")] == ["run.json"]
    assert_written_once(s3)


def test_a_damaged_file_is_distinguished_from_another_kind_of_etag(s3):
    bucket = ObjectStore(s3.url())
    s3.proxy.spoil("PUT", flipped)
    with pytest.raises(MachineError, match=f"{s3.url()}/x: "):
        bucket.put({"x": b"some bytes"}, {})
    assert s3.objects() == []
    s3.proxy.mend()
    bucket.put({"x": b"some bytes"}, {})
    assert s3.read("out/x") == b"some bytes"


def test_overwrite_deletes_only_what_the_tool_wrote(s3, checkpoints, whole):
    assert_done(convert(checkpoints(), s3.url(), "--checksums", "--max-shard-size", "150KB"))
    before = {*s3.digests()}
    assert_done(convert(checkpoints(), s3.url(), "--overwrite"))
    assert data_of(s3.digests()) == data_of(whole)
    assert CHECKSUMS in before
    assert CHECKSUMS not in s3.digests()
    deleted = [r.name for r in s3.proxy.requests_for("DELETE") if not r.name.endswith(".sha256")]
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


@pytest.mark.parametrize("most", [1, 2])
def test_few_shards_are_on_the_disk_at_a_time(s3, checkpoints, whole, tmp_path, monkeypatch, most):
    """Also if the object store is slow, and with a spilled transposition."""
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 100_000)
    s3.proxy.rate = 3e6
    seen, over = Counter(), threading.Event()

    def count_shards():
        while not over.wait(0.002):
            seen[len(shards_in(tmp_path / "cache"))] += 1

    counting = threading.Thread(target=count_shards)
    counting.start()
    try:
        done = convert(checkpoints(), s3.url(), "--checksums", "--max-staged", str(most))
    finally:
        over.set()
        counting.join()
    assert_done(done)
    assert s3.digests() == whole
    assert max(seen) == most
    assert staged(tmp_path) == []


def test_a_source_that_changes_during_the_run(s3, checkpoints, whole, tmp_path):
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
    written = digests(tmp_path / "out", "*.safetensors")
    assert written.items() <= whole.items()
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    again = convert(source, tmp_path / "out")
    assert_clean_error(again, 2)
    assert "source_files" in again.stderr


def test_a_source_that_is_deleted_during_the_run(s3, checkpoints, tmp_path):
    source = s3.fill(checkpoints())

    def delete(request, answer):
        s3.client.delete_object(Bucket=s3.name, Key="source/model.safetensors")
        return answer(request)

    s3.proxy.spoil("GET .*safetensors$", delete, times=1, skip=2)
    done = convert(source, tmp_path / "out")
    assert_clean_error(done, 2)
    assert "source/model.safetensors: it does not exist" in done.stderr
    assert digests(tmp_path / "out", "*.safetensors") == {}
