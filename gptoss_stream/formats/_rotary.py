"""The settings of the rotary embedding in Hugging Face's config.json, as transformers 5 reads them.

Older programs write `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`. Both
are read, and both are written. Source: transformers 5.24, `modeling_rope_utils.py`
(`RotaryEmbeddingConfigMixin`, `ROPE_INIT_FUNCTIONS`) and `configuration_gpt_oss.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..model.config import LAYER_KINDS, ModelConfig, integer, number, yarn_attention_factor

__all__ = ["parse_rope", "refuse_frequencies", "rope_config"]

_DEFAULT_THETA = 150_000.0
_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""The defaults of transformers' `GptOssConfig`."""

_LENGTH = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"
_BETAS = ("beta_fast", "beta_slow")


def parse_rope(config: Mapping[str, Any], head_dim: int) -> tuple[float, dict[str, Any]]:
    """Return the base of the rotary embedding and its settings.

    Args:
        config: The configuration, with `rope_scaling`, `rope_parameters` or neither.
        head_dim: The number of elements of a head.

    Returns:
        `ModelConfig.rope_theta` and `ModelConfig.rope`. The settings are complete: what
        transformers takes from other entries of the configuration is among them.

    Raises:
        ConfigError: For settings that transformers refuses or cannot compute, and for those that
            contradict themselves.
    """
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim is {head_dim}; rotation needs an even one")
    key, found = _chosen(config)
    nested = [k for k, value in found.items() if k in LAYER_KINDS or isinstance(value, dict)]
    if nested:
        raise ConfigError(
            f"config.json: {key} has settings of their own for {nested[0]!r}; transformers cannot "
            "run gpt-oss with rotary embeddings that differ between layers: give one object for all"
        )
    rope_type = _rope_type(key, found)
    theta = _theta(config, found)
    _refuse_partial(rope_type, _partial(config, found))
    parsers = {
        "default": _parse_default,
        "linear": _parse_scaled,
        "dynamic": _parse_dynamic,
        "yarn": _parse_yarn,
        "llama3": _parse_llama3,
        "longrope": _parse_longrope,
        "proportional": _parse_proportional,
    }
    if rope_type not in parsers:
        raise ConfigError(
            f"config.json: {key} has the type {rope_type[:40]!r}, which transformers does not "
            f"compute for gpt-oss; it computes {', '.join(parsers)}"
        )
    rope = {"rope_type": rope_type, **parsers[rope_type](config, found, head_dim)}
    if rope_type == "yarn":
        refuse_frequencies(rope, theta)
    return theta, rope


def _chosen(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the object that transformers takes, and its key.

    `rope_scaling` is taken first, unless it is absent, null or empty. `rope_parameters` that is
    empty turns scaling off, but null and absent ones mean the defaults.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), (dict, type(None))):
            raise ConfigError(f"config.json: {key} is not an object")
    if config.get("rope_scaling"):
        return "rope_scaling", config["rope_scaling"]
    parameters = config.get("rope_parameters")
    return "rope_parameters", _DEFAULT_ROPE if parameters is None else parameters


def _rope_type(key: str, found: Mapping[str, Any]) -> str:
    """Return the type; `type` is the old spelling of `rope_type`."""
    types = [found[name] for name in ("rope_type", "type") if name in found]
    rope_type = types[0] if types else "default"
    if not isinstance(rope_type, str):
        raise ConfigError(f"config.json: {key} has the type {str(rope_type)[:40]!r}, not a name")
    if types[1:] not in ([], [rope_type]):
        raise ConfigError(
            f"config.json: {key} has rope_type {rope_type[:40]!r} and type {str(types[1])[:40]!r}; "
            "remove the wrong one"
        )
    if rope_type == "default" and "factor" in found:
        said = 'rope_type "default"' if types else "no rope_type"
        raise ConfigError(
            f"config.json: {key} has a factor and {said}, with which transformers scales nothing; "
            'add "rope_type": "yarn", or remove the factor'
        )
    return rope_type


