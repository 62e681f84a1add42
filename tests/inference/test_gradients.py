"""Gradients with respect to activations flow through experts that are decoded again for them."""

from __future__ import annotations

import pytest
import torch
from inference_runs import TOKENS

import gptoss_stream


def loss(found: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())


@pytest.mark.parametrize("of", ["hf", "hf-mxfp4", "openai"])
def test_gradients_of_embeddings_equal_those_of_transformers(of, load, checkpoints, expected):
    """Within the rounding of float32."""
    peer = expected()
    start = peer.model.embed_tokens(TOKENS).detach().requires_grad_()
    loss(peer(inputs_embeds=start).logits).backward()
    wanted = start.grad
    model = load(checkpoints(format=of), dtype="float32")
    start = start.detach().requires_grad_()
    if load is gptoss_stream.load_hf_model:
        loss(model(inputs_embeds=start).logits).backward()
    else:
        loss(model(start, start_at_layer=0)).backward()
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(start.grad, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_a_hooked_activation(checkpoints, expected):
    """What attribution patching needs: of the input of the experts of a layer."""

    def gradient(model):
        caught = []

        def keep(module, inputs):
            caught.append(inputs[0].detach().requires_grad_())
            return caught[0], *inputs[1:]

        handle = model.model.layers[1].mlp.experts.register_forward_pre_hook(keep)
        loss(model(TOKENS).logits).backward()
        handle.remove()
        return caught[0].grad

    wanted = gradient(expected())
    found = gradient(gptoss_stream.load_hf_model(checkpoints(), dtype="float32"))
    assert wanted.abs().max() > 1e-6
    torch.testing.assert_close(found, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-4)


def test_a_second_backward_pass_through_the_first_is_refused(load, checkpoints):
    model = load(checkpoints(), dtype="float32")
    if load is gptoss_stream.load_hf_model:
        start = model.model.embed_tokens(TOKENS).requires_grad_()
        output = model(inputs_embeds=start).logits
    else:
        start = model.embed(TOKENS).requires_grad_()
        output = model(start, start_at_layer=0)
    (first,) = torch.autograd.grad(loss(output), start, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


def test_biases_that_need_gradients_get_them(load, checkpoints, expected):
    """They are parameters: LoRA with `bias="all"` trains them."""
    model = load(checkpoints(), dtype="float32")
    peer = expected()
    bias = peer.model.layers[2].mlp.experts.down_proj_bias
    bias.requires_grad_(True)
    loss(peer(TOKENS).logits).backward()
    if load is gptoss_stream.load_hf_model:
        own = model.model.layers[2].mlp.experts.down_proj_bias.requires_grad_()
        loss(model(TOKENS).logits).backward()
        found = own.grad
    else:
        experts = model.blocks[2].mlp.experts.requires_grad_(True)
        loss(model(TOKENS)).backward()
        found = torch.stack([expert.W_out.bias.grad for expert in experts])
    torch.testing.assert_close(found, bias.grad, atol=1e-7, rtol=1e-3)
    assert bias.grad.abs().max() > 1e-5
    bias.grad = None
    bias.requires_grad_(False)
