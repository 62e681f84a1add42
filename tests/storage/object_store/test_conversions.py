"""From and to buckets of S3, end to end."""

from __future__ import annotations

import json

from loopback import flipped
from object_store_cases import RECORD, RUN, Bucket, assert_done, convert, data_of, staged
from runs import (
    INDEX_NAME,
    digests,
    run_in_process,
)


def test_from_a_folder_to_a_bucket(s3, checkpoints, whole, tmp_path):
    """The same files, the record included. The state of the run is written first and deleted last,
    and the index is the last file."""
    has_state = []

    def look(request, answer):
        has_state.append(f"out/{RUN}" in s3.objects())
        return answer(request)

    s3.proxy.spoil("PUT .*(safetensors|json)$", look, skip=1)
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert s3.digests() == whole
    puts = s3.puts()
    assert puts[0] == RUN
    assert puts[-1] == INDEX_NAME
    checksums = [f".gptoss_stream/{name}.sha256" for name in whole if name.endswith(".safetensors")]
    assert sorted(puts) == sorted([*whole, RUN, *checksums])
    assert s3.proxy.requests[-1].method == "DELETE"
    assert has_state == [True] * (len(whole) - 2)  # SHA256SUMS and the model card do not match
    assert staged(tmp_path) == []


def test_from_a_bucket_to_a_folder(s3, checkpoints, whole, tmp_path):
    source = s3.fill(checkpoints(max_shard_size="200KB"))
    assert_done(convert(source, tmp_path / "out"))
    assert data_of(digests(tmp_path / "out")) == data_of(whole)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["source"] == source


def test_from_the_root_of_a_bucket_to_that_of_another(s3, checkpoints, whole):
    other = Bucket(s3.client, s3.proxy)
    for file in checkpoints().iterdir():
        other.write(file.name, file.read_bytes())
    assert_done(convert(f"s3://{other.name}", f"s3://{s3.name}/"))
    assert data_of(s3.digests("")) == data_of(whole)


def test_other_folders_are_ignored(s3, checkpoints, whole):
    for key in ("out2/x", "out.json", "out/", "other/out/x"):
        s3.write(key, b"")
    assert_done(convert(checkpoints(), s3.url(), "--checksums"))
    assert_done(convert(checkpoints(), s3.url(), "--checksums", "--overwrite"))
    assert {n: d for n, d in s3.digests().items() if n} == whole
    assert {"out2/x", "out.json", "other/out/x"} <= {*s3.objects()}


def test_a_finished_run_is_not_repeated(s3, checkpoints, tmp_path):
    assert_done(convert(checkpoints(), s3.url()))
    s3.proxy.requests.clear()
    done = run_in_process("convert", checkpoints(), s3.url(), "--max-shard-size", "300KB")
    assert "nothing to do: all shards were already written" in done.stdout
    assert s3.proxy.requests_for("^(PUT|POST|DELETE)") == []
    assert staged(tmp_path) == []


def test_parts_of_a_large_shard(s3, checkpoints, tmp_path):
    """A shard is uploaded in several parts, one of which is damaged at first."""
    large = checkpoints(layers=1, experts=2, hidden_size=1440, vocab_size=6000)
    assert_done(run_in_process("convert", large, tmp_path / "local", "--quiet"))
    s3.proxy.spoil("PUT .*partNumber=2", flipped, times=1)
    assert_done(run_in_process("convert", large, s3.url(), "--quiet"))
    assert s3.digests() == digests(tmp_path / "local")
    shard = s3.client.head_object(Bucket=s3.name, Key="out/model.safetensors")
    assert shard["ContentLength"] > 2 * (16 << 20)
    assert shard["ETag"].endswith('-3"')
    assert len(s3.proxy.requests_for("PUT .*partNumber")) == 6, "the damaged upload is repeated"
