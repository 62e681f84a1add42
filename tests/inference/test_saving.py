"""What leaves a model: its dtype, copies of it, and what would save it without its experts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from inference_runs import is_hooked, logits
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft_models import ATTENTION, fill, quiet
from safetensors.torch import load_file, save_file, save_model

import gptoss_stream
from gptoss_stream.errors import OptionError

REFUSAL = "experts of this model stay in its checkpoint .* use convert"

SAVED = {
    "torch.save of a state dict": lambda model, out: torch.save(model.state_dict(), out),
    "torch.save of a model": torch.save,
    "safetensors of a state dict": lambda model, out: save_file(model.state_dict(), out),
    "safetensors of a model": lambda model, out: save_model(model, str(out)),
    "pickle": lambda model, out: pickle.dumps(model),
    "a copied state dict": lambda model, out: copy.deepcopy(model.state_dict()),
    "values of a state dict": lambda model, out: [v + 0 for v in model.state_dict().values()],
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED.keys())
def test_a_model_is_not_saved_without_its_experts(save, load, checkpoints, tmp_path):
    with pytest.raises(OptionError, match=REFUSAL):
        save(load(checkpoints()), tmp_path / "saved")


def test_save_pretrained_is_refused(checkpoints, tmp_path):
    model = gptoss_stream.load_hf_model(checkpoints())
    for options in ({}, {"state_dict": model.state_dict()}, {"max_shard_size": "100KB"}):
        with pytest.raises(OptionError, match=REFUSAL):
            model.save_pretrained(tmp_path / "saved", **options)
    assert not [*tmp_path.iterdir()]


def test_processing_weights_is_refused(checkpoints):
    """TransformerLens would fold norms into the experts."""
    model = gptoss_stream.load_hooked_transformer(checkpoints())
    with pytest.raises(OptionError, match=REFUSAL):
        model.process_weights_()


def test_a_model_that_is_mapped_whole_is_saved(checkpoints, tmp_path):
    source = checkpoints(format="hf")
    gptoss_stream.load_hf_model(source).save_pretrained(tmp_path / "saved")
    found = load_file(tmp_path / "saved/model.safetensors")
    expected = load_file(source / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    pickle.loads(pickle.dumps(gptoss_stream.load_hf_model(source)))


def test_peft_saves_an_adapter_that_was_trained_on_it(checkpoints, tmp_path):
    """A step of training changes it; the saved one gives the same logits."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM")
    tokens = torch.arange(20)[None]
    with quiet():
        model = get_peft_model(gptoss_stream.load_hf_model(checkpoints(), dtype="float32"), config)
        fill(model, 1)
        model(tokens, labels=tokens).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad.abs().sum() > 0 for p in trained)
        torch.optim.SGD(trained, lr=0.1).step()
        assert all("lora_" in name for name in get_peft_model_state_dict(model))
        model.save_pretrained(tmp_path / "adapter")
        base = gptoss_stream.load_hf_model(checkpoints(), dtype="float32")
        again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(checkpoints())
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    merged = gptoss_stream.load_hf_model(
        checkpoints(), dtype="float32", adapters=tmp_path / "adapter"
    )
    torch.testing.assert_close(logits(merged, tokens), logits(model, tokens), atol=1e-5, rtol=0)


def test_a_copy_computes_the_same_and_shares_experts(load, checkpoints):
    model = load(checkpoints())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_changes_its_dtype(dtype, load, checkpoints, tmp_path):
    """As a model of converted weights does: decoded values are as precise as they were."""
    to = {"load_hf_model": "hf", "load_hooked_transformer": "transformer-lens"}[load.__name__]
    gptoss_stream.convert(checkpoints(), tmp_path / "out", to=to)
    found, peer = (logits(load(s).to(dtype)) for s in (checkpoints(), tmp_path / "out"))
    assert found.dtype == peer.dtype
    torch.testing.assert_close(found, peer, atol=1e-6, rtol=0)


@pytest.mark.parametrize("of", ["hf", "hf-mxfp4", "openai", "transformer-lens"])
def test_what_is_not_decoded_is_mapped(of, load, checkpoints):
    """Nothing is left on the meta device, and nothing needs a gradient."""
    model = load(checkpoints(format=of))
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = [line.split() for line in lines if "safetensors" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    own = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, tensor in own if tensor.is_meta]
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    copied = {
        name
        for name, p in model.named_parameters()
        if not any(low <= p.data_ptr() < high for low, high in ranges)
    }
    made = sum(p.nbytes for name, p in model.named_parameters() if name in copied)
    whole = 4 * 3 * 5 * 96 * 64 * 2  # all matrices of experts
    if of in ("hf", "transformer-lens") and is_hooked(model) == (of == "transformer-lens"):
        assert not copied
    elif of != "transformer-lens":  # its attention has other axes
        assert made < whole / 8, copied
    assert not model.training
