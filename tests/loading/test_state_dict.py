"""A checkpoint's stored tensors as a mapping: lazy, mapped, private, and with clear errors."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from outputs import load_output, same_bits
from runs import ROOT, digests, limit_file_size

import gptoss_stream
from gptoss_stream.errors import CheckpointError, OptionError, OutputError

NAME = "blocks.1.mlp.experts.3.W_out.weight"


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    """An output in each format and dtype, in several shards."""
    made = {}

    def of(to="transformer-lens", dtype="bfloat16"):
        if (to, dtype) not in made:
            out = tmp_path_factory.mktemp("converted") / f"{to}-{dtype}"
            options = {"to": to, "dtype": dtype, "max_shard_size": "300KB"}
            gptoss_stream.convert(checkpoints(), out, **options)
            made[to, dtype] = out
        return made[to, dtype]

    return of


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("to", ["transformer-lens", "hf"])
def test_every_tensor_equals_what_safetensors_loads(to, dtype, converted):
    folder = converted(to, dtype)
    expected = load_output(folder)
    with gptoss_stream.open_state_dict(folder) as state:
        assert set(state) == set(expected)
        assert len(state) == len(expected)
        assert all(same_bits(state[name], expected[name]) for name in state)
        assert all(state.shape(name) == tuple(expected[name].shape) for name in state)


def test_dtype_and_device_convert_on_access(converted):
    stored = gptoss_stream.open_state_dict(converted())
    state = gptoss_stream.open_state_dict(converted(), dtype="float32", device="cpu")
    assert same_bits(state[NAME], stored[NAME].float())
    assert gptoss_stream.open_state_dict(converted(), device="meta")[NAME].is_meta
    with pytest.raises(OptionError, match="unknown dtype 'int8'"):
        gptoss_stream.open_state_dict(converted(), dtype="int8")


def test_opening_and_asking_for_shapes_reads_no_data(converted, tmp_path):
    """The files are as long as before, and their data are holes."""
    folder = shutil.copytree(converted(), tmp_path / "out")
    expected = load_output(folder)
    for shard in folder.glob("*.safetensors"):
        size, length = shard.stat().st_size, int.from_bytes(shard.read_bytes()[:8], "little")
        os.truncate(shard, 8 + length)
        os.truncate(shard, size)
    for to in (None, "transformer-lens"):
        state = gptoss_stream.open_state_dict(folder, to=to)
        assert {name: state.shape(name) for name in state} == {
            name: tuple(tensor.shape) for name, tensor in expected.items()
        }
        assert {state.dtype(name) for name in state} == {torch.bfloat16}
        assert not state[NAME].any()  # it is read now


def test_writing_to_a_tensor_does_not_change_the_file(converted):
    folder = converted()
    before = digests(folder)
    with gptoss_stream.open_state_dict(folder) as state:
        tensor = state[NAME]
        tensor.zero_()
        assert not tensor.any()
    assert digests(folder) == before
    assert gptoss_stream.open_state_dict(folder)[NAME].any()


def test_tensors_stay_valid_after_close(converted):
    state = gptoss_stream.open_state_dict(converted())
    tensor = state[NAME]
    state.close()
    with pytest.raises(OutputError, match="closed; open it again"):
        state[NAME]
    assert same_bits(tensor, load_output(converted())[NAME])


def test_it_can_be_pickled_and_used_by_other_processes(converted):
    state = gptoss_stream.open_state_dict(converted(), dtype="float32")
    again = pickle.loads(pickle.dumps(state))
    assert same_bits(again[NAME], state[NAME])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_total, (state,)) == _total(state)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_both_processes_can_use_it_after_a_fork(converted):
    state = gptoss_stream.open_state_dict(converted())
    expected = state[NAME].float().sum().item()
    child = os.fork()
    if child == 0:
        os._exit(state[NAME].float().sum().item() != expected)
    assert os.waitpid(child, 0)[1] == 0
    assert state[NAME].float().sum().item() == expected


def _total(state) -> float:
    return sum(state[name].double().sum().item() for name in state)


def test_it_is_a_read_only_mapping(converted):
    state = gptoss_stream.open_state_dict(converted())
    assert NAME in state
    assert "x" not in state
    assert dict(state).keys() == state.keys()
    with pytest.raises(KeyError):
        state["x"]
    with pytest.raises(TypeError):
        state["x"] = torch.zeros(1)


def test_a_module_can_load_a_state_dict(converted):
    """Without a copy, with load_state_dict and assign."""
    module = torch.nn.Linear(96, 64, bias=False, device="meta")
    weight = "blocks.0.mlp.experts.0.W_in.weight"
    state = gptoss_stream.open_state_dict(converted())
    module.load_state_dict({"weight": state[weight]}, assign=True)
    assert same_bits(module.weight.detach(), state[weight])


DAMAGES = {
    "no folder": (lambda f: shutil.rmtree(f), "there is no such folder"),
    "no checkpoint": (lambda f: [file.unlink() for file in f.iterdir()], r"config\.json: missing"),
    "a shard missing": (
        lambda f: max(f.glob("*.safetensors")).unlink(),
        "shards do not exist: model",
    ),
    "a damaged shard": (
        lambda f: max(f.glob("*.safetensors")).write_bytes(b"damaged"),
        "too few|header length",
    ),
    "an index of another output": (
        lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": min(f.glob("*.safetensors")).name}})
        ),
        "it says that tensor 'a' is in",
    ),
    "an index that is not JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "not JSON",
    ),
}


@pytest.mark.parametrize("to", [None, "hf"])
@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_folders_that_are_not_a_complete_checkpoint(damage, message, to, converted, tmp_path):
    """The error comes when the folder is opened."""
    folder = shutil.copytree(converted(), tmp_path / "out")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        gptoss_stream.open_state_dict(folder, to=to)


def test_an_unfinished_conversion_is_not_opened(checkpoints, tmp_path):
    command = [sys.executable, "-m", "gptoss_stream", "convert", checkpoints(), tmp_path / "out"]
    done = subprocess.run(
        command, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=limit_file_size(150_000)
    )
    assert done.returncode == 3
    with pytest.raises(OutputError, match="an unfinished conversion; run the same convert again"):
        gptoss_stream.open_state_dict(tmp_path / "out")


@pytest.mark.parametrize("call", ["open_state_dict", "load_hooked_transformer"])
def test_without_torch_the_error_names_the_extra(call, converted):
    """In a process that cannot import torch."""
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import gptoss_stream\n"
        f"try: gptoss_stream.{call}(sys.argv[1])\n"
        "except gptoss_stream.GptOssStreamError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, converted()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "torch is not installed; run: pip install 'gptoss_stream[" in done.stdout


@pytest.mark.parametrize("to", ["hf-mxfp4", "openai"])
def test_mxfp4_tensors_are_bytes(to, checkpoints, tmp_path):
    """With any `dtype`."""
    gptoss_stream.convert(checkpoints(), tmp_path / "out", to=to)
    expected = load_output(tmp_path / "out")
    with gptoss_stream.open_state_dict(tmp_path / "out", dtype="float32") as state:
        assert set(state) == set(expected)
        for name, tensor in expected.items():
            is_mxfp4 = tensor.dtype is torch.uint8
            assert state[name].dtype is (torch.uint8 if is_mxfp4 else torch.float32)
            assert torch.equal(state[name], tensor if is_mxfp4 else tensor.float())
