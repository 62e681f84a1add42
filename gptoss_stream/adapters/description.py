"""What an adapter is, for users: kind, rank, alpha, targets, layers, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from ..errors import CheckpointError, OptionError
from ..tensors.raw_tensor import RawTensor
from .adapter_file import AdapterFile
from .changes import AdapterChanges
from .parts import EXPERT_PARTS, EXPERTS, Parts, Saved, model_tensor, parts_of
from .stacks import Decision, decide_b_layout, decide_orientation, find_stacks, pair

__all__ = ["describe"]

_NAMES = {"gate_up": "gate_up_proj", "down": "down_proj", "unembed": "lm_head",
          "embed": "embed_tokens", "router": "router"}  # fmt: skip


def describe(file: AdapterFile, changes: AdapterChanges | None = None) -> dict[str, Any]:
    """Return what an adapter is, as JSON types.

    Args:
        file: The adapter.
        changes: What it changes in its base model. Without it, what only the base model's sizes
            show is said to be unknown.

    Raises:
        CheckpointError: If the adapter is damaged, or cannot be merged.
        OptionError: If it contradicts what the user says about it.
    """
    parts, saved = parts_of(file)
    config = file.config
    targets, ranks = _targets(file, parts)
    found: dict[str, Any] = {
        "path": str(file.info.location),
        "kind": _kind(file, parts),
        "base_model": config.base_model,
        "peft_version": config.peft_version or file.card.peft,
        "rank": config.rank,
        "alpha": config.alpha,
        "scale": config.scale_of(""),
        "ranks": sorted(ranks),
        "targets": {name: _numbers(layers) for name, layers in targets.items()},
        "saved_whole": sorted({_saved_name(one) for one in saved}),
        "tensors": len(file.info.tensors),
        "bytes": sum(raw.nbytes for raw in file.info.tensors.values()),
    }
    if changes is None:
        return {**found, **_stacks(file, parts)}
    decided = {"orientation": changes.orientation, "b_layout": changes.b_layout}
    return {**found, **{key: one._asdict() for key, one in decided.items() if one is not None}}


def _kind(file: AdapterFile, parts: Iterable[Parts]) -> str:
    """Return the kind of LoRA."""
    names = {part for one in parts for part in one.tensors}
    kinds = ["rsLoRA" if file.config.is_rslora else "LoRA"]
    kinds += ["DoRA"] if "lora_magnitude_vector" in names else []
    kinds += ["lora_bias"] if "lora_B.bias" in names else []
    kinds += ["trained tokens"] if any("token_adapter" in name for name in names) else []
    return ", ".join(kinds)


def _targets(
    file: AdapterFile, parts: Iterable[Parts]
) -> tuple[dict[str, set[int | None]], set[int]]:
    """Return the layers of each target, and the ranks."""
    targets: dict[str, set[int | None]] = {}
    ranks = set()
    for one in parts:
        module = one.module
        last = module.template.rpartition(".")[2]
        if module.template == EXPERTS:
            parameters = [f"{module.name}.{tensor}_proj" for tensor in ("gate_up", "down")]
            targeted = [name for name in parameters if file.config.targets_parameter(name)]
            if len(targeted) != 1:
                targeted = [parameters[0 if module.depth else 1]]
            names = [f"experts.{name.rpartition('.')[2]}" for name in targeted]
            ranks |= {file.config.rank_of(name) for name in targeted}
        else:
            tensor = EXPERT_PARTS[last][0] if last in EXPERT_PARTS else model_tensor(module)
            inside = "experts." if ".experts" in module.template else ""
            names = [inside + _NAMES.get(tensor, last)]
            parameter = f"{module.name}.weight"
            is_parameter = file.config.targets_parameter(parameter)
            ranks.add(file.config.rank_of(parameter if is_parameter else module.name))
        for name in names:
            targets.setdefault(name, set()).add(module.layer)
    return targets, ranks


def _numbers(layers: Iterable[int | None]) -> list[int]:
    """Return the layers in order."""
    return sorted(layer for layer in layers if layer is not None)


def _saved_name(saved: Saved) -> str:
    """Return the name of a tensor that is stored whole, without its layer."""
    return saved.row.stored.replace("model.layers.{l}.", "")


def _stacks(file: AdapterFile, parts: Iterable[Parts]) -> dict[str, Any]:
    """Return how the adapters of stacked experts are read; nothing without any."""
    stacked = [one for one in parts if one.module.template == EXPERTS]
    if not stacked:
        return {}
    sizes = _sizes(file, parts, stacked)
    if sizes is None:
        unknown = {"value": None, "reason": "the base model's sizes are needed to see it"}
        is_marked = file.config.b_layout is not None
        layout = _decided(partial(decide_b_layout, file, ())) if is_marked else unknown
        return {"orientation": unknown, "b_layout": layout}
    stacks = find_stacks(file, stacked, sizes)
    found: dict[str, Any] = {"experts": sizes["e"]}
    found["orientation"] = _decided(partial(decide_orientation, file, stacks, sizes))
    found["b_layout"] = _decided(partial(decide_b_layout, file, stacks))
    return found


def _decided(decide: Callable[[], Decision]) -> dict[str, str | None]:
    """Return a decision as JSON types, or why there is none."""
    try:
        return decide()._asdict()
    except (CheckpointError, OptionError) as error:
        return {"value": None, "reason": str(error)}


def _sizes(
    file: AdapterFile, parts: Iterable[Parts], stacked: Sequence[Parts]
) -> dict[str, int] | None:
    """Return the base model's sizes as far as the adapter shows them; None if it does not.

    Those of gate and up are H and 2I, those of down I and H. Where only one of the two is there, H
    must be seen elsewhere, or H and I must be equal as in gpt-oss.
    """
    first: dict[int, tuple[RawTensor, RawTensor]] = {}
    for found in stacked:
        first.setdefault(found.module.depth, pair(file, found, "lora_A", "lora_B"))
    if 0 not in first:
        return None
    sides = {depth: (a.shape[1], b.shape[0]) for depth, (a, b) in first.items()}
    seen = _hidden_size(file, parts)
    candidates = {
        (hidden, inner)
        for hidden in ({seen} if seen else {size for some in sides.values() for size in some})
        for inner in _inner_sizes(hidden, sides)
    }
    if len(sides) == 1 and len(candidates) > 1:
        candidates = {(hidden, inner) for hidden, inner in candidates if hidden == inner}
    if len(candidates) != 1:
        return None
    ((hidden, inner),) = candidates
    outermost = max(first)
    is_gate_up = sorted(sides[outermost]) == sorted((hidden, 2 * inner))
    parameter = f"{stacked[0].module.name}.{'gate_up' if is_gate_up else 'down'}_proj"
    experts = first[outermost][0].shape[0] // file.config.rank_of(parameter)
    return {"m": hidden, "i": inner, "e": max(1, experts)}


def _inner_sizes(hidden: int, sides: Mapping[int, tuple[int, int]]) -> set[int]:
    """Return the intermediate sizes with which a hidden size explains all sides."""
    found = []
    for depth, some in sides.items():
        if hidden not in some:
            return set()
        (other,) = sorted(some, key=lambda size: size != hidden)[1:]
        as_gate_up = {other // 2} if other % 2 == 0 and (depth or len(sides) == 1) else set()
        found.append(as_gate_up | ({other} if depth == 0 else set()))
    return set.intersection(*found)


def _hidden_size(file: AdapterFile, parts: Iterable[Parts]) -> int | None:
    """Return the hidden size that another module's adapter shows."""
    for one in parts:
        last = one.module.template.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "router", "lm_head") and "lora_A" in one.tensors:
            return pair(file, one, "lora_A", "lora_B")[0].shape[1]
    return None
