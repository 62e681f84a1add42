"""Runs that write MXFP4 of floats: interrupted, in tasks, on a cluster, to and from elsewhere."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress

import pytest
import torch
from clusters import cluster
from loopback import FileServer
from memory_location import MemoryLocation
from runs import digests, run_in_process, stop_run
from safetensors.torch import load_file, save_file

import gptoss_stream
from gptoss_stream.errors import CheckpointError, OutputError

SIZE = "80KB"
REPORT = "mxfp4_encoding.json"


@pytest.fixture(scope="module")
def base(checkpoints):
    """A checkpoint in MXFP4."""
    return checkpoints(layers=3, max_shard_size=SIZE)


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The same in floats, with other values in some experts."""
    folder = tmp_path_factory.mktemp("trained") / "hf"
    gptoss_stream.convert(base, folder, to="hf")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    torch.manual_seed(0)
    for layer in range(3):
        tensor = tensors[f"model.layers.{layer}.mlp.experts.down_proj"]
        tensor[layer] += torch.randn(tensor[layer].shape).to(tensor.dtype) * tensor.std()
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def options(base):
    return {"to": "hf-mxfp4", "reference": base, "max_shard_size": SIZE, "checksums": True}


@pytest.fixture(scope="module")
def whole(trained, options, tmp_path_factory):
    """The checksums of an output that one process wrote, and what it reported."""
    output = tmp_path_factory.mktemp("whole") / "out"
    report = gptoss_stream.convert(trained, output, **options)
    assert len(report.shards) > 5
    assert 0 < report.mxfp4["total"]["blocks_kept"] < report.mxfp4["total"]["blocks"]
    assert report.mxfp4["total"]["relative_error"] > 0
    assert gptoss_stream.verify(trained, output).equal
    assert gptoss_stream.verify_checksums(output).equal
    return digests(output), report.mxfp4


@pytest.mark.parametrize("finished", [2, 5])
def test_a_run_that_is_resumed_reports_all_tensors(finished, trained, options, whole, tmp_path):
    """Also what the shards lost that were finished before."""
    out = tmp_path / "out"
    stop_run(trained, out, finished, **options)
    assert not (out / REPORT).exists()
    report = gptoss_stream.convert(trained, out, **options)
    assert report.bytes_resumed > 0
    assert digests(out) == whole[0]
    assert report.mxfp4 == whole[1]


def test_tasks_of_an_array(trained, options, whole, tmp_path):
    out = tmp_path / "out"
    reports = [gptoss_stream.convert(trained, out, task=(n, 3), **options) for n in range(3)]
    assert [report.mxfp4 for report in reports] == [None, None, whole[1]]
    assert digests(out) == whole[0]


def test_a_remote_output(trained, options, whole, tmp_path):
    """Also in tasks, and when it is resumed without the staging folder."""
    staging = {"staging": tmp_path / "staging"}
    remote = MemoryLocation()
    report = gptoss_stream.convert(trained, remote, **staging, **options)
    assert remote.checksums == whole[0]
    assert report.mxfp4 == whole[1]
    again = gptoss_stream.convert(trained, remote, **staging, **options)
    assert again.mxfp4 == whole[1]

    remote = MemoryLocation()
    for number in range(3):
        report = gptoss_stream.convert(trained, remote, task=(number, 3), **staging, **options)
    assert report.mxfp4 == whole[1]
    assert remote.checksums == whole[0]

    remote = MemoryLocation()
    remote.fails_at = sorted(n for n in whole[0] if n.endswith(".safetensors"))[4]
    with pytest.raises(gptoss_stream.MachineError):
        gptoss_stream.convert(trained, remote, **staging, **options)
    remote.fails_at = None
    shutil.rmtree(tmp_path / "staging")
    report = gptoss_stream.convert(trained, remote, **staging, **options)
    assert report.mxfp4 == whole[1]
    assert remote.checksums == whole[0]


