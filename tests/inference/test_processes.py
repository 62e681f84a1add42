"""A model in several threads, in a forked process, and while its files change."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading

import pytest
import torch
from inference_runs import TOKENS, logits

import gptoss_stream
from gptoss_stream.errors import CheckpointError

SIZES = [0, 30_000, "1GB"]


@pytest.mark.parametrize("cache", SIZES)
def test_threads_give_the_same_bits(cache, load, checkpoints):
    """Four that run different texts at once, several times."""
    model = load(checkpoints(), expert_cache=cache)
    texts = [(TOKENS[:1, : 20 + 10 * i] + i) for i in range(4)]
    expected = [logits(model, text) for text in texts]
    begin, found = threading.Barrier(4), [[] for _ in texts]

    def run(i):
        begin.wait()
        for _ in range(4):
            found[i].append(logits(model, texts[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, wanted in zip(found, expected, strict=True):
        assert len(own) == 4
        assert all(torch.equal(one, wanted) for one in own)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("cache", SIZES)
@pytest.mark.parametrize("is_used_before", [True, False])
def test_both_processes_run_after_a_fork(is_used_before, cache, load, checkpoints):
    model = load(checkpoints(), expert_cache=cache)
    expected = logits(load(checkpoints()))
    if is_used_before:
        logits(model)
    child = os.fork()
    if child == 0:
        try:
            os._exit(not torch.equal(logits(model), expected))
        finally:
            os._exit(2)
    assert torch.equal(logits(model), expected)
    assert os.waitpid(child, 0)[1] == 0


def rewrite(file):
    """Write other values to the second half of a file, in place."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(size // 2)
        opened.write(bytes(size - size // 2))


def truncate(file):
    """Cut the last third of a file, where nothing of it is mapped."""
    os.truncate(file, file.stat().st_size * 2 // 3)


def replace(file):
    """Put another file in its place: the one that is open stays as it is."""
    other = file.with_name("other")
    other.write_bytes(bytes(file.stat().st_size))
    other.replace(file)


def remove(file):
    file.unlink()


@pytest.mark.parametrize("is_used_before", [True, False])
@pytest.mark.parametrize("change", [rewrite, replace, remove, truncate])
def test_a_file_that_changes_gives_an_error_and_no_wrong_logits(
    change, is_used_before, checkpoints, tmp_path
):
    """Or the logits of the file that was opened, if it still exists under no name.

    Asked of one layer's experts: in the whole model a truncated file's mapped pages kill the
    process, as the docstring says.
    """
    folder = shutil.copytree(checkpoints(), tmp_path / "source")
    model = gptoss_stream.load_hf_model(folder)
    experts = model.model.layers[3].mlp.experts
    hidden = torch.ones(3, 96, dtype=torch.bfloat16)
    picked, weights = torch.tensor([[0, 1], [2, 3], [4, 0]]), torch.full((3, 2), 0.5).bfloat16()
    bias = experts.gate_up_proj_bias, experts.down_proj_bias
    experts.gate_up_proj_bias, experts.down_proj_bias = (
        torch.nn.Parameter(one.clone(), requires_grad=False) for one in bias
    )
    other = gptoss_stream.load_hf_model(checkpoints()).model.layers[3].mlp.experts
    expected = other(hidden, picked, weights)
    if is_used_before:
        assert torch.equal(experts(hidden, picked, weights), expected)
    change(folder / "model.safetensors")
    if change in (replace, remove) and is_used_before:
        with contextlib.suppress(CheckpointError):
            assert torch.equal(experts(hidden, picked, weights), expected)
    else:
        with pytest.raises(gptoss_stream.GptOssStreamError, match=r"changed|reading"):
            experts(hidden, picked, weights)
