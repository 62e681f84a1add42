"""What transformers 5 reads from a config.json, and computes: the judge of what is written."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssRotaryEmbedding,
    apply_rotary_pos_emb,
)

from gptoss_stream.formats._hugging_face_config import config_files
from gptoss_stream.model.config import ModelConfig
from gptoss_stream.tensors.dtypes import DType

KEPT = {"initializer_range", "attention_dropout", "router_aux_loss_coef", "output_router_logits"}
KEPT |= {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters"}
ENTRIES = sorted(GptOssConfig.__annotations__.keys() - KEPT)
"""The entries that the package reads; the others are written as they are."""


def written(model: ModelConfig, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json that is written for a source's configuration."""
    files = config_files(model, copy.deepcopy(config), DType.BF16, partial=False)
    return json.loads(files["config.json"])


def judged(config: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Return what transformers computes for a configuration, and the entries that it reads."""
    read = GptOssConfig.from_dict(copy.deepcopy(config))
    rotary = GptOssRotaryEmbedding(read)
    initial = rotary.inv_freq.clone()
    positions = torch.tensor([[0, 1, 1000, read.max_position_embeddings + 5]])
    parts = rotary(torch.zeros(1), positions)
    if any(part.shape[-1] * 2 != read.head_dim for part in parts):
        raise ValueError("the rotary embedding does not have the size of the heads")
    heads = torch.zeros(1, 1, positions.shape[1], read.head_dim)
    apply_rotary_pos_emb(heads, heads, *parts)
    scaling = torch.tensor(rotary.attention_scaling, dtype=torch.float64)
    return [initial, scaling, *parts], {name: getattr(read, name) for name in ENTRIES}


def differences(config: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return what transformers computes or reads otherwise from two configurations, bit by bit."""
    (tensors, entries), (others, other_entries) = judged(config), judged(other)
    found = [name for name in ENTRIES if entries[name] != other_entries[name]]
    for number, (one, two) in enumerate(zip(tensors, others, strict=True)):
        if not torch.allclose(one, two, rtol=0, atol=0, equal_nan=True):
            found.append(f"tensor {number}")
    return found
