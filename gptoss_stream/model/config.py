"""A gpt-oss model: its configuration, and its tensors by name and axes.

Each tensor has one name and one order of axes here; `formats/` says how each checkpoint format
stores it. Gate and up projection are one tensor, with an axis of their own.

Axes: l layer, e expert, t gate (0) or up (1), n query head, k key/value head, h element of a head,
m hidden size, i intermediate size, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ..errors import ConfigError
from .tensors import ATTENTION_BIASES, MODEL_TENSORS

__all__ = [
    "LAYER_KINDS",
    "ModelConfig",
    "alternating_layers",
    "integer",
    "number",
    "yarn_attention_factor",
]


LAYER_KINDS = ("sliding_attention", "full_attention")
"""What `layer_types` may hold; in the released models they alternate, beginning with the first."""


_LIMITS = {
    "num_layers": 1024,
    "num_experts": 65_536,
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "experts_per_token": 65_536,
}
"""Above these a configuration is damaged or hostile; the released models are far below."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a gpt-oss model, whichever format its checkpoint has.

    `rope` holds the rotary embedding's settings in Hugging Face's words (`rope_type`, `factor`,
    `beta_fast`, `beta_slow`, `truncate`, `original_max_position_embeddings`,
    `attention_factor`). Raises `ConfigError` for numbers that no model can have.
    """

    num_layers: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    sliding_window: int | None
    max_position_embeddings: int
    rope_theta: float
    rope: Mapping[str, Any] = field(repr=False)
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    hidden_act: str = "silu"
    attention_bias: bool = True
    tied_embeddings: bool = False
    unembed_bias: bool = False
    """Whether the checkpoint stores one; it counts as no parameter, being zero."""

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(
                    f"config.json: {name} is {getattr(self, name)}; it must lie in 1 to {limit}"
                )
        windows = {
            "max_position_embeddings": self.max_position_embeddings,
            "sliding_window": 1 if self.sliding_window is None else self.sliding_window,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
        }
        for name, value in windows.items():
            if not value > 0:
                raise ConfigError(f"config.json: {name} is {value}; it must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config.json: {self.num_heads} attention heads cannot share "
                f"{self.num_kv_heads} key/value heads evenly"
            )
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"config.json: {self.experts_per_token} experts per token of "
                f"{self.num_experts} experts"
            )
        if len(self.layer_types) != self.num_layers:
            raise ConfigError(
                f"config.json: {len(self.layer_types)} layer_types for {self.num_layers} layers"
            )

    @property
    def dimensions(self) -> dict[str, int]:
        """The model's sizes by their usual letters."""
        return {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "I": self.intermediate_size,
            "E": self.num_experts,
            "nh": self.num_heads,
            "nk": self.num_kv_heads,
            "hd": self.head_dim,
        }

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis in `MODEL_TENSORS`."""
        return {
            "l": self.num_layers,
            "e": self.num_experts,
            "t": 2,
            "n": self.num_heads,
            "k": self.num_kv_heads,
            "h": self.head_dim,
            "m": self.hidden_size,
            "i": self.intermediate_size,
            "v": self.vocab_size,
        }

    @property
    def rope_type(self) -> str:
        """The kind of rotary embedding, in transformers' words."""
        return str(self.rope.get("rope_type", self.rope.get("type", "default")))

    def has(self, tensor: str) -> bool:
        """Whether this model has a tensor of `MODEL_TENSORS` of its own: where the embeddings are
        tied the unembedding is the embedding, and an absent bias is zero."""
        if tensor == "unembed":
            return not self.tied_embeddings
        if tensor == "unembed_bias":
            return self.unembed_bias
        return self.attention_bias or tensor not in ATTENTION_BIASES

    def instances(self, template: str) -> Iterator[tuple[int, int]]:
        """Yield the (layer, expert) pairs that a name with `{l}` or `{e}` stands for, in order."""
        layers = range(self.num_layers if "{l}" in template else 1)
        experts = range(self.num_experts if "{e}" in template else 1)
        return ((layer, expert) for layer in layers for expert in experts)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; tied embeddings count once."""
        sizes = self.sizes
        return sum(
            prod(sizes[axis] for axis in axes.split())
            for tensor, axes in MODEL_TENSORS.items()
            if self.has(tensor) and tensor != "unembed_bias"
        )


def alternating_layers(num_layers: int) -> tuple[str, ...]:
    """The released models' layer types. A hostile count makes no tuple of that length."""
    count = max(0, min(num_layers, _LIMITS["num_layers"] + 1))
    return tuple(LAYER_KINDS[layer % 2] for layer in range(count))


def yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """Return YaRN's default attention factor, as transformers computes it (`get_mscale`)."""
    factor = number(rope, "factor")
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer of a configuration; raises `ConfigError` where it is absent or something else."""
    value = config.get(key, default)
    if value is None:
        raise ConfigError(f"config.json: {key} is missing")
    if type(value) is not int:
        raise ConfigError(f"config.json: {key} is {str(value)[:40]!r}; it must be an integer")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A number of a configuration, null standing for the default; raises `ConfigError` where it
    is absent or something else."""
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"config.json: {key} is missing")
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ConfigError(f"config.json: {key} is {str(value)[:40]!r}; it must be a number")
    return float(value)
