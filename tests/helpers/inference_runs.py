"""Run the models of transformers and of TransformerLens alike."""

from __future__ import annotations

from typing import Any

import torch

TOKENS = torch.arange(120).reshape(2, 60) * 25 % 101
"""A batch that is longer than the sliding windows of 8 and 16."""


def logits(model: Any, tokens: torch.Tensor = TOKENS, **inputs: Any) -> torch.Tensor:
    """Return the logits [batch, position, vocabulary] of either kind of model."""
    with torch.no_grad():
        found = model(tokens, **inputs)
    return found if isinstance(found, torch.Tensor) else found.logits


def is_hooked(model: Any) -> bool:
    """Return whether a model is TransformerLens's."""
    return hasattr(model, "run_with_cache")
