"""The experts of a layer in a HookedTransformer, decoded when they are used.

Source of the computation: TransformerLens 3.9, `components/mlps/gpt_oss_moe.py`, `GptOssExpert`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformer_lens.components.mlps.gpt_oss_moe import GptOssMoE
from transformer_lens.hook_points import HookPoint

from .activation import activate
from .expert_weights import ExpertMatrix, ExpertWeights
from .unsaved_matrix import UnsavedMatrix, refuse_saving

__all__ = ["HookedExpert", "replace_experts"]

_ALPHA, _LIMIT = 1.702, 7.0


class _Linear(nn.Module):
    """Stands for one of an expert's linear layers; its weight is decoded when it is asked for."""

    def __init__(self, original: nn.Linear, matrix: ExpertMatrix, rows: slice) -> None:
        super().__init__()
        self.bias = original.bias
        self._matrix = matrix
        self._rows = rows

    @property
    def weight(self) -> torch.Tensor:
        """The matrix [out, in], decoded now and not kept."""
        return self._matrix.tensor()[self._rows]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Let a state dict name the matrix, which is not in it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = UnsavedMatrix()


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
        self.W_gate = _Linear(original.W_gate, gate_up, slice(0, None, 2))
        self.W_in = _Linear(original.W_in, gate_up, slice(1, None, 2))
        self.W_out = _Linear(original.W_out, down, slice(None))
        self.hook_gate = original.hook_gate
        self.hook_pre = original.hook_pre
        self.hook_post = original.hook_post
        self._gate_up = gate_up
        self._down = down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs [tokens, d_model] for inputs [tokens, d_model]."""
        with torch.autocast(x.device.type, enabled=False):  # to float16 it cannot stack bfloat16
            bias = torch.stack([self.W_gate.bias, self.W_in.bias], dim=1).flatten()
        gate_up = self._gate_up.multiply(x, bias)
        gate, up = self.hook_gate(gate_up[:, ::2]), self.hook_pre(gate_up[:, 1::2])
        activated = self.hook_post(activate(gate, up, _ALPHA, _LIMIT))
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
        passes = _Passes(weights, layer)
        block.mlp.hook_expert_indices.register_forward_hook(passes.use)
        block.mlp.__class__ = _Layer
        block.mlp.passes = passes


class _Layer(GptOssMoE):  # type: ignore[misc]
    """A layer's experts, which ends a pass after any exception.

    Hooks of torch do not: after a KeyboardInterrupt none is called.
    """

    passes: _Passes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the layer gives for its inputs, [batch, positions, d_model]."""
        with self.passes.one():
            result: torch.Tensor = super().forward(x)
            return result


class _Passes:
    """Lets a layer's experts be decoded ahead, from when its router has picked them.

    Args:
        weights: The experts.
        layer: The layer's number.
    """

    def __init__(self, weights: ExpertWeights, layer: int) -> None:
        self._weights = weights
        self._layer = layer
        self._of_thread = threading.local()

    def __deepcopy__(self, memo: Any) -> _Passes:
        """Return the same: copies of a model share its experts."""
        return self

    __reduce_ex__ = refuse_saving

    def _stack(self) -> list[ExitStack]:
        """Return the passes that this thread has begun and not ended."""
        stack: list[ExitStack] = self._of_thread.__dict__.setdefault("stack", [])
        return stack

    @contextmanager
    def one(self) -> Iterator[None]:
        """Give a context in which this thread passes through the layer."""
        with ExitStack() as opened:
            self._stack().append(opened)
            try:
                yield
            finally:
                self._stack().pop()

    def use(self, module: nn.Module, inputs: Any, indices: torch.Tensor) -> None:
        """Begin to decode the experts that the router has picked."""
        if self._stack():
            picked = torch.unique(indices).tolist()
            one_pass = self._weights.one_pass(self._layer, picked, indices.numel())
            self._stack()[-1].enter_context(one_pass)
