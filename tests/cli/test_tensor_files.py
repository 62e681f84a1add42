"""Files that `export` writes and numbers that `show` prints: of every pair of formats and dtype."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from format_pairs import ALL_PAIRS
from outputs import load_output
from runs import ROOT, WORK_NAME, assert_clean_error, digests, interrupted, run_in_process
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shards import edit_header, edit_json, read_shard

import gptoss_stream

NORM = "model.norm.weight"


@pytest.mark.parametrize(("source", "to"), ALL_PAIRS)
def test_every_tensor_is_exported_as_convert_writes_it(source, to, checkpoints, tmp_path):
    folder = checkpoints(format=source)
    gptoss_stream.convert(folder, tmp_path / "out", to=to)
    expected = load_output(tmp_path / "out")
    file = tmp_path / "all.safetensors"
    done = run_in_process("export", folder, *expected, file, "--to", to)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(expected)} tensors" in done.stdout
    found = load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
@pytest.mark.parametrize("to", ["transformer-lens", "hf"])
def test_every_tensor_is_shown_as_convert_writes_it(to, dtype, checkpoints, tmp_path):
    gptoss_stream.convert(checkpoints(), tmp_path / "out", to=to, dtype=dtype)
    expected = load_output(tmp_path / "out")
    options = ("--to", to, *(() if dtype is None else ("--dtype", dtype)))
    done = run_in_process("show", checkpoints(), *expected, "--json", *options)
    for one in json.loads(done.stdout)["tensors"]:
        tensor = expected[one["name"]]
        assert one["shape"] == [*tensor.shape]
        values = tensor.double()
        assert one["statistics"]["min"] == values.min()
        assert one["statistics"]["max"] == values.max()
        assert one["statistics"]["norm"] == pytest.approx(values.norm().item(), rel=1e-12)
        corner = values.flatten(0, -3)[0] if values.ndim > 2 else values
        corner = corner[:3, :6] if values.ndim > 1 else corner[:6]
        assert one["corner"] == corner.tolist()


def test_statistics_of_more_than_one_slice(checkpoints, monkeypatch):
    """Rows at a time, of stored and of transposed tensors; slices end where they will."""
    from gptoss_stream.loading import checkpoint_tensors, statistics

    command = ("show", checkpoints(), "unembed.W_U", "embed.W_E", "--to", "transformer-lens")
    stored = ("show", checkpoints(), "lm_head.weight", "model.layers.0.self_attn.sinks")
    whole = [run_in_process(*one, "--json").stdout for one in (command, stored)]
    monkeypatch.setattr(checkpoint_tensors, "_SLICE_NBYTES", 5_000)
    monkeypatch.setattr(checkpoint_tensors, "_TRANSPOSED_NBYTES", 5_000)
    monkeypatch.setattr(statistics, "_ELEMENTS", 999)
    for one, expected in zip((command, stored), whole, strict=True):
        found = json.loads(run_in_process(*one, "--json").stdout)["tensors"]
        for shown, before in zip(found, json.loads(expected)["tensors"], strict=True):
            assert shown["statistics"] == pytest.approx(before["statistics"], rel=1e-12)
            assert shown["corner"] == before["corner"]


@pytest.fixture
def extra(tmp_path):
    """A checkpoint with tensors of further dtypes and shapes."""
    folder = gptoss_stream.synth(tmp_path / "source", layers=1, max_shard_size="50GB")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    added = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(-1.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "integers": torch.arange(-5, 7).view(3, 4),
        "huge": torch.tensor([1e200, -1e200], dtype=torch.float64),
        "nothing": torch.full((2, 2), torch.nan),
        "truths": torch.tensor([True, False]),
        "scales": torch.tensor([1.0, 4.0]).to(torch.float8_e8m0fnu),
        "deep": torch.arange(2 * 3 * 4 * 7).view(2, 3, 4, 7).float(),
    }
    save_file({**added, **load_file(folder / "model.safetensors")}, folder / "model.safetensors")
    return folder, added


def test_other_dtypes_and_shapes(extra, tmp_path):
    folder, added = extra
    shown = {}
    for name, tensor in added.items():
        done = run_in_process("show", folder, name)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{name}  ")
        text = run_in_process("show", folder, name, "--json").stdout
        refuse = pytest.fail  # JSON has neither NaN nor Infinity
        (shown[name],) = json.loads(text, parse_constant=refuse)["tensors"]
        assert shown[name]["shape"] == [*tensor.shape]
        done = run_in_process("export", folder, name, tmp_path / f"{name}.npy")
        if name == "scales":
            assert_clean_error(done, 2)
            assert "numpy has no dtype for F8_E8M0; write .safetensors" in done.stderr
        else:
            assert done.returncode == 0, done.stderr
            found = np.load(tmp_path / f"{name}.npy")
            assert found.dtype == tensor.numpy().dtype
            assert np.array_equal(found, tensor.numpy(), equal_nan=name == "nothing")
    assert shown["scalar"]["corner"] == [-1.5]
    assert shown["empty"]["statistics"]["min"] is None
    assert shown["integers"]["corner"] == added["integers"].tolist()
    assert shown["integers"]["statistics"]["min"] == -5
    assert shown["huge"]["statistics"]["norm"] is None  # its square is beyond float64
    assert shown["nothing"]["statistics"] | {"mean": 0, "norm": 0} == {
        "min": None, "max": None, "mean": 0, "norm": 0, "nan": 4, "infinite": 0,
    }  # fmt: skip
    assert shown["truths"]["statistics"]["mean"] == 0.5
    assert shown["scales"]["statistics"] is shown["scales"]["corner"] is None
    assert shown["deep"]["corner"] == added["deep"][0, 0, :3, :6].tolist()


def test_tensors_in_a_file_are_aligned(extra, tmp_path):
    """In whatever order they are named."""
    folder, added = extra
    file = tmp_path / "x.safetensors"
    assert run_in_process("export", folder, *added, NORM, file).returncode == 0
    header, data = read_shard(file)
    start = file.stat().st_size - len(data)
    found = load_file(file)
    for name, tensor in added.items():
        begin, _ = header[name]["data_offsets"]
        assert (start + begin) % tensor.element_size() == 0, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), bits(tensor))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
@pytest.mark.parametrize("name", ["model.safetensors", "new.safetensors"])
@pytest.mark.parametrize("of", ["source", "adapter"])
def test_a_checkpoint_is_never_changed(of, name, options, tmp_path):
    """Not even one that is not the source: a file of tensors in its folder would be a part."""
    source = gptoss_stream.synth(tmp_path / "source", layers=1)
    gptoss_stream.synth_adapter(tmp_path / "adapter", layers=1)
    before = digests(tmp_path)
    if of == "adapter":
        name = name.replace("model.", "adapter_model.")
    done = run_in_process("export", source, NORM, tmp_path / of / name, *options)
    assert_clean_error(done, 2)
    assert digests(tmp_path) == before


def test_names_of_what_is_no_whole_model(checkpoints, tmp_path):
    """A part is shown by its stored names; of another name the line says why it has no others."""
    part = gptoss_stream.Selection(layers="1", only=("router",))
    gptoss_stream.convert(checkpoints(), tmp_path / "part", selection=part)
    assert run_in_process("show", tmp_path / "part", "blocks.1.mlp.W_gate.bias").returncode == 0
    done = run_in_process("show", tmp_path / "part", "model.layers.1.mlp.router.bias")
    assert_clean_error(done, 2)
    assert "only the names that it stores" in done.stderr
    assert "part of a model" in done.stderr


def test_an_unfinished_conversion_is_refused(checkpoints, tmp_path):
    interrupted(checkpoints(), tmp_path / "out")
    assert (tmp_path / "out" / WORK_NAME).exists()
    for options in ((), ("--to", "hf")):
        done = run_in_process("show", tmp_path / "out", "embed.W_E", *options)
        assert_clean_error(done, 2)
        assert "an unfinished conversion; run the same convert again" in done.stderr


def test_sources_that_are_damaged(checkpoints, tiny, tmp_path):
    edit_header(tiny / "model.safetensors", lambda header: header[NORM].update(dtype="F7"))
    assert_clean_error(run_in_process("show", tiny, NORM), 2)
    other = gptoss_stream.synth(tmp_path / "other", layers=1)
    edit_json(other / "config.json", lambda config: config.update(model_type="llama"))
    done = run_in_process("export", other, "embed.W_E", tmp_path / "x.npy")
    assert_clean_error(done, 2)
    assert "llama" in done.stderr
    assert not (tmp_path / "x.npy").exists()


def test_a_value_that_the_dtype_cannot_hold_leaves_no_file(tmp_path):
    folder = gptoss_stream.synth(tmp_path / "source", layers=1)
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM][3] = 1e30
    save_file(tensors, folder / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    for options in (("--dtype", "float16"), ("--dtype", "float16", "--to", "hf")):
        done = run_in_process("export", folder, NORM, tmp_path / "x.npy", *options)
        assert_clean_error(done, 2)
        assert "choose a dtype with a wider range" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(checkpoints, tmp_path):
    tmp_path.chmod(0o500)
    done = run_in_process("export", checkpoints(), NORM, tmp_path / "x.npy")
    tmp_path.chmod(0o700)
    assert_clean_error(done, 3)
    assert "check its permissions" in done.stderr


@pytest.mark.parametrize("target", ["/proc/x.npy", "{tmp}/" + "x" * 300 + ".npy"])
def test_a_place_that_cannot_be_written_to(target, checkpoints, tmp_path):
    done = run_in_process("export", checkpoints(), NORM, target.format(tmp=tmp_path))
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1


def test_a_signal_leaves_no_file(tmp_path):
    """Nor the temporary one."""
    source = gptoss_stream.synth(tmp_path / "source", vocab_size=400_000, hidden_size=512, layers=1)
    out = tmp_path / "out"
    out.mkdir()
    command = [
        sys.executable,
        "-m",
        "gptoss_stream",
        "export",
        source,
        "unembed.W_U",
        out / "x.npy",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not any(out.iterdir()):
        time.sleep(0.002)
    assert not (out / "x.npy").exists()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 143, error
    assert error.splitlines()[-1].startswith("gptoss_stream: terminated")
    assert not [*out.iterdir()]


def test_a_failure_of_the_system_is_not_an_unknown_name(checkpoints, monkeypatch):
    """While the formats are searched for a name."""
    from gptoss_stream.planning import plan

    def fail(*_):
        raise gptoss_stream.MachineError("no connection")

    monkeypatch.setattr(plan, "plan_conversion", fail)
    done = run_in_process("show", checkpoints(), "embed.W_E")
    assert_clean_error(done, 3)
    assert "no connection" in done.stderr
