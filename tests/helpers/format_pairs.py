"""The pairs of formats that can be converted, and variants of random models to convert."""

from __future__ import annotations

import torch

import gptoss_stream

FORMATS = gptoss_stream.formats.names()
MXFP4_FORMATS = ("hf-mxfp4", "openai")
ALWAYS_STORED = ("openai", "transformer-lens")
"""Formats that always store the head and the biases."""
ALL_PAIRS = [(a, b) for a in FORMATS for b in FORMATS]
PAIRS = [(a, b) for a, b in ALL_PAIRS if b not in MXFP4_FORMATS or a in MXFP4_FORMATS]
"""All pairs but those in which floats are encoded, so that values change."""

# All sizes differ, except for one expert, one key/value head, and in the last variant equal sizes.
VARIANTS = {
    "bf16": (torch.bfloat16, {}),
    "f32, one expert": (torch.float32, {"num_local_experts": 1, "num_experts_per_tok": 1}),
    "bf16, tied, no biases": (
        torch.bfloat16,
        {"tie_word_embeddings": True, "attention_bias": False},
    ),
    "f32, tied": (torch.float32, {"tie_word_embeddings": True}),
    "bf16, no biases, H = I = nh * hd": (
        torch.bfloat16,
        {"attention_bias": False, "hidden_size": 96, "num_key_value_heads": 1},
    ),
}