def _theta(config: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Return the base; the one among the settings counts before the one beside them."""
    place = found if "rope_theta" in found else config
    if place.get("rope_theta", _DEFAULT_THETA) is None:
        raise ConfigError("config.json: rope_theta is null; give the base of the rotary embedding")
    return number(place, "rope_theta", _DEFAULT_THETA)


def _partial(config: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    """Return the part of each head to rotate; the one among the settings counts first."""
    if _PARTIAL in found:
        return number(found, _PARTIAL)
    return number(config, _PARTIAL, 1.0)


def _refuse_partial(rope_type: str, partial: float) -> None:
    """Refuse to rotate a part of each head, which gpt-oss's code in transformers cannot do."""
    if rope_type != "proportional" and partial != 1:
        raise ConfigError(
            f"config.json: {_PARTIAL} is {partial:g}, and transformers' gpt-oss always rotates "
            "whole heads; remove it, or set it to 1"
        )


def _parse_default(
    config: Mapping[str, Any], found: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """Return no settings: nothing is scaled."""
    return {}


def _parse_scaled(
    config: Mapping[str, Any], found: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """Return the settings of linear scaling."""
    return {"factor": _positive(found, "factor")}


def _parse_dynamic(
    config: Mapping[str, Any], found: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """Return the settings of dynamic NTK scaling."""
    factor = _positive(found, "factor")
    if head_dim == 2 or factor > 2**24:
        raise ConfigError(
            f"config.json: dynamic scaling cannot be computed with head_dim {head_dim} and factor "
            f"{factor:g}"
        )
    return {"factor": factor}


def _parse_yarn(
    config: Mapping[str, Any], found: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """Return the settings of YaRN."""
    length = _original_length(config, found)
    if "factor" in found and found["factor"] is None:
        factor = integer(config, "max_position_embeddings", 131_072) / length
    else:
        factor = _positive(found, "factor")
    truncate = found.get("truncate", True)
    if not isinstance(truncate, (bool, type(None))):
        raise ConfigError("config.json: truncate of the rotary embedding is neither true nor false")
    return {
        "factor": factor,
        "beta_fast": number(found, "beta_fast", 32.0) or 32.0,
        "beta_slow": number(found, "beta_slow", 1.0) or 1.0,
        "truncate": bool(truncate),
        _LENGTH: length,
        **_numbers(found, "attention_factor", "mscale", "mscale_all_dim"),
    }


def _parse_llama3(
    config: Mapping[str, Any], found: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """Return the settings of Llama 3's scaling."""
    names = ("factor", "low_freq_factor", "high_freq_factor")
    return {
        **{name: _positive(found, name) for name in names},
        _LENGTH: _original_length(config, found),
    }


def _parse_longrope(
    config: Mapping[str, Any], found: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """Return the settings of LongRoPE, with an attention factor.

    Versions of transformers derive that factor from different lengths, unless it is given.
    """
    rope: dict[str, Any] = {}
    for name in ("short_factor", "long_factor"):
        values = found.get(name)
        if not isinstance(values, list) or len(values) != head_dim // 2:
            raise ConfigError(f"config.json: {name} is not a list of {head_dim // 2} numbers")
        rope[name] = [_positive({name: value}, name) for value in values]
    length = rope[_LENGTH] = _original_length(config, found)
    factor = number(found, "factor", integer(config, "max_position_embeddings", 131_072) / length)
    by_length = 1.0
    if factor > 1:
        if length == 1:
            raise ConfigError(f"config.json: {_LENGTH} is 1; it must be larger")
        by_length = math.sqrt(1 + math.log(factor) / math.log(length))
    return {
        **rope,
        "factor": factor,
        "attention_factor": number(found, "attention_factor", by_length),
    }


def _parse_proportional(
    config: Mapping[str, Any], found: Mapping[str, Any], head_dim: int
) -> dict[str, Any]:
    """Return the settings of the proportional type, which rotates a part of each head."""
    partial = _partial(config, found)
    if not 0 <= partial <= 1:
        raise ConfigError(f"config.json: {_PARTIAL} is {partial:g}; it must be 0 to 1")
    factor = _positive(found, "factor") if "factor" in found else 1.0
    return {_PARTIAL: partial, "factor": factor}


def _original_length(config: Mapping[str, Any], found: Mapping[str, Any]) -> int:
    """Return the context length before scaling.

    transformers takes it from the top level of the configuration first, then from the settings,
    and if neither has it, it takes `max_position_embeddings`.
    """
    for place in (config, found):
        if _LENGTH in place and place[_LENGTH] is None:
            raise ConfigError(f"config.json: {_LENGTH} is null; remove it, or give the number")
    lengths = [integer(place, _LENGTH) for place in (config, found) if _LENGTH in place]
    lengths = lengths or [integer(config, "max_position_embeddings", 131_072)]
    if min(lengths) < 1:
        raise ConfigError(f"config.json: {_LENGTH} is {min(lengths)}; it must be positive")
    return lengths[0]


def _positive(found: Mapping[str, Any], key: str) -> float:
    """Return a number that is there and positive."""
    value = number(found, key)
    if value <= 0:
        raise ConfigError(
            f"config.json: {key} of the rotary embedding is {value:g}; it must be positive"
        )
    return value


def _numbers(found: Mapping[str, Any], *names: str) -> dict[str, float]:
    """Return the numbers that are there and not null."""
    return {name: number(found, name) for name in names if found.get(name) is not None}


def refuse_frequencies(rope: Mapping[str, Any], theta: float) -> None:
    """Refuse settings of YaRN from which no frequencies or attention factor can be computed.

    Args:
        rope: Settings as in `ModelConfig.rope`.
        theta: The base of the rotary embedding.

    Raises:
        ConfigError: If transformers' formulas fail with them, or give what is not finite.
    """
    try:
        computed = [
            yarn_attention_factor(rope),
            *(math.log(rope[_LENGTH] / (rope[key] * 2 * math.pi)) for key in _BETAS),
            1 / math.log(theta),
        ]
    except (ValueError, ZeroDivisionError):
        computed = [math.inf]
    if rope["factor"] <= 0 or not all(map(math.isfinite, computed)):
        names = ("factor", *_BETAS, _LENGTH, "mscale", "mscale_all_dim")
        values = ", ".join(f"{name} {rope[name]:g}" for name in names if name in rope)
        raise ConfigError(
            f"config.json: YaRN cannot be computed with {values} and rope_theta {theta:g}"
        )


def rope_config(model: ModelConfig) -> dict[str, Any]:
    """Return the entries of config.json for a model's rotary embedding, in both spellings.

    transformers 4 and other programs read `rope_theta` and `rope_scaling`. transformers 5 reads
    `rope_parameters`, or `rope_scaling` where that is there: they say the same.
    """
    rope = dict(model.rope)
    entries: dict[str, Any] = {
        "rope_theta": model.rope_theta,
        "rope_scaling": rope,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
    }
    if model.rope_type == "longrope":
        entries[_LENGTH] = rope[_LENGTH]  # where transformers 4 looks for it
    return entries
