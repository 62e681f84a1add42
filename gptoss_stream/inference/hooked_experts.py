"""The experts of a layer in a HookedTransformer, decoded when they are used.

Source of the computation: TransformerLens 3.9, `components/mlps/gpt_oss_moe.py`, `GptOssExpert`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint

from .expert_weights import ExpertMatrix, ExpertWeights

__all__ = ["HookedExpert", "replace_experts"]

_ALPHA, _LIMIT = 1.702, 7.0


class _Linear(nn.Module):
    """Stands for one of an expert's linear layers; its weight is decoded when it is asked for."""

    def __init__(self, original: nn.Linear, weight: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self.bias = original.bias
        self._weight = weight

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [out, in], decoded now and not kept."""
        return self._weight()


class HookedExpert(nn.Module):
    """Computes what `GptOssExpert` computes, with the same hooks; its matrices are no parameters.

    Args:
        original: The module that it replaces, whose biases and hooks it takes over.
        gate_up: Its matrix for gate and up, whose rows alternate between the two.
        down: Its matrix for the output.
    """

    hook_gate: HookPoint
    hook_pre: HookPoint
    hook_post: HookPoint

    def __init__(self, original: Any, gate_up: ExpertMatrix, down: ExpertMatrix) -> None:
        super().__init__()
        self.W_gate = _Linear(original.W_gate, lambda: gate_up.tensor()[::2])
        self.W_in = _Linear(original.W_in, lambda: gate_up.tensor()[1::2])
        self.W_out = _Linear(original.W_out, down.tensor)
        self.hook_gate = original.hook_gate
        self.hook_pre = original.hook_pre
        self.hook_post = original.hook_post
        self._gate_up = gate_up
        self._down = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs [tokens, d_model] for inputs [tokens, d_model]."""
        bias = torch.stack([self.W_gate.bias, self.W_in.bias], dim=1).flatten()
        gate_up = self._gate_up.multiply(x, bias)
        gate, up = self.hook_gate(gate_up[:, ::2]), self.hook_pre(gate_up[:, 1::2])
        gate = gate.clamp(max=_LIMIT)
        up = up.clamp(min=-_LIMIT, max=_LIMIT)
        activated = self.hook_post((up + 1) * (gate * torch.sigmoid(gate * _ALPHA)))
        return self._down.multiply(activated, self.W_out.bias)


def replace_experts(model: Any, weights: ExpertWeights) -> None:
    """Replace the experts of a HookedTransformer with those that are decoded when they are used.

    Args:
        model: The model.
        weights: The matrices of its experts.
    """
    for layer, block in enumerate(model.blocks):
        for number, original in enumerate(block.mlp.experts):
            block.mlp.experts[number] = HookedExpert(
                original,
                weights.matrix("gate_up", layer, number),
                weights.matrix("down", layer, number),
            )
        _decode_ahead(block.mlp, weights, layer)


def _decode_ahead(mlp: Any, weights: ExpertWeights, layer: int) -> None:
    """Let a layer's experts be decoded ahead, from when the router has picked them."""
    passes: list[ExitStack] = []

    def begin(module: nn.Module, inputs: Any, indices: torch.Tensor) -> None:
        picked = torch.unique(indices).tolist()
        passes[-1].enter_context(weights.one_pass(layer, picked, indices.numel()))

    mlp.register_forward_pre_hook(lambda module, inputs: passes.append(ExitStack()))
    mlp.hook_expert_indices.register_forward_hook(begin)
    mlp.register_forward_hook(
        lambda module, inputs, outputs: passes.pop().close(), always_call=True
    )
