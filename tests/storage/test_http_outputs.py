"""Outputs on an HTTP server are verified, inspected and opened as local ones are."""

from __future__ import annotations

import resource
import shutil
import tempfile

import huggingface_hub.constants
import pytest
from loopback import FileServer, Reply, status
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
from runs import INDEX_NAME, assert_clean_error, run_in_process

import gptoss_stream
from gptoss_stream.checkpoint.metadata import read_metadata
from gptoss_stream.checkpoint.remote_reader import BUDGET_NBYTES, RemoteReader
from gptoss_stream.errors import MachineError, OutputError
from gptoss_stream.storage import retries
from gptoss_stream.storage.local_folder import LocalFolder


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(retries, "FIRST_DELAY", 0.001)


@pytest.fixture(scope="module")
def pair(checkpoints, tmp_path_factory):
    source, output = checkpoints(layers=2), tmp_path_factory.mktemp("served") / "out"
    gptoss_stream.convert(source, output, max_shard_size="300KB", checksums=True)
    return source, output


@pytest.fixture
def copy(pair, tmp_path):
    return shutil.copytree(pair[1], tmp_path / "copy")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks, chunks and spilled transpositions so small that a tiny output has many."""
    monkeypatch.setattr(RemoteReader.__init__, "__defaults__", (BUDGET_NBYTES, 40_000))
    for module in ("data", "verify"):
        monkeypatch.setattr(f"gptoss_stream.verification.{module}.CHUNK_NBYTES", 65_536)
    monkeypatch.setattr("gptoss_stream.planning.shards.SPILL_NBYTES", 1000)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("to", ["transformer-lens", "hf", "hf-mxfp4"])
def test_each_byte_is_read_once(to, workers, small_blocks, checkpoints, tmp_path, monkeypatch):
    """Of the source too, at the same time; a transposition is copied to a file that is deleted."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    source = checkpoints(format="transformer-lens" if to == "hf-mxfp4" else "hf-mxfp4", layers=2)
    gptoss_stream.convert(source, tmp_path / "out", to=to, max_shard_size="300KB")
    with FileServer(source) as sources, FileServer(tmp_path / "out") as outputs:
        result = gptoss_stream.verify(sources.url, outputs.url, workers=workers)
        assert result.equal, result.differences
        assert_read_once(outputs.requests, tmp_path / "out")
        assert len(outputs.requests_for("GET .*safetensors$")) > 20
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "an extra shard"])
def test_every_damage_is_found(name, pair, copy, small_blocks):
    """An HTTP server cannot list an extra shard."""
    damage, said = DAMAGES[name]
    damage(copy)
    with FileServer(copy) as server:
        found = gptoss_stream.verify(pair[0], server.url).differences
        assert found == gptoss_stream.verify(pair[0], copy).differences
        done = run_in_process("verify", pair[0], server.url, "--quiet")
    assert done.returncode == 1
    assert said in done.stdout
    assert f"{server.url}: {len(found)} difference" in done.stdout


def test_a_flipped_byte_of_a_transposition_is_found(pair, copy, small_blocks):
    """Where it is, too, though the bytes are read from the copy."""
    shard = next(s for s in copy.glob("*.safetensors") if b'"unembed.W_U"' in s.read_bytes())
    flip(shard)
    with FileServer(copy) as server:
        (found,) = gptoss_stream.verify(pair[0], server.url).differences
    assert (found,) == gptoss_stream.verify(pair[0], copy).differences
    assert (found.kind, found.name) == ("value", "unembed.W_U")


def test_checksums(pair, copy):
    """Each file is read once."""
    with FileServer(copy) as server:
        assert gptoss_stream.verify_checksums(server.url).equal
        names = [request.name for request in server.requests_for("GET")]
        files = [file.name for file in copy.iterdir() if file.name != "README.md"]  # users edit it
        assert sorted(names) == sorted([*files, RECORD])  # the record is also parsed
        flip(first_shard(copy))
        assert run_in_process("verify", "--checksums", server.url, "--quiet").returncode == 1
        (found,) = gptoss_stream.verify_checksums(server.url).differences
        assert (found.kind, found.name) == ("checksum", first_shard(copy).name)
        (copy / "SHA256SUMS").unlink()
        done = run_in_process("verify", "--checksums", server.url, "--quiet")
        assert_clean_error(done, 2)
        assert "no SHA256SUMS in it" in done.stderr


