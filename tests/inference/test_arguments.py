"""What a caller gets wrong is one line; what is dropped leaves nothing open."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import torch
from inference_runs import TOKENS, logits
from runs import wait_for

import gptoss_stream
from gptoss_stream.errors import OptionError

LOADERS = (
    gptoss_stream.load_hf_model,
    gptoss_stream.load_hooked_transformer,
    gptoss_stream.open_state_dict,
)
has_cuda = torch.cuda.is_available()


@pytest.mark.parametrize("function", LOADERS)
@pytest.mark.parametrize(
    "device", ["nowhere", pytest.param("cuda", marks=pytest.mark.skipif(has_cuda, reason="works"))]
)
def test_a_device_that_there_is_not(device, function, checkpoints):
    with pytest.raises(OptionError, match=f"device '{device}' cannot be used: "):
        function(checkpoints(), device=device)


def test_dropped_models_and_mappings_leave_nothing_open(load, checkpoints):
    def use():
        state = gptoss_stream.open_state_dict(checkpoints(), to="hf")
        state["model.layers.0.mlp.experts.down_proj"], state["lm_head.weight"]
        logits(load(checkpoints()))

    def count():
        gc.collect()
        return len([*Path("/proc/self/fd").iterdir()])

    use()
    before, threads = count(), threading.active_count()
    for _ in range(10):
        use()
    # Threads that have nothing left to do end by themselves.
    wait_for(lambda: count() <= before and threading.active_count() <= threads + 1)
    assert count() <= before
    assert threading.active_count() <= threads + 1


def test_an_error_within_an_expert_does_not_disturb_the_next_pass(load, checkpoints):
    model, threads = load(checkpoints()), torch.get_num_threads()
    expected = logits(model)

    def fail(*_):
        raise KeyboardInterrupt

    mlp = model.blocks[1].mlp if hasattr(model, "blocks") else model.model.layers[1].mlp
    inner = mlp.experts[2].hook_pre if hasattr(model, "blocks") else mlp.experts
    hook = inner.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    hook.remove()
    experts = mlp.experts[2]._gate_up if hasattr(model, "blocks") else mlp.experts
    assert not experts._weights._pass.locked()
    assert torch.get_num_threads() == threads
    assert torch.equal(logits(model, TOKENS), expected)
