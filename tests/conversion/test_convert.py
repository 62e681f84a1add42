"""What a conversion writes to its folder, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from damages import scale
from runs import ROOT, digests
from safetensors.torch import load_file, save_file

import gptoss_stream
from gptoss_stream.errors import MachineError, OptionError, OutputError


def rewrite(folder, change) -> None:
    """Change the tensors of a one-shard checkpoint."""
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_files_other_than_weights(tiny, tmp_path):
    """Auxiliary files are copied unchanged; configuration, record and report fit the output."""
    copied = {
        "tokenizer.json": b'{"version": "1.0"}\r\n',
        "tokenizer_config.json": b"{}",
        "special_tokens_map.json": b"{ }",
        "chat_template.jinja": "{{ messages }} ü".encode(),
        "generation_config.json": b'{"eos_token_id": [1, 2]}',
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
    }
    for name, data in copied.items():
        (tiny / name).parent.mkdir(exist_ok=True)
        (tiny / name).write_bytes(data)
    (tiny / "README.md").write_text("a model card, which describes the source")
    out = tmp_path / "out"
    report = gptoss_stream.convert(tiny, out)
    for name, data in copied.items():
        assert (out / name).read_bytes() == data
    assert not (out / "config.json").exists()  # AutoModel would load a model with random weights
    assert "describes the source" not in (out / "README.md").read_text()
    source_config = json.loads((out / "source_config.json").read_text())
    assert source_config == json.loads((tiny / "config.json").read_text())
    record = json.loads((out / "gptoss_stream.json").read_text())
    assert record["version"] == gptoss_stream.__version__
    assert record["source_format"] == "hf-mxfp4"
    assert (record["format"], record["dtype"]) == ("transformer-lens", "bfloat16")
    assert {*record["files"]} == {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    assert not (out / ".gptoss_stream").exists()
    assert report.shards == {"model.safetensors": (out / "model.safetensors").stat().st_size}
    assert report.tensors == len(load_file(out / "model.safetensors"))
    assert report.bytes_out == sum(report.shards.values())


def test_unmapped_tensors_are_reported(tiny, tmp_path):
    rewrite(
        tiny, lambda t: t.update({"model.layers.0.rotary.inv_freq": t["model.norm.weight"].clone()})
    )
    report = gptoss_stream.convert(tiny, tmp_path / "out")
    assert report.unmapped == ("model.layers.0.rotary.inv_freq",)
    assert gptoss_stream.plan(tiny).unmapped == report.unmapped


def test_overwrite_replaces_only_files_of_the_tool(checkpoints, tmp_path):
    source, out = checkpoints(layers=1), tmp_path / "out"
    gptoss_stream.convert(source, out, max_shard_size="100KB")
    with pytest.raises(OutputError, match=r"that differs in max_shard_size \(was 100000"):
        gptoss_stream.convert(source, out)
    assert not (out / ".gptoss_stream").exists()
    gptoss_stream.convert(source, out, overwrite=True)
    assert [f.name for f in out.glob("*.safetensors")] == ["model.safetensors"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not this tool's \(notes.txt\)"):
        gptoss_stream.convert(source, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "model.safetensors").exists()


def test_a_folder_with_foreign_files_is_refused(checkpoints, tmp_path):
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(OutputError, match=r"not this tool's \(model.safetensors\)"):
        gptoss_stream.convert(checkpoints(layers=1), tmp_path, overwrite=True)
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("where", [".", "inside", "..", "link"])
def test_source_and_output_must_not_contain_each_other(where, tiny):
    output = tiny / where
    if where == "link":
        output = tiny.parent / "link"
        output.symlink_to(tiny)
    before = digests(tiny)
    with pytest.raises(OutputError, match="the same folder, or one is inside"):
        gptoss_stream.convert(tiny, output)
    assert digests(tiny) == before


def test_too_little_disk_space_is_an_error_with_both_sizes(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("gptoss_stream.writing.disk_space.free_nbytes", lambda folder: 1_000_000)
    with pytest.raises(MachineError, match=r"1\.5 MB are needed and 1\.0 MB are free; free"):
        gptoss_stream.convert(checkpoints(), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_overwrite_deletes_nothing_for_a_run_that_cannot_succeed(
    checkpoints, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    gptoss_stream.convert(checkpoints(), out)
    before = digests(out)
    monkeypatch.setattr("gptoss_stream.writing.disk_space.free_nbytes", lambda folder: 1000)
    with pytest.raises(MachineError, match="are needed"):
        gptoss_stream.convert(checkpoints(), out, overwrite=True, dtype="float32")
    assert digests(out) == before


@pytest.mark.parametrize(
    ("value", "dtype"), [(252, "bfloat16"), (0, "bfloat16"), (140, "float16"), (141, "bfloat16")]
)
def test_the_last_scales_that_fit_are_converted(value, dtype, several, tmp_path):
    """With the largest code. The next larger scale is refused: see `test_bad_input`."""
    scale(value)(several)
    gptoss_stream.convert(several, tmp_path / "out", dtype=dtype)
    found = load_file(tmp_path / "out/model.safetensors")["blocks.1.mlp.experts.2.W_out.weight"]
    assert found[7, 38:40].tolist() == [6 * 2.0 ** (value - 127)] * 2


def test_infinities_and_nans_of_the_source_are_kept(tiny, tmp_path):
    """A cast must not report them as an overflow."""

    def change(tensors):
        tensors["model.norm.weight"][:3] = np.inf
        tensors["model.norm.weight"][3] = np.nan

    rewrite(tiny, change)
    for dtype in ("bfloat16", "float16", "float32"):
        gptoss_stream.convert(tiny, tmp_path / dtype, dtype=dtype)
        found = load_file(tmp_path / dtype / "model.safetensors")["ln_final.w"]
        assert found[:3].isinf().all()
        assert found[3].isnan()
        assert found[4:].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"to": "x"},
        {"dtype": "int8"},
        {"max_shard_size": "x"},
        {"max_shard_size": "9" * 400},
        {"workers": 0},
        {"workers": 100_000},
    ],
)
def test_invalid_options_are_refused(options, checkpoints, tmp_path):
    with pytest.raises(OptionError):
        gptoss_stream.convert(checkpoints(layers=1), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_names_with_spaces_letters_and_links(tiny, tmp_path, monkeypatch):
    """Including the Hub's cache, whose snapshots are links to blobs."""
    snapshot = tmp_path / "models--öpen ai/snapshots/abc"
    blobs = tmp_path / "models--öpen ai/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(tiny.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    link = tmp_path / "link to it"
    link.symlink_to(snapshot)
    monkeypatch.chdir(tmp_path)
    gptoss_stream.convert("link to it", "a  ü")
    gptoss_stream.convert(tiny, tmp_path / "ascii")
    assert (tmp_path / "a  ü/model.safetensors").read_bytes() == (
        tmp_path / "ascii/model.safetensors"
    ).read_bytes()


def test_a_second_run_into_the_same_folder_is_refused_at_once(checkpoints, tmp_path):
    def meanwhile(plan):
        with pytest.raises(OutputError, match=r"another run \(process \d+\) is writing to it"):
            gptoss_stream.convert(checkpoints(), tmp_path / "out")

    gptoss_stream.convert(checkpoints(), tmp_path / "out", on_plan=meanwhile)
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("finishers", [0, 1])
def test_an_interrupted_call_ends_after_its_threads(finishers):
    """For example in a notebook: nothing may be written any more when the exception is raised."""
    code = (
        f"finishers = {finishers}\n"
        "import os, signal, sys, threading, time\n"
        "from gptoss_stream._utils.thread_pool import run_steps\n"
        "ended = []\n"
        "def slow(): time.sleep(1.5); ended.append(True)\n"
        "def step(buffer): return slow\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try: run_steps(iter([step]), 1, 4096, threading.Event(), finishers)\n"
        "except KeyboardInterrupt: print(ended)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[True]\n", done.stderr
