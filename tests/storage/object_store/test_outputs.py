"""Outputs in a bucket of S3 are verified, inspected and opened as local ones are."""

from __future__ import annotations

import shutil

import pytest
from loopback import no_answer
from object_store_cases import DENIED, Bucket, convert
from outputs import same_bits
from remote_outputs import (
    DAMAGES,
    RECORD,
    UNFINISHED,
    assert_read_once,
    first_shard,
    flip,
    make_unfinished,
    result_of,
)
from runs import assert_clean_error, run_in_process

import gptoss_stream


@pytest.fixture(scope="module")
def output(checkpoints, tmp_path_factory):
    """A local output, with checksums."""
    folder = tmp_path_factory.mktemp("verified") / "out"
    assert convert(checkpoints(), folder, "--checksums").returncode == 0
    return folder


@pytest.fixture
def copy(output, tmp_path):
    return shutil.copytree(output, tmp_path / "copy")


def put(s3: Bucket, folder) -> str:
    """Copy a folder and its folders to the bucket; return its URL."""
    for file in folder.rglob("*"):
        if file.is_file():
            s3.write(f"out/{file.relative_to(folder).as_posix()}", file.read_bytes())
    s3.proxy.requests.clear()
    return s3.url()


def test_from_a_bucket_each_byte_is_read_once(s3, checkpoints, output):
    """Source and output at the same time."""
    source, url = s3.fill(checkpoints(), "source"), put(s3, output)
    done = run_in_process("verify", source, url)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith(f"{url}: equal; ")
    said = [f"gptoss_stream: {what} {at}" for what, at in (("reading", source), ("verifying", url))]
    assert done.stderr.splitlines()[:2] == said
    assert_read_once(s3.proxy.requests_for("^GET /[^/]+/out/"), output)


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_found(name, s3, checkpoints, copy):
    damage, said = DAMAGES[name]
    damage(copy)
    url = put(s3, copy)
    done = run_in_process("verify", checkpoints(), url, "--quiet")
    assert done.returncode == 1, done.stderr
    assert said in done.stdout
    local = run_in_process("verify", checkpoints(), copy, "--quiet")
    assert done.stdout.splitlines()[:-1] == local.stdout.splitlines()[:-1]


def test_files_of_others_are_no_difference(s3, checkpoints, copy):
    (copy / "README.md").write_text("# Mine")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert gptoss_stream.verify(checkpoints(), put(s3, copy)).equal


def test_checksums(s3, copy):
    url = put(s3, copy)
    assert run_in_process("verify", "--checksums", url).returncode == 0
    flip(first_shard(copy))
    put(s3, copy)
    s3.write("out/more.safetensors", b"")
    (copy / "tl_config.json").unlink()
    s3.client.delete_object(Bucket=s3.name, Key="out/tl_config.json")
    found = {(d.kind, d.name) for d in gptoss_stream.verify_checksums(url).differences}
    assert found == {
        ("checksum", first_shard(copy).name),
        ("unexpected", "more.safetensors"),
        ("missing", "tl_config.json"),
    }


def test_inspect(s3, copy):
    url = put(s3, copy)
    local = result_of(run_in_process("inspect", copy, "--json").stdout)
    assert result_of(run_in_process("inspect", url, "--json").stdout) == {**local, "path": url}
    s3.client.delete_object(Bucket=s3.name, Key=f"out/{first_shard(copy).name}")
    said = run_in_process("inspect", url).stdout
    assert f"incomplete, {first_shard(copy).name} missing" in said


def test_an_output_opens_as_the_local_one_does(s3, output):
    local = gptoss_stream.open_state_dict(output)
    remote = gptoss_stream.open_state_dict(put(s3, output))
    assert [*remote] == [*local]
    assert all(same_bits(remote[name], local[name].contiguous()) for name in local)


def test_an_unfinished_output(s3, checkpoints, copy):
    make_unfinished(copy)
    url = put(s3, copy)
    for words in (
        ["verify", checkpoints(), url, "--quiet"],
        ["verify", "--checksums", url, "--quiet"],
        ["show", url, "embed.W_E", "--quiet"],
    ):
        done = run_in_process(*words)
        assert_clean_error(done, 2)
        assert f"{url}: {UNFINISHED}" in done.stderr
    assert "unfinished" in run_in_process("inspect", url).stdout


def test_what_cannot_be_used_is_refused(s3, checkpoints, output):
    """An empty folder, a checkpoint that is no output, a key without access, no network."""
    source = s3.fill(checkpoints(), "source")
    for url, said in (
        (s3.url("nothing"), "there are no files in it"),
        (source, "none of its tensors is one of transformer-lens"),
    ):
        done = run_in_process("verify", checkpoints(), url, "--quiet")
        assert_clean_error(done, 2)
        assert url in done.stderr
        assert said in done.stderr
    url = put(s3, output)
    for fault, code in ((DENIED, 2), (no_answer, 3)):
        s3.proxy.spoil("/out/|list-type", fault)
        assert_clean_error(run_in_process("verify", checkpoints(), url, "--quiet"), code)
        s3.proxy.mend()
    s3.client.delete_object(Bucket=s3.name, Key=f"out/{RECORD}")
    assert run_in_process("verify", checkpoints(), url, "--quiet").returncode == 1
