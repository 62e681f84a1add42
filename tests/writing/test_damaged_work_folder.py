"""What is kept between runs is not believed if it is damaged, and leftovers are no obstacle."""

from __future__ import annotations

import json

import pytest
from memory_location import MemoryLocation
from runs import WORK_NAME, assert_clean_error, digests, run_in_process, stop_run

import gptoss_stream
from gptoss_stream._utils.temporary_file import TemporaryFile
from gptoss_stream.errors import MachineError
from gptoss_stream.writing.receipts import Receipts

SIZE = "150KB"
DAMAGES = [b"", b"garbage\n", b"\xff" * 64 + b"\n", b"0" * 63 + b"\n", b"0" * 64]


@pytest.fixture
def whole(checkpoints, tmp_path) -> dict[str, str]:
    gptoss_stream.convert(checkpoints(), tmp_path / "whole", max_shard_size=SIZE, checksums=True)
    return digests(tmp_path / "whole")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checksum_of_a_finished_shard(damage, checkpoints, whole, tmp_path):
    """The shard is written again."""
    out = tmp_path / "out"
    shard = stop_run(checkpoints(), out, 2, max_shard_size=SIZE, checksums=True)[0]
    (out / WORK_NAME / f"{shard}.sha256").write_bytes(damage)
    written = (out / shard).stat().st_ino
    command = ("convert", checkpoints(), out, "--max-shard-size", SIZE, "--checksums")
    done = run_in_process(*command)
    assert done.returncode == 0, done.stderr
    assert digests(out) == whole
    assert (out / shard).stat().st_ino != written


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checksum_of_an_uploaded_shard(damage, checkpoints, whole, tmp_path):
    remote = MemoryLocation()
    remote.fails_at = "model-00006-of-00011.safetensors"
    options = {"max_shard_size": SIZE, "checksums": True, "workers": 1}
    with pytest.raises(MachineError):
        gptoss_stream.convert(checkpoints(), remote, staging=tmp_path / "staging", **options)
    remote.fails_at = None
    name = min(n for n in remote.files if n.endswith(".sha256"))
    remote.files[name] = damage
    gptoss_stream.convert(checkpoints(), remote, staging=tmp_path / "another", **options)
    assert remote.checksums == whole


def test_a_leftover_of_a_temporary_file_is_deleted(checkpoints, tmp_path):
    """It has a name for a moment on systems without O_TMPFILE."""
    out = tmp_path / "out"
    stop_run(checkpoints(), out, 2, max_shard_size=SIZE, checksums=True)
    (out / ".gptoss_stream-abcdefgh").touch()
    command = ("convert", checkpoints(), out, "--max-shard-size", SIZE, "--checksums")
    done = run_in_process(*command)
    assert done.returncode == 0, done.stderr
    assert not (out / ".gptoss_stream-abcdefgh").exists()


def test_a_spill_file_of_another_run_is_not_deleted(tmp_path):
    file = TemporaryFile(tmp_path / "spill")
    (tmp_path / "spill").unlink()
    (tmp_path / "spill").write_bytes(b"another run's")
    file.close()
    assert (tmp_path / "spill").read_bytes() == b"another run's"


def test_receipts_that_are_damaged_are_none(tmp_path):
    kept, receipt = Receipts(tmp_path), json.dumps({"sha256": "0" * 64, "size": 5}).encode()
    for name in ("a", "b", "c", "d"):
        kept.keep(name, receipt)
    assert kept.read() == dict.fromkeys("abcd", receipt)
    (tmp_path / "a.receipt").write_bytes(b"[]")
    (tmp_path / "b.receipt").write_bytes(receipt)
    text = (tmp_path / "c.receipt").read_bytes()
    (tmp_path / "c.receipt").write_bytes(text.replace(b"5", b"6"))
    assert kept.read() == {"d": receipt}


def test_an_output_in_another_output_is_refused(checkpoints, tmp_path):
    """Neither could be resumed: the files of one would be foreign to the other."""
    assert run_in_process("convert", checkpoints(), tmp_path / "out").returncode == 0
    found = digests(tmp_path / "out")
    for inner in ("sub", "sub/sub"):
        done = run_in_process("convert", checkpoints(), tmp_path / "out" / inner)
        assert_clean_error(done, 2)
        assert f"in the converted output {tmp_path / 'out'}; name a folder" in done.stderr
    assert digests(tmp_path / "out") == found
