"""adapter_config.json: ranks, scales, and what cannot be merged.

Source of the keys and formulas: PEFT, `tuners/lora/config.py` and `tuners/lora/layer.py`; of
`lora_B_layout`: unsloth-zoo.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..model.config import number
from .adapter import B_LAYOUTS

__all__ = ["LoraConfig", "parse_config"]

_HARMLESS_INITS = (True, False, None, "true", "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's weights as they are."""

_NESTED_REPEATS = re.compile(r"[*+}][^()]*\)[*+{]")  # (a+)+ takes exponential time

_CHANGED_BASE = "was trained on changed base weights, so that it does not fit the original ones"
_NOT_MERGEABLE = {
    "layer_replication": "repeats layers, which no merge into these weights can do",
    "use_qalora": "is QA-LoRA, which is not merged here",
    "use_bdlora": "is BD-LoRA, which is not merged here",
    "arrow_config": "chooses among adapters for each token (Arrow), which no merge can do",
    "alora_invocation_tokens": "works from certain tokens on only (aLoRA), which no merge can do",
    "kasa_config": "is KaSA, which changes the base weights too",
    "monteclora_config": "is MonteCLoRA, which is not merged here",
    "velora_config": "is VeLoRA, which is not merged here",
    "fan_in_fan_out": "is for transposed layers, which gpt-oss does not have",
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What adapter_config.json says."""

    where: str
    """The file, for messages."""
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rslora: bool
    is_dora: bool
    has_lora_bias: bool
    target_parameters: tuple[str, ...]
    target_modules: tuple[str, ...]
    """Names of modules, or of the last parts of them; empty if they are given in another way."""
    modules_to_save: tuple[str, ...]
    token_indices: Mapping[str, tuple[int, ...]]
    """The tokens whose rows are trained, by the last part of a module's name."""
    peft_version: str | None
    base_model: str | None
    b_layout: str | None
    is_unsloth: bool
    """Whether unsloth has saved it."""

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's adapter."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.rank)

    def alpha_of(self, module: str) -> float:
        """Return alpha of a module's adapter."""
        return self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)

    def scale_of(self, module: str) -> float:
        """Return what `lora_B @ lora_A` is multiplied by: alpha / r, or alpha / sqrt(r)."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.is_rslora else rank)

    def targets_module(self, name: str) -> bool:
        """Return whether `target_modules` is a list that names a module."""
        return _is_named(name, self.target_modules)

    def targets_parameter(self, name: str) -> bool:
        """Return whether `target_parameters` names a parameter."""
        return _is_named(name, self.target_parameters)


def _is_named(name: str, among: Iterable[str]) -> bool:
    """Return whether a name, or its last parts, are among others."""
    return any(name == one or name.endswith(f".{one}") for one in among)


def _pattern_key(patterns: Iterable[str], module: str) -> str:
    """Return the first pattern that matches a module's name, as PEFT's `get_pattern_key`."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def parse_config(config: Mapping[str, Any], where: str) -> LoraConfig:
    """Return what adapter_config.json says.

    Args:
        config: The parsed file.
        where: Its name in messages.

    Raises:
        CheckpointError: If such an adapter cannot be merged.
        ConfigError: If a value cannot be used.
    """
    _refuse(config, where)
    try:
        rank_pattern = {
            key: _rank(config["rank_pattern"], key) for key in _mapping(config, "rank_pattern")
        }
        alpha_pattern = {
            key: number(config["alpha_pattern"], key) for key in _mapping(config, "alpha_pattern")
        }
        for key in (*rank_pattern, *alpha_pattern):
            _check_pattern(key)
        layout = config.get("lora_B_layout")
        if layout not in (None, *B_LAYOUTS):
            raise ConfigError(f"lora_B_layout is {layout!r}; it must be {' or '.join(B_LAYOUTS)}")
        return LoraConfig(
            where=where,
            rank=_rank(config, "r", default=8),
            alpha=number(config, "lora_alpha", 8.0),
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            is_rslora=_flag(config, "use_rslora"),
            is_dora=_flag(config, "use_dora"),
            has_lora_bias=_flag(config, "lora_bias"),
            target_parameters=_texts(config, "target_parameters"),
            target_modules=_target_modules(config),
            modules_to_save=_texts(config, "modules_to_save"),
            token_indices=_token_indices(config),
            peft_version=_text(config, "peft_version"),
            base_model=_text(config, "base_model_name_or_path"),
            b_layout=layout,
            is_unsloth=_is_unsloth(config),
        )
    except ConfigError as error:
        message = str(error).removeprefix("config.json: ")
        raise ConfigError(f"{where}: {message}") from None