def test_a_cluster(trained, options, whole, tmp_path):
    with cluster(tmp_path / "cluster", 2) as running:
        report = gptoss_stream.convert(trained, tmp_path / "out", client=running.client, **options)
    assert digests(tmp_path / "out") == whole[0]
    assert report.mxfp4 == whole[1]


def test_source_and_reference_by_range(trained, base, options, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with FileServer(trained) as source, FileServer(base) as reference:
        report = gptoss_stream.convert(
            source.url, tmp_path / "out", **{**options, "reference": reference.url}
        )
        found = digests(tmp_path / "out")
        different = {n for n in found if found[n] != whole[0][n]}
        assert different <= {REPORT, "gptoss_stream.json", "SHA256SUMS"}
        assert report.mxfp4["tensors"] == whole[1]["tensors"]
        assert gptoss_stream.verify(source.url, tmp_path / "out").equal


def test_a_reference_that_changes_is_noticed(trained, base, options, tmp_path):
    """While it is read, and between a run and its resumption."""
    reference = shutil.copytree(base, tmp_path / "base")
    out = tmp_path / "out"
    stop_run(trained, out, 2, **{**options, "reference": reference})
    file = sorted(reference.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes())
    with pytest.raises(OutputError, match="reference_files"):
        gptoss_stream.convert(trained, out, **{**options, "reference": reference})

    def change(plan) -> None:
        file.write_bytes(file.read_bytes())

    with pytest.raises(CheckpointError, match="changed"):
        gptoss_stream.convert(
            trained, tmp_path / "other", on_plan=change, **{**options, "reference": reference}
        )


def test_the_output_must_not_be_the_reference(trained, base, options, tmp_path):
    reference = shutil.copytree(base, tmp_path / "base")
    with pytest.raises(OutputError, match="same folder"):
        gptoss_stream.convert(
            trained, reference, overwrite=True, **{**options, "reference": reference}
        )
    assert digests(reference) == digests(base)


def test_no_spill_file_is_left(trained, options, tmp_path):
    out = tmp_path / "out"
    stop_run(trained, out, 2, **options)
    assert not [f for f in out.rglob("*") if "scales-" in f.name]
    state = json.loads((out / ".gptoss_stream/run.json").read_text())
    assert REPORT in state["files"]


def test_a_finished_output_that_lost_a_file_keeps_its_report(trained, options, whole, tmp_path):
    """Of shards that are not written again, the report says what it said; or that it is unknown."""
    out = tmp_path / "out"
    gptoss_stream.convert(trained, out, **options)
    (out / sorted(n for n in whole[0] if n.endswith(".safetensors"))[3]).unlink()
    report = gptoss_stream.convert(trained, out, **options)
    assert report.mxfp4["unknown"] == []
    assert report.mxfp4["tensors"] == whole[1]["tensors"]
    assert report.mxfp4["total"] == pytest.approx(whole[1]["total"], rel=1e-5)
    (out / REPORT).unlink()
    report = gptoss_stream.convert(trained, out, **options)
    assert report.mxfp4["unknown"] == sorted(whole[1]["tensors"])
    assert report.mxfp4["total"]["blocks"] == 0

    remote, staging = MemoryLocation(), {"staging": tmp_path / "staging"}
    gptoss_stream.convert(trained, remote, **staging, **options)
    del remote.files[sorted(n for n in whole[0] if n.endswith(".safetensors"))[3]]
    report = gptoss_stream.convert(trained, remote, **staging, **options)
    assert report.mxfp4["unknown"] == []
    assert report.mxfp4["tensors"] == whole[1]["tensors"]


def test_a_report_is_made_again_from_a_report(checkpoints, tmp_path):
    """Bit for bit: its sums are those of the rounded values."""
    shape = {"layers": 2, "experts": 3, "hidden_size": 96, "intermediate_size": 160}
    heads = {"head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 2}
    source = checkpoints(format="hf", vocab_size=130, **shape, **heads)
    command = ("convert", source, tmp_path / "out", "--to", "hf-mxfp4", "--max-shard-size", SIZE)
    assert run_in_process(*command, "--checksums").returncode == 0
    whole = digests(tmp_path / "out")
    (tmp_path / "out/model.safetensors.index.json").unlink()
    assert run_in_process(*command, "--checksums").returncode == 0
    assert digests(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "text", ["", "[]", "[1]", "{}", '{"tensors": 3}', '{"tensors": {"a": {"blocks": "x"}}}']
)
def test_a_damaged_report_is_not_believed(text, trained, options, whole, tmp_path):
    out = tmp_path / "out"
    gptoss_stream.convert(trained, out, **options)
    (out / REPORT).write_text(text)
    again = run_in_process(
        "convert", trained, out, "--to", "hf-mxfp4", "--reference", options["reference"],
        "--max-shard-size", SIZE, "--checksums",
    )  # fmt: skip
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    (out / "config.json").unlink()
    report = gptoss_stream.convert(trained, out, **options)
    assert report.mxfp4["unknown"] == sorted(whole[1]["tensors"])


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "{}", '{"a": {}}', '{"a": {"blocks": "x"}}',
             '{"model.layers.0.mlp.experts.down_proj_blocks": {"squared_norm": -1.0}}',
             '{"model.layers.0.mlp.experts.down_proj_blocks": {"blocks": 1e400}}',
             '{"other": {"blocks": 5}}']
)  # fmt: skip
def test_a_damaged_file_about_a_shard_is_not_believed(text, trained, options, whole, tmp_path):
    """What it was about is unknown in the report, and nothing is counted that is not written."""
    out, shards = tmp_path / "out", sorted(n for n in whole[0] if n.endswith(".safetensors"))
    stop_run(trained, out, 6, **options)
    files = sorted((out / ".gptoss_stream").glob("*.mxfp4.json"))
    known = set(json.loads(files[0].read_text())["losses"])
    files[0].write_text(text)
    (out / ".gptoss_stream/foreign.mxfp4.json").write_text('{"foreign": {"blocks": 57}}')
    report = gptoss_stream.convert(trained, out, **options)
    assert set(report.mxfp4["unknown"]) == known
    expected = sum(t["blocks"] for n, t in whole[1]["tensors"].items() if n not in known)
    assert report.mxfp4["total"]["blocks"] == expected
    assert {n: d for n, d in digests(out).items() if n in shards} == {
        n: whole[0][n] for n in shards
    }


