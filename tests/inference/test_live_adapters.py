"""Adapters that are merged as a model runs: as in a converted folder, and as PEFT's own model."""

from __future__ import annotations

import peft_models
import pytest
import torch
from inference_runs import TOKENS, logits
from peft import PeftModel
from peft_oracles import peft_logits

import gptoss_stream
from gptoss_stream.errors import OptionError

NAMES = [
    "attention",
    "experts",
    "gate_up",
    "down of one layer, gate_up of the other",
    "attention, experts and head",
    "router and experts",
    "router and head saved",
    "experts saved",
    "embedding and head",
    "DoRA",
    "all biases, with a router",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return peft_models.save_base(tmp_path_factory.mktemp("base"), torch.float32)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A function from a name to an adapter that PEFT has saved."""
    folders = {}

    def folder(name):
        if name not in folders:
            target = tmp_path_factory.mktemp("adapter")
            folders[name] = peft_models.save_adapter(target, base, **peft_models.ADAPTERS[name])
        return folders[name]

    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_pefts_own_model(name, load, base, adapter):
    found = logits(load(base, dtype="float32", adapters=adapter(name)))
    wanted = peft_logits(base, adapter(name), TOKENS)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(found, logits(load(base, dtype="float32")), atol=1e-3)


@pytest.mark.parametrize("name", ["attention and experts", "router and experts"])
@pytest.mark.parametrize("of", ["hf-mxfp4", "openai", "transformer-lens"])
def test_the_logits_are_those_of_the_converted_folder(of, name, load, checkpoints, tmp_path):
    """In bfloat16, in which merged weights are rounded; two adapters, one after the other."""
    targets = {"attention and experts": "attention,experts", "router and experts": "router,experts"}
    adapters = [
        gptoss_stream.synth_adapter(tmp_path / str(seed), targets=targets[name], seed=seed)
        for seed in (1, 2)
    ]
    to = {"load_hf_model": "hf", "load_hooked_transformer": "transformer-lens"}[load.__name__]
    gptoss_stream.convert(checkpoints(format=of), tmp_path / "out", to=to, adapters=adapters)
    found = logits(load(checkpoints(format=of), adapters=adapters))
    torch.testing.assert_close(found, logits(load(tmp_path / "out")), atol=5e-3, rtol=0)
    exact = logits(load(checkpoints(format=of), adapters=adapters, dtype="float32"))
    assert (found - exact).abs().mean() < 0.1 * exact.std()  # of bfloat16 throughout
    assert not torch.allclose(found, logits(load(checkpoints(format=of))), atol=3e-2)


@pytest.mark.parametrize("name", ["attention", "q and v of one layer", "head", "DoRA"])
def test_peft_applies_an_adapter_that_changes_no_experts(name, base, adapter):
    with peft_models.quiet():
        found = PeftModel.from_pretrained(
            gptoss_stream.load_hf_model(base, dtype="float32"), adapter(name)
        ).eval()
    merged = gptoss_stream.load_hf_model(base, dtype="float32", adapters=adapter(name))
    torch.testing.assert_close(logits(found), logits(merged), atol=1e-5, rtol=0)
    assert torch.equal(logits(found), peft_logits(base, adapter(name), TOKENS))


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ("experts", ValueError, "no `target_parameters` found"),  # of PEFT
        ("attention,experts", OptionError, r"\.experts\..* give adapters for them .* adapters="),
    ],
)
def test_an_adapter_of_decoded_experts_through_peft_is_refused(
    targets, error, message, checkpoints, tmp_path
):
    """PEFT would apply the part for attention, and only warn."""
    gptoss_stream.synth_adapter(tmp_path / "adapter", targets=targets)
    model = gptoss_stream.load_hf_model(checkpoints())
    with pytest.raises(error, match=message), peft_models.quiet():
        PeftModel.from_pretrained(model, tmp_path / "adapter")


def test_an_adapter_of_mapped_experts_works_through_peft(checkpoints, tmp_path):
    """They are parameters as in any other model."""
    gptoss_stream.synth_adapter(tmp_path / "adapter", targets="attention,experts")
    source = checkpoints(format="hf")
    with peft_models.quiet():
        found = PeftModel.from_pretrained(
            gptoss_stream.load_hf_model(source), tmp_path / "adapter"
        ).eval()
    exact = logits(
        gptoss_stream.load_hf_model(source, dtype="float32", adapters=tmp_path / "adapter")
    )
    assert (logits(found) - exact).abs().mean() < 0.1 * exact.std()
