"""Decoded experts are kept within a bound, and each is decoded once for a pass."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
import torch
from inference_runs import TOKENS, is_hooked, logits

from gptoss_stream.errors import OptionError
from gptoss_stream.inference.expert_cache import ExpertCache
from gptoss_stream.inference.expert_weights import ExpertWeights
from gptoss_stream.loading.tensor_loader import TensorLoader

MATRIX = 2 * 64 * 96 * 2  # gate and up of the tiny model in bfloat16, twice as large as down
LAYERS, EXPERTS = 4, 5
ALL = LAYERS * EXPERTS * (MATRIX + MATRIX // 2)


@pytest.fixture
def decoded(monkeypatch):
    """How often each matrix was decoded, to memory or for a product, as (name, layer, expert)."""
    counts, lock = Counter(), threading.Lock()

    def count(method):
        def counting(self, tensor, *arguments):
            if tensor.origin.model_tensor in ("gate_up", "down"):
                with lock:
                    counts[(*tensor.origin,)] += 1
            method(self, tensor, *arguments)

        monkeypatch.setattr(TensorLoader, method.__name__, counting)

    count(TensorLoader.make_into)
    count(TensorLoader.multiply)
    return counts


def weights_of(model) -> ExpertWeights:
    if is_hooked(model):
        return model.blocks[0].mlp.experts[0]._gate_up._weights
    return model.model.layers[0].mlp.experts._weights


def kept(model) -> int:
    """The bytes that are kept, counted anew."""
    cache = weights_of(model)._cache
    found = sum(one.memory.nbytes for one in cache._kept.values())
    assert cache._kept_nbytes == found
    return found


@pytest.mark.parametrize("size", [0, 1, MATRIX // 2, MATRIX, 3 * MATRIX, ALL - 1, ALL, "2GB"])
def test_any_size_gives_the_same_bits_and_is_not_exceeded(size, load, checkpoints, monkeypatch):
    """But by the one matrix that is in use."""
    expected = logits(load(checkpoints()))
    model, most = load(checkpoints(), expert_cache=size), 0
    keep = ExpertCache._keep

    def watched(cache, *arguments):
        nonlocal most
        found = keep(cache, *arguments)
        most = max(most, kept(model))
        return found

    monkeypatch.setattr(ExpertCache, "_keep", watched)
    limit = 2 * 10**9 if size == "2GB" else size
    for _ in range(3):
        assert torch.equal(logits(model), expected)
        assert kept(model) <= limit
        assert kept(model) >= min(limit, ALL) - MATRIX
    assert most <= limit + MATRIX


def test_each_expert_is_decoded_once_in_a_pass(load, checkpoints, decoded):
    """Whatever the number of tokens and of sequences; and only those that the router has picked."""
    model = load(checkpoints())
    assert not decoded
    logits(model, TOKENS)
    assert len(decoded) == LAYERS * EXPERTS * 2
    assert set(decoded.values()) == {1}
    decoded.clear()
    logits(model, TOKENS[:1, :1])
    assert set(Counter(layer for _, layer, _ in decoded).values()) == {2 * 2}  # experts, matrices
    assert set(decoded.values()) == {1}


def test_nothing_is_decoded_again_when_all_is_kept(load, checkpoints, decoded):
    model = load(checkpoints(), expert_cache=ALL)
    logits(model)
    decoded.clear()
    logits(model)
    assert not decoded


def test_those_used_longest_ago_go_first(checkpoints, load, decoded):
    weights = weights_of(load(checkpoints(), expert_cache=2 * MATRIX))

    def use(expert):
        with weights.matrix("gate_up", 0, expert).borrow(torch.zeros(1, dtype=torch.bfloat16)):
            pass

    for expert in (0, 1, 0, 2, 0, 1, 2):
        use(expert)
    times = {expert: count for (_, _, expert), count in decoded.items()}
    assert times == {0: 1, 1: 2, 2: 2}  # 2 took the place of 1, then 1 that of 2


def test_kept_experts_serve_the_backward_pass(checkpoints, load, decoded):
    """Without a cache each is decoded a second time, and is not held in between."""
    for size, passes in ((0, 2), (ALL, 1)):
        model = load(checkpoints(), expert_cache=size)
        decoded.clear()
        if is_hooked(model):
            start = model.embed(TOKENS).detach().requires_grad_()
            output = model(start, start_at_layer=0, return_type="logits")
        else:
            start = model.model.embed_tokens(TOKENS).detach().requires_grad_()
            output = model(inputs_embeds=start).logits
        output.sum().backward()
        assert set(decoded.values()) == {passes}


@pytest.mark.parametrize("size", [-1, "-1", "much"])
def test_a_size_that_is_none_is_refused(size, load, checkpoints):
    with pytest.raises(OptionError):
        load(checkpoints(), expert_cache=size)
