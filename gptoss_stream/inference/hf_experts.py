"""The experts of a layer in transformers' model, decoded when they are used.

Source of the computation: transformers 5.24, `models/gpt_oss/modeling_gpt_oss.py`, `GptOssExperts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from .activation import activate
from .expert_weights import ExpertWeights
from .unsaved_matrix import UnsavedMatrix

__all__ = ["ExpertStack", "HfExperts"]


class ExpertStack:
    """The matrices of a layer's experts, [experts, in, out]: index it with an expert's number."""

    def __init__(self, weights: ExpertWeights, name: str, layer: int, num_experts: int) -> None:
        self._matrices = [weights.matrix(name, layer, expert) for expert in range(num_experts)]

    @property
    def shape(self) -> torch.Size:
        """Its shape, [experts, in, out]."""
        rows, columns = self._matrices[0].shape
        return torch.Size((len(self._matrices), columns, rows))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of decoded matrices."""
        return self._matrices[0].dtype

    def __len__(self) -> int:
        return len(self._matrices)

    def __getitem__(self, expert: int) -> torch.Tensor:
        """Return the matrix of an expert, [in, out], decoded now."""
        return self._matrices[int(expert)].tensor().T

    def multiply(self, expert: int, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply activations [tokens, in] with the matrix of an expert: [tokens, out]."""
        return self._matrices[expert].multiply(inputs)


class HfExperts(nn.Module):
    """Computes what `GptOssExperts` computes; its matrices are no parameters.

    Args:
        original: The module that it replaces, whose biases and settings it takes over.
        weights: The matrices.
        layer: The layer's number.
    """

    def __init__(self, original: Any, weights: ExpertWeights, layer: int) -> None:
        super().__init__()
        self.intermediate_size: int = original.intermediate_size
        self.num_experts: int = original.num_experts
        self.hidden_size: int = original.hidden_size
        self.alpha: float = original.alpha
        self.limit: float = original.limit
        self.gate_up_proj = ExpertStack(weights, "gate_up", layer, self.num_experts)
        self.gate_up_proj_bias = original.gate_up_proj_bias
        self.down_proj = ExpertStack(weights, "down", layer, self.num_experts)
        self.down_proj_bias = original.down_proj_bias
        self._weights = weights
        self._layer = layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        router_indices: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted sum of the experts that the router has picked for each token.

        Args:
            hidden_states: [tokens, hidden].
            router_indices: The experts of each token, [tokens, experts per token].
            routing_weights: Their weights, of the same shape.

        Returns:
            [tokens, hidden].
        """
        sums = torch.zeros_like(hidden_states)
        picked = torch.unique(router_indices).tolist()
        with self._weights.one_pass(self._layer, picked, router_indices.numel()):
            for expert in picked:
                tokens, places = torch.where(router_indices == expert)
                gate_up = self.gate_up_proj.multiply(expert, hidden_states[tokens])
                activated = self._activate(gate_up + self.gate_up_proj_bias[expert])
                output = self.down_proj.multiply(expert, activated) + self.down_proj_bias[expert]
                weighted = output * routing_weights[tokens, places, None]
                sums.index_add_(0, tokens, weighted.to(sums.dtype))
        return sums

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Let a state dict name the matrices, which are not in it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("gate_up_proj", "down_proj"):
            destination[prefix + name] = UnsavedMatrix()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        """Refuse what is for matrices: PEFT would leave out an adapter's part for experts."""
        own = {f"{prefix}gate_up_proj_bias", f"{prefix}down_proj_bias"}
        others = sorted(name for name in state_dict if name.startswith(prefix) and name not in own)
        if others:
            raise OptionError(
                f"{others[0]}: the experts of this model stay in its checkpoint; give adapters for "
                "them to load_hf_model with adapters="
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _activate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return the activations [tokens, intermediate] of gate and up, which alternate."""
        return activate(gate_up[..., ::2], gate_up[..., 1::2], self.alpha, self.limit)
