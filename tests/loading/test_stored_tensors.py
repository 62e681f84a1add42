"""Tensors under the names that a checkpoint stores: of every dtype, and wherever they begin."""

from __future__ import annotations

import os
from math import prod

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shards import read_shard, write_shard

import gptoss_stream
from gptoss_stream.errors import CheckpointError, TensorError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
SIZES = {code: torch.empty(0, dtype=dtype).element_size() for code, dtype in DTYPES.items()}


@pytest.fixture
def extra(tmp_path):
    """A checkpoint with a tensor of each dtype beside its own, three times: [3, 2], [] and [0, 2].

    They come first in the file, after one of three bytes, so that most are not aligned.
    """
    folder = gptoss_stream.synth(tmp_path / "source", layers=1, max_shard_size="50GB")
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    header, data = read_shard(folder / "model.safetensors")
    added, at = {"odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, 3
    for code, size in {**SIZES, "F4": 0.5}.items():
        for name, shape in (("matrix", [3, 2]), ("empty", [0, 2]), ("scalar", [])):
            end = at + int(prod(shape) * size)
            if code != "F4" or shape:
                offsets = {"data_offsets": [at, end]}
                added[f"{code}.{name}"] = {"dtype": code, "shape": shape, **offsets}
                at = end
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [at + one for one in entry["data_offsets"]]
            added[name] = entry
    values = np.random.default_rng(0).integers(0, 2, at, np.uint8)  # also valid as BOOL
    write_shard(folder / "model.safetensors", added, values.tobytes() + data)
    return folder


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_comes_as_torchs_own(extra):
    header, data = read_shard(extra / "model.safetensors")
    start = (extra / "model.safetensors").stat().st_size - len(data)
    state = gptoss_stream.open_state_dict(extra)
    for code, dtype in DTYPES.items():
        for name in (f"{code}.matrix", f"{code}.empty", f"{code}.scalar"):
            found, (begin, end) = state[name], header[name]["data_offsets"]
            assert found.dtype is state.dtype(name) is dtype
            assert [*found.shape] == [*state.shape(name)] == header[name]["shape"]
            assert as_bytes(found) == data[begin:end], name
            assert found.data_ptr() % SIZES[code] == 0
            assert state.is_mapped(name) == ((start + begin) % SIZES[code] == 0)
        rows = state.get_slice(f"{code}.matrix")
        begin, end = header[f"{code}.matrix"]["data_offsets"]
        assert as_bytes(rows[1:]) == data[begin + 2 * SIZES[code] : end]
        assert rows[2, 1].shape == ()


def test_a_dtype_that_torch_lacks_is_refused_when_it_is_accessed(extra):
    """The other tensors can be used."""
    state = gptoss_stream.open_state_dict(extra)
    assert state.shape("F4.matrix") == (3, 2)
    for access in (lambda: state["F4.matrix"], lambda: state.dtype("F4.matrix")):
        with pytest.raises(TensorError, match=r"'F4.matrix' has the dtype F4, which torch"):
            access()


def test_a_conversion_leaves_them_out(extra):
    """Extra tensors of any dtype are no hindrance."""
    state = gptoss_stream.open_state_dict(extra, to="hf")
    assert "I64.matrix" not in state
    assert all(state[name].isfinite().all() for name in state)


def test_only_floats_are_cast(extra):
    plain = gptoss_stream.open_state_dict(extra)
    state = gptoss_stream.open_state_dict(extra, dtype="float32")
    for code, dtype in DTYPES.items():
        name = f"{code}.matrix"
        assert state[name].dtype is state.dtype(name)
        assert state[name].dtype is (torch.float32 if dtype.is_floating_point else dtype)
        assert torch.equal(state[name], plain[name].to(state[name].dtype))


def test_what_is_aligned_is_mapped(checkpoints):
    """All of a checkpoint that is written as usual."""
    state = gptoss_stream.open_state_dict(checkpoints())
    assert all(state.is_mapped(name) for name in state)
    (file,) = checkpoints().glob("*.safetensors")
    for name, tensor in load_file(file).items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("to", [None, "transformer-lens"])
def test_indices_that_are_arrays(to, checkpoints):
    state = gptoss_stream.open_state_dict(checkpoints(), to=to)
    for name in [*state][:30]:
        whole = state[name]
        for index in (np.array([1, 0, 1]), np.int64(-1), torch.arange(len(whole)) % 2 == 0):
            assert torch.equal(state.get_slice(name)[index], whole[index]), name


@pytest.mark.parametrize("accessed", [False, True])
@pytest.mark.parametrize("to", [None, "hf"])
def test_a_truncated_file_is_refused(to, accessed, checkpoints, tmp_path):
    """Before a page of it that is gone is accessed, which would kill the process."""
    folder = gptoss_stream.synth(tmp_path / "source", layers=1, max_shard_size="50GB")
    state = gptoss_stream.open_state_dict(folder, to=to)
    if accessed:
        _ = [state[name].view(-1)[0].clone() for name in state]
    os.truncate(folder / "model.safetensors", 10_000)
    for name in state:
        with pytest.raises(CheckpointError, match="changed"):
            state[name]


def test_a_file_that_is_replaced_is_not_mixed_with_the_new_one(tmp_path):
    """Another file under the same name: refused, or read as it was if it is open."""
    folder = gptoss_stream.synth(tmp_path / "source", layers=1, max_shard_size="50GB")
    other = gptoss_stream.synth(tmp_path / "other", layers=1, max_shard_size="50GB", seed=1)
    before = load_file(folder / "model.safetensors")
    opened, unopened = (gptoss_stream.open_state_dict(folder) for _ in range(2))
    name = next(iter(opened))
    _ = opened[name]
    (other / "model.safetensors").replace(folder / "model.safetensors")
    assert all(torch.equal(opened[name], tensor) for name, tensor in before.items())
    with pytest.raises(CheckpointError, match="changed"):
        unopened[name]
