"""The tensors of a checkpoint in any format, without converting it, equal those of `convert`."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from format_pairs import ALL_PAIRS, FORMATS, MXFP4_FORMATS
from outputs import load_output, same_bits

import gptoss_stream
from gptoss_stream import open_state_dict
from gptoss_stream.errors import CheckpointError, OptionError

INDICES = (
    0, -1, slice(None), slice(1, 3), slice(-2, None), slice(2, 1), slice(0, 100),
    slice(None, None, 2),
    slice(3, None, 2), ..., None, (slice(0, 2), 0), (1, slice(1, 2)),
    [1, 0], torch.tensor([1, 1]), (slice(1, 3), ..., 0),
)  # fmt: skip


@pytest.fixture(scope="module")
def written(checkpoints, tmp_path_factory):
    """What `convert` writes, once for each of its options."""
    outputs = {}

    def output(source, to, dtype=None, **options):
        key = (source, to, dtype)
        if key not in outputs:
            outputs[key] = tmp_path_factory.mktemp("written") / "out"
            gptoss_stream.convert(
                checkpoints(format=source), outputs[key], to=to, dtype=dtype, **options
            )
        return outputs[key]

    return output


def dtypes(to: str) -> tuple[str | None, ...]:
    return (None,) if to in MXFP4_FORMATS else (None, "float16", "float32")


@pytest.mark.parametrize(("source", "to"), ALL_PAIRS)
def test_each_tensor_has_the_bits_that_convert_writes(source, to, checkpoints, written):
    for dtype in dtypes(to):
        expected = load_output(written(source, to, dtype))
        state = open_state_dict(checkpoints(format=source), to=to, dtype=dtype)
        assert list(state) == [*dict.fromkeys(state)]
        assert {*state} == {*expected}
        for name, tensor in expected.items():
            assert state.shape(name) == tuple(tensor.shape)
            assert state.dtype(name) is tensor.dtype
            assert same_bits(state[name].contiguous(), tensor), name


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("source", ["hf-mxfp4", "hf", "transformer-lens"])
def test_slices_are_those_of_torch(source, to, checkpoints, written):
    expected = load_output(written(source, to))
    state = open_state_dict(checkpoints(format=source), to=to)
    for name, tensor in expected.items():
        sliced = state.get_slice(name)
        assert sliced.shape == tuple(tensor.shape)
        for index in INDICES:
            try:
                part = tensor[index]
            except IndexError:
                with pytest.raises(IndexError):
                    sliced[index]
                continue
            assert torch.equal(sliced[index], part), (name, index)
        with pytest.raises(IndexError):
            sliced[len(tensor)]


def test_a_slice_reads_only_its_rows(checkpoints, monkeypatch):
    """Of gate and up in MXFP4, which is made; and nothing of a mapped tensor."""
    from gptoss_stream.checkpoint.local_reader import LocalReader

    read = []
    original = LocalReader.read

    def counting(self, tensor, first, shape):
        read.append(torch.Size(shape).numel())
        return original(self, tensor, first, shape)

    monkeypatch.setattr(LocalReader, "read", counting)
    state = open_state_dict(checkpoints(), to="transformer-lens")
    state["blocks.0.attn.W_Q"], state["unembed.W_U"]
    assert not read
    rows = state.get_slice("blocks.0.mlp.experts.1.W_in.weight")[5:7]
    assert rows.shape == (2, 96)
    assert sum(read) <= 3 * 3 * (16 + 1)  # three stored rows, for the one between belongs to gate


def test_what_is_stored_as_wanted_is_mapped(checkpoints):
    """Also in another order of axes; the memory is that of the file."""
    state = open_state_dict(checkpoints(), to="transformer-lens")
    tensors = {name: state[name] for name in state if state.is_mapped(name)}
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [
        [int(end, 16) for end in line[0].split("-")] for line in lines if "safetensors" in line[-1]
    ]
    for name, tensor in tensors.items():
        assert any(low <= tensor.data_ptr() < high for low, high in ranges), name
    made = {name for name in state if name not in tensors}
    assert all(name.endswith(".weight") and ".experts." in name for name in made - {"unembed.b_U"})
    assert not tensors["unembed.W_U"].is_contiguous()
    assert not tensors["blocks.0.attn.W_Q"].is_contiguous()
    assert tensors["embed.W_E"].is_contiguous()
    assert not any(
        open_state_dict(checkpoints(), to="transformer-lens", dtype="float32").is_mapped(name)
        for name in tensors
    )


def test_adapters_are_merged(checkpoints, tmp_path):
    adapter = gptoss_stream.synth_adapter(tmp_path / "adapter", rank=4)
    source = checkpoints()
    for to in ("hf", "transformer-lens", "hf-mxfp4"):
        gptoss_stream.convert(source, tmp_path / to, to=to, adapters=adapter)
        expected = load_output(tmp_path / to)
        state = open_state_dict(source, to=to, adapters=adapter)
        plain = open_state_dict(source, to=to)
        assert {*state} == {*expected}
        changed = 0
        for name, tensor in expected.items():
            assert same_bits(state[name].contiguous(), tensor), name
            changed += not torch.equal(plain[name], tensor)
        assert changed > 10
    with pytest.raises(OptionError, match="add to="):
        open_state_dict(source, adapters=adapter)
    with pytest.raises(OptionError, match="add to="):
        open_state_dict(source, source_format="hf")


def test_threads_and_forks_and_pickles(checkpoints, written):
    expected = load_output(written("hf-mxfp4", "transformer-lens"))
    state = open_state_dict(checkpoints(format="hf-mxfp4"), to="transformer-lens")

    def differs(name: str) -> bool:
        return not torch.equal(state[name], expected[name])

    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(differs, [*expected] * 3))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own threads do not survive a fork
        os._exit(any(map(differs, expected)))
    assert os.waitpid(child, 0)[1] == 0
    again = pickle.loads(pickle.dumps(state))
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_total, (state,)) == _total(expected)


def _total(tensors) -> float:
    return sum(tensors[name].double().sum().item() for name in sorted(tensors))


@pytest.mark.parametrize("name", ["embed.W_E", "blocks.1.mlp.experts.0.W_in.weight"])
def test_a_file_that_changes_is_refused(name, checkpoints, tmp_path):
    """Mapped or made, before it was ever accessed and after that."""
    for first in (None, name):
        folder = shutil.copytree(checkpoints(), tmp_path / f"source {first}")
        state = open_state_dict(folder, to="transformer-lens")
        if first:
            state[first]
        for shard in folder.glob("*.safetensors"):
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
            os.utime(shard, ns=(1, 1))
        with pytest.raises(CheckpointError, match="changed while"):
            state[name]


def test_a_nan_scale_is_refused(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(checkpoints(), tmp_path / "source")
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.down_proj_scales"][1, 2] = 255
    save_file(tensors, file, {"format": "pt"})
    state = open_state_dict(folder, to="transformer-lens")
    assert state["blocks.0.mlp.experts.0.W_out.weight"].isfinite().all()
    with pytest.raises(CheckpointError, match="holds the scale 255"):
        state["blocks.0.mlp.experts.1.W_out.weight"]


def test_a_selection_that_was_converted_opens_by_its_names(checkpoints, tmp_path):
    gptoss_stream.convert(
        checkpoints(),
        tmp_path / "part",
        selection=gptoss_stream.Selection(layers="1", only=("router",)),
    )
    state = open_state_dict(tmp_path / "part")
    assert {*state} == {"blocks.1.mlp.W_gate.weight", "blocks.1.mlp.W_gate.bias"}
    with pytest.raises(CheckpointError, match="part of a model"):
        open_state_dict(tmp_path / "part", to="hf")
