"""Hooks, caches and single weights of models off a checkpoint are those of other models."""

from __future__ import annotations

import pytest
import torch
from inference_runs import TOKENS, logits

import gptoss_stream


@pytest.fixture(scope="module")
def converted(checkpoints, tmp_path_factory):
    """TransformerLens's model of the converted tiny checkpoint, which is mapped whole."""
    folder = tmp_path_factory.mktemp("converted")
    gptoss_stream.convert(checkpoints(), folder / "out")
    return gptoss_stream.load_hooked_transformer(folder / "out")


@pytest.fixture(scope="module")
def hooked(checkpoints):
    return gptoss_stream.load_hooked_transformer(checkpoints())


@pytest.fixture(scope="module")
def hf(checkpoints):
    return gptoss_stream.load_hf_model(checkpoints())


@torch.no_grad()
def test_every_activation_is_cached_bit_for_bit(hooked, converted):
    """Also those of single experts."""
    found_logits, found = hooked.run_with_cache(TOKENS)
    expected_logits, expected = converted.run_with_cache(TOKENS)
    assert torch.equal(found_logits, expected_logits)
    assert [*found] == [*expected]
    assert {f"blocks.3.mlp.experts.0.hook_{name}" for name in ("gate", "pre", "post")} <= {*found}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@torch.no_grad()
@pytest.mark.parametrize("place", ["gate", "pre", "post"])
def test_hooks_on_an_expert_change_what_it_gives(place, hooked, converted):
    def double(activations, hook):
        return activations * 2

    hooks = {"fwd_hooks": [(f"blocks.0.mlp.experts.1.hook_{place}", double)]}
    found = hooked.run_with_hooks(TOKENS, **hooks)
    assert torch.equal(found, converted.run_with_hooks(TOKENS, **hooks))
    assert not torch.equal(found, logits(hooked))


@torch.no_grad()
def test_a_hook_chooses_other_experts(hooked, converted):
    """Than those that the router has picked, and that are read ahead."""

    def others(indices, hook):
        return (indices + 1) % 5

    hooks = {"fwd_hooks": [("blocks.1.mlp.hook_expert_indices", others)]}
    found = hooked.run_with_hooks(TOKENS, **hooks)
    assert torch.equal(found, converted.run_with_hooks(TOKENS, **hooks))
    assert not torch.equal(found, logits(hooked))
    hooked.reset_hooks()
    assert torch.equal(logits(hooked), logits(converted))


def test_backward_hooks_on_an_expert(hooked, converted):
    def gradient(model):
        caught = []
        model.add_hook(
            "blocks.2.mlp.experts.1.hook_post", lambda g, hook: caught.append(g.clone()), "bwd"
        )
        start = model.embed(TOKENS).detach().requires_grad_()
        model(start, start_at_layer=0, return_type="logits").float().square().mean().backward()
        model.reset_hooks()
        return caught[0]

    found, expected = gradient(hooked), gradient(converted)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=2e-2)


def test_weights_of_one_expert(checkpoints, hooked, hf):
    """Those of TransformerLens one by one, [out, in]; those of transformers as stacks."""
    state = gptoss_stream.open_state_dict(checkpoints(), to="transformer-lens")
    for layer in range(4):
        for number, expert in enumerate(hooked.blocks[layer].mlp.experts):
            for name in ("W_in", "W_gate", "W_out"):
                stored = f"blocks.{layer}.mlp.experts.{number}.{name}"
                assert torch.equal(getattr(expert, name).weight, state[f"{stored}.weight"])
                assert torch.equal(getattr(expert, name).bias, state[f"{stored}.bias"])
    state = gptoss_stream.open_state_dict(checkpoints(), to="hf")
    for layer in range(4):
        experts = hf.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            stack, stored = getattr(experts, name), f"model.layers.{layer}.mlp.experts.{name}"
            assert stack.shape == state[stored].shape
            assert stack.dtype == state[stored].dtype
            assert len(stack) == len(state[stored]) == len([*stack])
            assert torch.equal(torch.stack([*stack]), state[stored])
            assert torch.equal(stack[-1], state[stored][-1])
            with pytest.raises(IndexError):
                stack[5]
            bias = getattr(experts, f"{name}_bias")
            assert torch.equal(bias, state[f"{stored}_bias"])


@torch.no_grad()
def test_forward_hooks_of_torch(hf, expected):
    """On the experts and on the router of a layer, whose outputs they see and change."""

    def run(model):
        layer, seen = model.model.layers[1].mlp, []
        handles = [
            layer.router.register_forward_hook(lambda m, i, o: seen.extend(o)),
            layer.experts.register_forward_hook(lambda m, i, o: seen.append(o) or o * 2),
            layer.experts.register_forward_pre_hook(lambda m, i: seen.extend(i)),
        ]
        changed = logits(model)
        for handle in handles:
            handle.remove()
        return [changed, *seen]

    found, peer = run(hf), run(expected(dtype="bfloat16"))
    assert len(found) == len(peer) == 1 + 3 + 3 + 1
    assert all(torch.equal(one, other) for one, other in zip(found, peer, strict=True))
    assert not torch.equal(found[0], logits(hf))


@torch.no_grad()
def test_large_activations_are_clamped(hf, hooked, converted, expected):
    """At 7, which the activations of small random models do not reach."""
    inputs = torch.randn(6, 96, generator=torch.Generator().manual_seed(0)).bfloat16() * 100
    assert converted.blocks[1].mlp.experts[2].W_in(inputs).abs().max() > 14
    picked, weights = torch.arange(12).reshape(6, 2) % 5, torch.full((6, 2), 0.5).bfloat16()
    found, peer = (
        model.model.layers[1].mlp.experts(inputs, picked, weights)
        for model in (hf, expected(dtype="bfloat16"))
    )
    assert torch.equal(found, peer)
    found, peer = (model.blocks[1].mlp.experts[2](inputs) for model in (hooked, converted))
    assert torch.equal(found, peer)
