"""The activation of gpt-oss's experts.

Source: transformers 5.24, `models/gpt_oss/modeling_gpt_oss.py`, `GptOssExperts._apply_gate`;
TransformerLens 3.9, `components/mlps/gpt_oss_moe.py`, `GptOssExpert.forward`.
"""

from __future__ import annotations

import torch

__all__ = ["activate"]


def activate(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """Return the activations of gate and up projections, all of one shape.

    Args:
        gate: The gate projections.
        up: The up projections.
        alpha: The factor of the gate within the sigmoid.
        limit: The largest gate, and the largest magnitude of up.
    """
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))