def _refuse(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter of another kind, or one that no merge into the original weights can do."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: peft_type is {str(kind)[:40]!r}; only LORA can be merged here"
        )
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise CheckpointError(
            f"{where}: init_lora_weights is {str(init)[:40]!r}: the adapter {_CHANGED_BASE}; save "
            "it again with PEFT's path_initial_model_for_weight_conversion, which converts it"
        )
    for key, why in _NOT_MERGEABLE.items():
        if config.get(key):
            raise CheckpointError(f"{where}: {key} is set: the adapter {why}")


def _is_unsloth(config: Mapping[str, Any]) -> bool:
    """Return whether an adapter looks like one of unsloth's."""
    mapping = config.get("auto_mapping")
    return (isinstance(mapping, Mapping) and bool(mapping.get("unsloth_fixed"))) or str(
        config.get("base_model_name_or_path")
    ).lower().startswith("unsloth/")


def _rank(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a rank: an integer of at least 1."""
    value = config.get(key, default)
    if type(value) is not int or not 1 <= value <= 2**16:
        raise ConfigError(f"{key} is {str(value)[:40]!r}; a rank is an integer from 1 to 65536")
    return value


def _check_pattern(key: str) -> None:
    """Refuse a text that is no regular expression, or one that could take for ever."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what later versions of Python will read otherwise
            re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"pattern {key[:80]!r}: {error}") from None
    if len(key) > 500 or _NESTED_REPEATS.search(key):
        raise ConfigError(f"pattern {key[:80]!r}: too complex; name the modules in a simpler way")


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return an object of the configuration; an empty one if it is absent or null."""
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} is {str(value)[:40]!r}; it must be an object")
    return value


def _texts(config: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Return a list of texts; an empty one if it is absent or null."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise ConfigError(f"{key} is {str(value)[:40]!r}; it must be a list of names")
    return tuple(value)


def _target_modules(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the targeted modules if they are a list for all layers, without exceptions."""
    value = config.get("target_modules")
    if not isinstance(value, list) or config.get("exclude_modules"):
        return ()
    if config.get("layers_to_transform") is not None:
        return ()
    return _texts(config, "target_modules")


def _text(config: Mapping[str, Any], key: str) -> str | None:
    """Return a text, or None without one."""
    value = config.get(key)
    return value if isinstance(value, str) and value else None


def _flag(config: Mapping[str, Any], key: str) -> bool:
    """Return true or false; false if it is absent or null."""
    value = config.get(key)
    if value not in (None, True, False):
        raise ConfigError(f"{key} is {str(value)[:40]!r}; it must be true or false")
    return bool(value)


def _token_indices(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the trained tokens of each module; a list is for the embedding."""
    value = config.get("trainable_token_indices") or {}
    if isinstance(value, list):
        value = {"embed_tokens": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"trainable_token_indices is {str(value)[:40]!r}; it must be a list")
    found: dict[str, tuple[int, ...]] = {}
    for module, tokens in value.items():
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ConfigError(f"trainable_token_indices: {str(tokens)[:40]!r} is no list of tokens")
        if len(set(tokens)) < len(tokens):
            raise ConfigError(f"trainable_token_indices names a token of {module} twice")
        name = str(module).rpartition(".")[2]
        if name in found:
            raise ConfigError(f"trainable_token_indices names {name} twice")
        found[name] = tuple(tokens)
    return found
