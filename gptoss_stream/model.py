"""What a gpt-oss model is: its numbers, and its tensors by name and shape.

Model tensors carry Hugging Face's names without the leading `model.`, with the experts taken
apart: `layers.3.mlp.experts.7.gate_up_proj` is the matrix of one expert, its rows alternating
between gate and up. Matrices are `[out, in]`. How a checkpoint stores them is a source's matter
(`sources/`), what an output makes of them a layout's (`layouts/`).

Letters: V vocabulary, H hidden size, I intermediate size, E experts, nh query heads,
nk key/value heads, hd head dimension, l layer, e expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from .errors import ConfigError

__all__ = [
    "LAYER_KINDS",
    "MODEL_TENSORS",
    "ModelConfig",
    "alternating_layers",
    "integer",
    "number",
]

MODEL_TENSORS: Mapping[str, str] = {
    "embed_tokens.weight": "V H",
    "layers.{l}.input_layernorm.weight": "H",
    "layers.{l}.self_attn.q_proj.weight": "nh*hd H",
    "layers.{l}.self_attn.q_proj.bias": "nh*hd",
    "layers.{l}.self_attn.k_proj.weight": "nk*hd H",
    "layers.{l}.self_attn.k_proj.bias": "nk*hd",
    "layers.{l}.self_attn.v_proj.weight": "nk*hd H",
    "layers.{l}.self_attn.v_proj.bias": "nk*hd",
    "layers.{l}.self_attn.o_proj.weight": "H nh*hd",
    "layers.{l}.self_attn.o_proj.bias": "H",
    "layers.{l}.self_attn.sinks": "nh",
    "layers.{l}.post_attention_layernorm.weight": "H",
    "layers.{l}.mlp.router.weight": "E H",
    "layers.{l}.mlp.router.bias": "E",
    "layers.{l}.mlp.experts.{e}.gate_up_proj": "2*I H",
    "layers.{l}.mlp.experts.{e}.gate_up_proj_bias": "2*I",
    "layers.{l}.mlp.experts.{e}.down_proj": "H I",
    "layers.{l}.mlp.experts.{e}.down_proj_bias": "H",
    "norm.weight": "H",
    "lm_head.weight": "V H",
}
"""Every tensor of the model and its shape, for each layer `{l}` and expert `{e}`."""

LAYER_KINDS = ("sliding_attention", "full_attention")
"""What `layer_types` may hold; in the released models they alternate, beginning with the first."""

_ATTENTION_BIASES = frozenset(
    f"layers.{{l}}.self_attn.{which}_proj.bias" for which in ("q", "k", "v", "o")
)

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
        """The letters that shapes are written in."""
        return {
            "V": self.vocab_size,
            "H": self.hidden_size,
            "I": self.intermediate_size,
            "E": self.num_experts,
            "nh": self.num_heads,
            "nk": self.num_kv_heads,
            "hd": self.head_dim,
        }

    def size(self, product: str) -> int:
        """The value of a product of letters and numbers, such as "2*I"."""
        letters = self.dimensions
        return prod(letters[f] if f in letters else int(f) for f in product.split("*"))

    def shape(self, letters: str) -> tuple[int, ...]:
        """The value of a shape such as "nh*hd H"."""
        return tuple(self.size(product) for product in letters.split())

    def has(self, model_tensor: str) -> bool:
        """Whether this model has a tensor of its own, given by its name in `MODEL_TENSORS`."""
        if self.tied_embeddings and model_tensor == "lm_head.weight":
            return False
        return self.attention_bias or model_tensor not in _ATTENTION_BIASES

    def instances(self, template: str) -> Iterator[tuple[int, int]]:
        """The (layer, expert) pairs that a name with `{l}` or `{e}` stands for, in order."""
        layers = range(self.num_layers if "{l}" in template else 1)
        experts = range(self.num_experts if "{e}" in template else 1)
        return ((layer, expert) for layer in layers for expert in experts)

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; tied embeddings count once."""
        return sum(
            prod(self.shape(letters))
            * (self.num_layers if "{l}" in name else 1)
            * (self.num_experts if "{e}" in name else 1)
            for name, letters in MODEL_TENSORS.items()
            if self.has(name)
        )


def alternating_layers(num_layers: int) -> tuple[str, ...]:
    """The released models' layer types. A hostile count makes no tuple of that length."""
    count = max(0, min(num_layers, _LIMITS["num_layers"] + 1))
    return tuple(LAYER_KINDS[layer % 2] for layer in range(count))


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