def test_the_reference_may_move(trained, base, options, whole, tmp_path):
    """The same files under another path are the same reference."""
    out, reference = tmp_path / "out", tmp_path / "base"
    shutil.copytree(base, reference)
    gptoss_stream.convert(trained, out, **{**options, "reference": reference})
    moved = reference.rename(tmp_path / "moved")
    report = gptoss_stream.convert(trained, out, **{**options, "reference": moved})
    assert report.bytes_resumed == report.bytes_out
    with pytest.raises(gptoss_stream.CheckpointError, match=r"base.* give it with --reference"):
        gptoss_stream.verify(trained, out)
    assert gptoss_stream.verify(trained, out, reference=moved).equal
    (out / REPORT).write_text("[]")
    (found,) = gptoss_stream.verify(trained, out, reference=moved).differences
    assert found.name == REPORT


@pytest.mark.parametrize("key", ["reference", "mxfp4_rule", "pruning"])
@pytest.mark.parametrize("value", [5, [], {}, True, "nothing"])
def test_a_damaged_record_is_no_reason_for_a_traceback(
    key, value, trained, whole, options, tmp_path
):
    out = tmp_path / "out"
    gptoss_stream.convert(trained, out, **options)
    record = json.loads((out / "gptoss_stream.json").read_text())
    (out / "gptoss_stream.json").write_text(json.dumps({**record, key: value}))
    with suppress(gptoss_stream.GptOssStreamError):
        assert gptoss_stream.verify(trained, out).equal == (key == "pruning")
