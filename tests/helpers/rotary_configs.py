"""Configurations of a small gpt-oss with random rotary settings, valid and invalid ones."""

from __future__ import annotations

from random import Random
from typing import Any

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
BASE = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 259,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"],
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "rope_theta": 150000,
    "rope_scaling": dict(YARN),
}

_TYPES = (*["yarn"] * 8, "default", "linear", "dynamic", "llama3", "longrope", "proportional", "su")
_ODD = (None, 0, -1, "32", True, 1e-3, 1e30, 4096)

# The chance that an entry is there, and its usual values.
_ENTRIES: dict[str, tuple[float, tuple[Any, ...]]] = {
    "rope_type": (0.95, _TYPES),
    "type": (0.05, _TYPES),
    "factor": (0.85, (32.0, 16, 8.0, 64.0, 2, 1.0)),
    "beta_fast": (0.3, (32.0, 16, 8.0, 0, None)),
    "beta_slow": (0.3, (1.0, 2, 0, None)),
    "truncate": (0.4, (True, False, None)),
    "original_max_position_embeddings": (0.7, (4096, 2048, 8192, 256)),
    "attention_factor": (0.2, (1.0, 1.5, 2, None)),
    "mscale": (0.2, (1.0, 0.5, 0, 2, None)),
    "mscale_all_dim": (0.2, (1.0, 0.5, 0, 2, None)),
    "partial_rotary_factor": (0.05, (1.0, 1, 0.5)),
    "rope_theta": (0.2, (150000.0, 10000, 5e5)),
    "low_freq_factor": (0.2, (1.0, 2)),
    "high_freq_factor": (0.2, (4.0, 8)),
    "short_factor": (0.2, ([1.0 + 0.5 * i for i in range(8)],)),
    "long_factor": (0.2, ([2.0] * 8, [2.0] * 4)),
}


def _settings(source: Random) -> dict[str, Any]:
    """Return random settings, of which one in 25 is of an odd value or type."""
    return {
        name: source.choice(_ODD if source.random() < 0.04 else values)
        for name, (chance, values) in _ENTRIES.items()
        if source.random() < chance
    }


def mutated(source: Random) -> dict[str, Any]:
    """Return a random configuration."""
    config = dict(BASE)
    nested = {"full_attention": dict(YARN), "sliding_attention": {"rope_type": "default"}}
    for name, chance in (("rope_theta", 0.3), ("rope_scaling", 0.5)):
        if source.random() < chance:
            del config[name]
    for name, other in (("rope_scaling", [{}, None, "yarn"]), ("rope_parameters", [{}, nested])):
        if source.random() < 0.5:
            is_usual = source.random() < 0.9
            config[name] = _settings(source) if is_usual else source.choice(other)
    others: dict[str, tuple[Any, ...]] = {
        "rope_theta": (10000.0, 1e6, None, 1, 0, "1e5"),
        "original_max_position_embeddings": (2048, 8192, None, 0),
        "partial_rotary_factor": (1.0, 0.5, None),
        "max_position_embeddings": (2048, 4096, None),
        "head_dim": (8, 32, 64, 15, None),
        "num_experts": (4, 3),
        "experts_per_token": (2, 4),
        "attention_bias": (False, None),
        "layer_types": (None, ["full_attention"] * 2, ["chunked", "full_attention"]),
        "sliding_window": (None, 64),
    }
    for name, values in others.items():
        if source.random() < 0.04:
            config[name] = source.choice(values)
    for name in ("num_local_experts", "head_dim", "num_key_value_heads"):
        if source.random() < 0.02:
            config.pop(name, None)
    return config
