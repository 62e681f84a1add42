"""The names of a checkpoint's tensors without the wrappers that other programs put around a model.

Modules that wrap a model add to the names of its tensors: `module.` (DistributedDataParallel),
`_orig_mod.` (torch.compile), `base_model.model.` (PEFT), `_checkpoint_wrapped_module.` and
`_fsdp_wrapped_module.` within the names. A model without its head has names without `model.`, and
in a vision-language model those of the language model begin with `language_model.` or the like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from .._utils.messages import counted, listed
from ..checkpoint.metadata import CheckpointInfo
from ..errors import CheckpointError
from ..tensors.raw_tensor import RawTensor
from ._table import Table

__all__ = ["Unwrapped", "inner_config", "unwrap"]

_ADAPTER = re.compile(
    r"(^|\.)(base_layer|original_module|modules_to_save"
    r"|lora_(A|B|a|b|down|up|embedding_A|embedding_B|magnitude_vector))(\.|$)"
)
_WRAPPERS = (
    "_orig_mod.",
    "_checkpoint_wrapped_module.",
    "_checkpoint_wrapped_model.",
    "_fsdp_wrapped_module.",
    "_fpw_module.",
)
"""Parts of names that can be anywhere in them and never belong to a model."""
_INNER = ("embed_tokens.", "layers.", "norm.")
"""How names begin in Hugging Face's model without a head, whose names lack `model.`."""


class Unwrapped(NamedTuple):
    """A checkpoint whose tensors have the names of a format."""

    info: CheckpointInfo
    """The checkpoint. The keys of `tensors` are the names without wrappers, and `RawTensor.name` is
    still the stored name."""
    outside: tuple[str, ...]
    """Stored names of tensors that are not part of the gpt-oss."""


def unwrap(info: CheckpointInfo, tables: Mapping[str, Table]) -> Unwrapped:
    """Return a checkpoint under the names of a format, without a wrapper that all names have.

    Args:
        info: The checkpoint.
        tables: The tables of all formats.

    Raises:
        CheckpointError: If it has an adapter that is not merged, or if only some names have the
            wrapper.
    """
    _refuse_adapter(info)
    tensors, removed = _without_wrappers(info)
    model_type = info.config.get("model_type")
    found = inner_config(info.config) if model_type != "gpt_oss" else None
    if found is None and model_type not in (None, "gpt_oss"):
        return Unwrapped(replace(info, tensors=tensors), ())  # of another kind: see `_unknown`
    anchors = {row.stored for table in tables.values() for row in table if row.tensor == "embed"}
    prefix, lacks_model = _prefix(info, tensors, anchors)
    outside = [name for name in tensors if not name.startswith(prefix)]
    notes = [*info.notes]
    is_inside = prefix or lacks_model or "model.embed_tokens.weight" in tensors
    if found is not None and is_inside:
        key, config = found
        info = replace(info, configs={**info.configs, info.config_name: config})
        begin = prefix if prefix or lacks_model else "model."
        outside = [name for name in tensors if not name.startswith((begin, "lm_head."))]
        notes.append(
            f"the gpt-oss inside is read: {key} of config.json, and the tensors of {begin}*"
            + (f"; {counted(len(outside), 'tensor')} beside it not" if outside else "")
        )
    elif outside:
        raise CheckpointError(
            f"{info.location}: tensor names begin with {prefix!r}, but not all of them: "
            f"{listed([*map(repr, outside)], 3)}; save the model again without its wrapper"
        )
    elif prefix:
        removed = [prefix, *removed]
    if removed:
        notes.append(f"tensor names are read without {' and '.join(map(repr, removed))}")
    skipped = tuple(sorted(tensors.pop(name).name for name in outside))
    named: dict[str, RawTensor] = {}
    for name, raw in tensors.items():
        short = name.removeprefix(prefix)
        if lacks_model and short.startswith(_INNER):
            short = "model." + short
        _refuse_copy(info, named.get(short), raw)
        named[short] = raw
    if lacks_model:
        notes.append("tensor names are read with 'model.' before them, which they lack")
    return Unwrapped(replace(info, tensors=named, notes=tuple(notes)), skipped)


def _refuse_adapter(info: CheckpointInfo) -> None:
    """Refuse tensors of an adapter, and tensors of a base model that were saved with one."""
    for name, raw in info.tensors.items():
        if _ADAPTER.search(name):
            raise CheckpointError(
                f"{info.location.display_path(raw.shard)}: tensor {name!r} is of a LoRA adapter "
                "that is not merged; save the adapter by itself (PEFT: save_pretrained) and merge "
                "it into its base model with --adapter"
            )


def _without_wrappers(info: CheckpointInfo) -> tuple[dict[str, RawTensor], list[str]]:
    """Return the tensors by their names without `_WRAPPERS`, and those that were found."""
    tensors: dict[str, RawTensor] = {}
    removed: list[str] = []
    for name, raw in info.tensors.items():
        short = name
        for wrapper in _WRAPPERS:
            if wrapper in short:
                short = ".".join(part for part in short.split(".") if part + "." != wrapper)
                removed += [wrapper] if wrapper not in removed else []
        _refuse_copy(info, tensors.get(short), raw)
        tensors[short] = raw
    return tensors, removed


def _refuse_copy(info: CheckpointInfo, one: RawTensor | None, other: RawTensor) -> None:
    """Refuse two tensors whose names differ only in a wrapper."""
    if one is not None:
        raise CheckpointError(
            f"{info.location}: tensors {one.name!r} and {other.name!r} have the same name "
            "without wrappers; remove one of them"
        )


def _prefix(
    info: CheckpointInfo, tensors: Mapping[str, RawTensor], anchors: set[str]
) -> tuple[str, bool]:
    """Return what is before the names of the model, and whether they lack `model.` after it.

    It is what is before the embedding's name, which every format has, and before that of sinks.
    """
    with_model, lacking = (
        {
            name.removesuffix(anchor)
            for name in tensors
            for anchor in names
            if name == anchor or name.endswith("." + anchor)
        }
        for names in (anchors, {"embed_tokens.weight"})
    )
    # Other parts of a model, such as a vision tower, may have an embedding, but no sinks.
    sinks = [name for name in tensors if name.endswith("attn.sinks")]
    choices = [
        ({p for p in found if any(name.startswith(p) for name in sinks)}, lacks_model)
        for found, lacks_model in ((with_model, False), (lacking, True))
    ]
    choices += [(with_model, False), (lacking, True)]
    prefixes, lacks_model = next((choice for choice in choices if choice[0]), (set(), False))
    if "" in prefixes or not prefixes:
        return "", lacks_model
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{info.location}: more than one model is in it, below "
            f"{listed([*map(repr, sorted(prefixes))], 3)}; keep the tensors of one"
        )
    return prefixes.pop(), lacks_model


def inner_config(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the configuration of a gpt-oss inside another model, and its key.

    Returns:
        None if there is none, or more than one.
    """
    found = [*_gpt_oss_configs(config, "")]
    if len(found) != 1:
        return None
    key, inner = found[0]
    outer = {key: config[key] for key in ("quantization_config",) if config.get(key) is not None}
    return key, {**outer, **inner}


def _gpt_oss_configs(config: Mapping[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects below a configuration that are of a gpt-oss, with their keys."""
    for key, value in config.items():
        if isinstance(value, dict):
            if value.get("model_type") == "gpt_oss":
                yield path + key, value
            elif path.count(".") < 2:
                yield from _gpt_oss_configs(value, f"{path}{key}.")
