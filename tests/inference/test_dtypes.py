"""A model has one dtype, whatever its checkpoint stores, and computes in others under autocast."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from inference_runs import is_hooked, logits
from safetensors.torch import load_file, save_file

import gptoss_stream
from gptoss_stream.errors import OptionError

STORED = {
    "experts": lambda name: "experts" in name,
    "biases": lambda name: "bias" in name or ".b_" in name or "._b_" in name,
    "norms": lambda name: "norm" in name or ".ln" in name,
    "attention": lambda name: "attn" in name,
    "all": lambda name: True,
}
FORMATS = ["hf", "hf-mxfp4", "transformer-lens"]


@pytest.fixture
def mixed(checkpoints, tmp_path):
    """A function from a format, tensors and a dtype to a checkpoint that stores them so."""

    def folder(of, which, dtype):
        out = shutil.copytree(checkpoints(layers=2, format=of), tmp_path / "mixed")
        (out / "model.safetensors.index.json").unlink(missing_ok=True)
        (file,) = out.glob("*.safetensors")
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() and which(name) else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return out

    return folder


@pytest.mark.parametrize("which", STORED)
@pytest.mark.parametrize("of", FORMATS)
def test_what_is_stored_in_another_dtype_is_cast(of, which, mixed, load, checkpoints):
    """The values are those of bfloat16, so that the logits are equal where most are bfloat16."""
    dtype = torch.float16 if which == "all" else torch.float32
    model = load(mixed(of, STORED[which], dtype))
    (found,) = {p.dtype for p in model.parameters()}
    result = logits(model)
    assert result.dtype == found
    if found == torch.bfloat16:
        assert torch.equal(result, logits(load(checkpoints(layers=2, format=of))))
    else:
        assert found == dtype
        assert which == "all" or of != "hf-mxfp4"


def test_a_cast_is_logged_and_keep_is_refused(mixed, load, caplog):
    source = mixed("hf-mxfp4", STORED["norms"], torch.float32)
    with pytest.raises(OptionError, match=r"would be bfloat16 and float32, and a model has one"):
        load(source, dtype="keep")
    caplog.clear()
    assert logits(load(source, dtype="float32")).dtype == torch.float32
    assert not [record for record in caplog.records if record.name.startswith("gptoss_stream")]


def test_a_mapped_model_keeps_its_dtype(load, checkpoints):
    """As a dtype of torch, as a text, and by default."""
    of = "transformer-lens" if "hooked" in load.__name__ else "hf"
    for dtype in (None, "keep", "bf16", torch.bfloat16):
        assert {p.dtype for p in load(checkpoints(format=of), dtype=dtype).parameters()} == {
            torch.bfloat16
        }


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
def test_autocast(autocast, dtype, load, checkpoints):
    model = load(checkpoints(), dtype=dtype)
    expected = logits(model).float()
    with torch.autocast("cpu", dtype=autocast):
        found = logits(model)
    assert found.dtype == autocast
    # The router may pick other experts for a token.
    assert (found.float() - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("layers", [[1, 3], np.array([1, 3]), range(1, 4, 2)], ids=str)
def test_layers_as_people_have_them(layers, load, checkpoints):
    for of in ("hf-mxfp4", "transformer-lens"):
        model = load(checkpoints(format=of), layers=layers)
        blocks = model.blocks if is_hooked(model) else model.model.layers
        assert len(blocks) == 2
    assert logits(load(checkpoints(), layers=2)).shape[-1] == 1009


@pytest.mark.parametrize("wrong", [0, -1, "8", 1.5, True, [8]])
def test_a_wrong_context_length(wrong, checkpoints):
    with pytest.raises(OptionError, match=r"n_ctx .*: it must be (at least 1|an integer)"):
        gptoss_stream.load_hooked_transformer(checkpoints(), n_ctx=wrong)
    assert gptoss_stream.load_hooked_transformer(checkpoints(), n_ctx=np.int64(9)).cfg.n_ctx == 9
