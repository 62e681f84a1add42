"""Messages for checkpoints of no known format: what each one is, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .._utils.messages import listed
from ..checkpoint.metadata import CheckpointInfo
from ._names import inner_config
from ._table import Table

__all__ = ["describe_other_names", "describe_unknown"]


def describe_unknown(info: CheckpointInfo, tables: Mapping[str, Table]) -> str:
    """Return the message for a checkpoint whose format cannot be detected.

    Args:
        info: The checkpoint.
        tables: The tables of all formats by name.
    """
    config = info.location.display_path(info.config_name)
    if info.config_name != "config.json":
        file = info.location.display_path("config.json")
        return f"{file}: missing; this is a part of a model, which cannot be converted"
    model_type = info.config.get("model_type")
    if model_type == "gpt_oss":
        return f"{config}: of a gpt-oss, but {describe_other_names(info, tables)}"
    if model_type is None and inner_config(info.config) is None:
        if "num_hidden_layers" in info.config:
            return (
                f"{config}: not of a gpt-oss checkpoint: it has no model type, and "
                f"{describe_other_names(info, tables)}"
            )
        return f"{config}: not of a gpt-oss checkpoint: it has the model type None"
    message = f"{config}: a checkpoint of model type {str(model_type)[:40]!r}"
    if str(model_type).startswith("gpt_oss_puzzle"):
        return f"{message}, whose layers have different numbers of experts; no format here holds it"
    experts = [name for name in info.tensors if ".mlp.experts." in name]
    sinks = [name for name in info.tensors if name.endswith(".self_attn.sinks")]
    if inner_config(info.config) is not None or (experts and sinks):
        return (
            f"{message}; a gpt-oss is inside, but config.json and the names of the tensors do not "
            "say clearly which part it is: save that part as a checkpoint of its own"
        )
    return f"{message}; only gpt_oss can be converted"


def describe_other_names(info: CheckpointInfo, tables: Mapping[str, Table]) -> str:
    """Return which names the tensors have, and the format whose names are nearest to them."""
    patterns = {_pattern(name) for name in info.tensors}
    layer = [n for n in info.tensors if re.search(r"(^|\.)0\.", n) and "expert" in n]
    shown = listed([*map(repr, layer or info.tensors)], 3)
    counts = {
        name: len(patterns & {_pattern(row.stored.format(l=0, e=0)) for row in table})
        for name, table in tables.items()
    }
    nearest = max(counts, key=lambda name: counts[name])
    if not counts[nearest]:
        return f"its tensors have names of no known format: {shown}"
    return f"its tensors have other names: {shown}; the nearest known format is {nearest}"


def _pattern(name: str) -> str:
    """Return a name with all numbers replaced, to compare names across layers and experts."""
    return re.sub(r"\d+", "0", name)