def test_inspect(pair, copy):
    with FileServer(copy) as server:
        local = result_of(run_in_process("inspect", copy, "--json").stdout)
        done = run_in_process("inspect", server.url, "--json")
        assert result_of(done.stdout) == {**local, "path": server.url}
        assert ": complete" in run_in_process("inspect", server.url).stdout
        make_unfinished(copy)
        said = run_in_process("inspect", server.url).stdout
    assert f"unfinished, {max(pair[1].glob('*.safetensors')).name}" in said


@pytest.mark.parametrize("to", [None, "hf"])
def test_an_output_opens_as_the_local_one_does(to, pair):
    with FileServer(pair[1]) as server:
        local = gptoss_stream.open_state_dict(pair[1], to=to)
        remote = gptoss_stream.open_state_dict(server.url, to=to)
        assert [*remote] == [*local]
        assert all(same_bits(remote[name], local[name].contiguous()) for name in local)


@pytest.mark.parametrize(
    "use",
    [
        lambda source, output: gptoss_stream.verify(source, output),
        lambda source, output: gptoss_stream.verify_checksums(output),
        lambda source, output: gptoss_stream.open_state_dict(output),
        lambda source, output: gptoss_stream.load_hf_model(output),
    ],
    ids=["verify", "verify_checksums", "open_state_dict", "load_hf_model"],
)
def test_an_unfinished_output_is_refused_in_the_same_words(use, pair, copy):
    make_unfinished(copy)
    with FileServer(copy) as server:
        for where in (copy, server.url):
            with pytest.raises(OutputError) as refusal:
                use(pair[0], where)
            assert str(refusal.value) == f"{where}: {UNFINISHED}"


def test_what_is_no_output_is_refused(pair, tmp_path):
    with FileServer(tmp_path) as server:
        for command in (["verify", pair[0], server.url], ["verify", "--checksums", server.url]):
            done = run_in_process(*command, "--quiet")
            assert_clean_error(done, 2)
            assert server.url in done.stderr


def test_a_server_that_cannot_be_reached(pair, copy):
    with FileServer(copy) as server:
        server.spoil(".", status(500))
        done = run_in_process("verify", pair[0], server.url, "--quiet")
        assert_clean_error(done, 3)
    with pytest.raises(MachineError, match="no connection"):
        gptoss_stream.verify_checksums(server.url)


def test_a_server_that_fails_while_a_transposition_is_copied(pair, copy, small_blocks):
    """The threads that wait for the copy end too."""
    info = read_metadata(LocalFolder(copy))
    raw = info.tensors["unembed.W_U"]

    def deny(request, answer):
        last = int(request.headers.get("range", "0-0").rpartition("-")[2])
        is_of_end = request.name == raw.shard and last + 1 == raw.offset + raw.nbytes
        return Reply(403) if is_of_end else answer(request)

    with FileServer(copy) as server:
        server.spoil("GET .*safetensors$", deny)
        done = run_in_process("verify", pair[0], server.url, "--quiet", "--workers", "6")
    assert_clean_error(done, 2)
    assert "no access (403)" in done.stderr


def test_no_room_for_temporary_files(pair):
    """The message says where they are."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FileServer(pair[1]) as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            done = run_in_process("verify", pair[0], server.url, "--quiet")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_clean_error(done, 3)
    assert "writing the header of model" in done.stderr
    assert tempfile.gettempdir() in done.stderr


def test_a_server_that_fails_later(pair, copy, small_blocks):
    num_headers = 2 * len(list(copy.glob("*.safetensors")))
    for skip in (0, 3, 20):
        with FileServer(copy) as server:
            server.spoil("GET .*safetensors$", status(403), skip=num_headers + skip)
            done = run_in_process("verify", pair[0], server.url, "--quiet")
        assert_clean_error(done, 2, 3)
        assert "no access (403)" in done.stderr


def test_a_secret_in_the_address_is_not_shown(pair, copy):
    flip(copy / INDEX_NAME)
    with FileServer(copy) as server:
        done = run_in_process("verify", pair[0], f"{server.url}?sig=tHeSeCrEt")
    assert done.returncode == 1
    assert "tHeSeCrEt" not in done.stdout + done.stderr
