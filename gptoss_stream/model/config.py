"""The configuration of a gpt-oss model, whichever format its checkpoint has.

Configuration files differ between formats, and each format reads them into a `ModelConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from .._utils.messages import counted, summary
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
"""The kinds of layers; in the released models they alternate, beginning with the first."""

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
"""The largest values that are accepted. The released models are far below; a configuration above
them is damaged or hostile."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The sizes and settings of a gpt-oss model.

    Raises:
        ConfigError: For values that no model can have.
    """

    num_layers: int
    """The layers."""
    num_experts: int
    """The experts of each layer."""
    experts_per_token: int
    """How many of them the router picks for a token."""
    vocab_size: int
    """The rows of the embedding, which may be more than the tokenizer has tokens."""
    hidden_size: int
    """The width of the residual stream."""
    intermediate_size: int
    """The width of an expert: the rows of gate, and of up."""
    num_heads: int
    """The attention heads, for queries."""
    num_kv_heads: int
    """The heads for keys and values, each of which several attention heads share."""
    head_dim: int
    """The width of a head."""
    layer_types: tuple[str, ...]
    """One of `LAYER_KINDS` for each layer."""
    sliding_window: int | None
    """The tokens that layers of the kind "sliding_attention" see; None for all."""
    max_position_embeddings: int
    """The longest sequence, in tokens."""
    rope_theta: float
    """The base of the rotary embedding's frequencies."""
    rope: Mapping[str, Any]
    """The rotary embedding's settings, named as in Hugging Face's config.json, complete and
    checked. For YaRN: `rope_type`, `factor`, `beta_fast`, `beta_slow`, `truncate`,
    `original_max_position_embeddings`, and where set `attention_factor` or `mscale` with
    `mscale_all_dim`."""
    rms_norm_eps: float = 1e-5
    """What is added to the mean square in a norm."""
    swiglu_limit: float = 7.0
    """What gate (from above) and up (from both sides) are clamped to."""
    swiglu_alpha: float = 1.702
    """The factor within the sigmoid of gate."""
    hidden_act: str = "silu"
    """The activation as configurations name it."""
    attention_bias: bool = True
    """Whether the attention has biases."""
    tied_embeddings: bool = False
    """Whether the embedding is the unembedding too."""
    unembed_bias: bool = False
    """Whether the unembedding has a bias. It is zero and not counted among the parameters."""

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ConfigError(
                    f"config.json: {name} is {getattr(self, name)}; it must be 1 to {limit}"
                )
        positive = {
            "max_position_embeddings": self.max_position_embeddings,
            "sliding_window": 1 if self.sliding_window is None else self.sliding_window,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
        }
        for name, value in positive.items():
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

    def __repr__(self) -> str:
        return summary(
            self,
            f"{counted(self.num_layers, 'layer')}, {counted(self.num_experts, 'expert')} "
            f"({self.experts_per_token} for each token), {self.num_parameters:,} parameters",
        )

    @property
    def dimensions(self) -> dict[str, int]:
        """The model's sizes by the letters used in papers and code, as `inspect` prints them."""
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
        """The kind of rotary embedding, named as in transformers: yarn, default or another."""
        return str(self.rope["rope_type"])

    def has(self, tensor: str) -> bool:
        """Return whether the model has a tensor of its own, which a checkpoint can store.

        Tied embeddings are one tensor, `embed`. A model without biases has no bias tensors.

        Args:
            tensor: A name in `MODEL_TENSORS`.
        """
        if tensor == "unembed":
            return not self.tied_embeddings
        if tensor == "unembed_bias":
            return self.unembed_bias
        return self.attention_bias or tensor not in ATTENTION_BIASES

    def instances(self, template: str) -> Iterator[tuple[int, int]]:
        """Yield the (layer, expert) pairs that a stored name is used for, in order.

        Args:
            template: A name with `{l}` for the layer and `{e}` for the expert. Without one of
                them, that number is always 0.
        """
        layers = range(self.num_layers if "{l}" in template else 1)
        experts = range(self.num_experts if "{e}" in template else 1)
        return ((layer, expert) for layer in layers for expert in experts)

    @property
    def num_parameters(self) -> int:
        """The number of parameters; tied embeddings are counted once."""
        sizes = self.sizes
        return sum(
            prod(sizes[axis] for axis in axes.split())
            for tensor, axes in MODEL_TENSORS.items()
            if self.has(tensor) and tensor != "unembed_bias"
        )


def alternating_layers(num_layers: int) -> tuple[str, ...]:
    """Return the layer types of a released model with that number of layers.

    A number beyond the limit gives a shorter tuple, so that a hostile one takes no memory.
    """
    count = max(0, min(num_layers, _LIMITS["num_layers"] + 1))
    return tuple(LAYER_KINDS[layer % 2] for layer in range(count))


def yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """Return the factor by which YaRN scales cosines and sines.

    It is `attention_factor` if that is set, else it follows from `factor` and, where both are set
    and not zero, `mscale` and `mscale_all_dim`. Source: transformers, `modeling_rope_utils.py`
    (`_compute_yarn_parameters`).

    Args:
        rope: Settings as in `ModelConfig.rope`, for YaRN.
    """
    if rope.get("attention_factor") is not None:
        return number(rope, "attention_factor")
    factor = number(rope, "factor")
    scales = [number(rope, key, 0.0) for key in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return _mscale(factor, 1.0)
    return _mscale(factor, scales[0]) / _mscale(factor, scales[1])


def _mscale(factor: float, scale: float) -> float:
    """Return YaRN's attention factor for a scaling factor, with the logarithm scaled."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return an integer of a configuration.

    Args:
        config: The configuration.
        key: The integer's key in it.
        default: Its value if the key is absent; None if it may not be absent.

    Raises:
        ConfigError: If the key is absent or its value is not an integer, or is one that floats
            cannot hold.
    """
    value = config.get(key, default)
    if value is None:
        raise ConfigError(f"config.json: {key} is {'null' if key in config else 'missing'}")
    if type(value) is not int:
        raise ConfigError(f"config.json: {key} is {str(value)[:40]!r}; it must be an integer")
    if abs(value) > 2**53:
        raise ConfigError(f"config.json: {key} is {str(value)[:40]}, beyond what programs compute")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return a number of a configuration as a float.

    Args:
        config: The configuration.
        key: The number's key in it.
        default: Its value if the key is absent or null; None if it may not be.

    Raises:
        ConfigError: If the key is absent or its value is not a finite number.
    """
    value = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ConfigError(f"config.json: {key} is {'null' if key in config else 'missing'}")
    if type(value) not in (int, float) or not abs(value) < 1e300:
        raise ConfigError(f"config.json: {key} is {str(value)[:40]!r}; it must be a number")
    return float(value)
