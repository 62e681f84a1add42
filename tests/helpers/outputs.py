"""Load outputs as torch tensors and compare them bit for bit."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[expected.element_size()]
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found.view(integer), expected.contiguous().view(integer))
    )


def load_output(folder) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        loaded = load_file(folder / shard)
        assert all(index["weight_map"][name] == shard for name in loaded)
        tensors.update(loaded)
    assert set(tensors) == set(index["weight_map"])
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["metadata"]["total_size"] == total
    return tensors
