"""What an adapter is, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._utils.messages import counted, sized

__all__ = ["describe_adapter", "print_adapter"]


def print_adapter(found: Mapping[str, Any]) -> None:
    """Print a page about an adapter.

    Args:
        found: As from `adapters.describe`.
    """
    print(f"{found['path']}: {describe_adapter(found)}")
    print(f"base model  {_plain(found['base_model']) or 'not named'}")
    print(f"saved by    PEFT {_plain(found['peft_version']) or 'of unknown version'}")
    print(f"{counted(found['tensors'], 'tensor')}, {sized(found['bytes'])}")
    for name, layers in found["targets"].items():
        print(f"  {name:22}  {_layers(layers)}")
    for name in found["saved_whole"]:
        print(f"  {name:22}  stored whole")
    for key, what in (("orientation", "orientation"), ("b_layout", "layout of lora_B")):
        if key in found:
            decided = found[key]
            print(f"{what} of the experts: {decided['value'] or 'unknown'} ({decided['reason']})")


def describe_adapter(found: Mapping[str, Any]) -> str:
    """Return an adapter's kind, rank and scale in words."""
    ranks = found["ranks"]
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
    scale = f"alpha {found['alpha']:g}"
    return f"{found['kind']}, {rank if ranks else 'without rank'}, {scale}"


def _plain(text: str | None) -> str:
    """Return a text of a file without characters that control a terminal."""
    return "".join(one for one in (text or "")[:200] if one.isprintable())


def _layers(layers: Sequence[int]) -> str:
    """Return layers in words: "layers 0-5, 7"."""
    if not layers:
        return ""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return "layers " + ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
