"""From an adapter's tensors to the changes of a model's tensors, each checked against the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..formats._table import stored_shape
from ..model.config import ModelConfig
from ..model.tensors import EXPERT_TENSORS
from ..tensors.raw_tensor import RawTensor
from ..transforms.changes import Change, LowRankChange, RowsChange
from ..transforms.factors import Factor, FactorCache
from .absent import refuse_absent
from .adapter_file import AdapterFile
from .base_model import Addition, BaseModel, Place
from .expert_changes import stack_changes, tinker_changes
from .parts import EXPERT_PARTS, EXPERTS, Module, Parts, Saved, model_tensor, parts_of
from .stacks import (
    Decision,
    decide_b_layout,
    decide_orientation,
    find_stacks,
    pair,
    refuse,
)

__all__ = ["AdapterChanges", "Place", "changes_of"]


@dataclass(slots=True)
class AdapterChanges:
    """What an adapter changes in a model."""

    file: AdapterFile
    changes: dict[Place, list[Callable[[], Change]]] = field(default_factory=dict)
    """In order, made when they are needed: a model has thousands of experts."""
    replacements: dict[Place, Saved] = field(default_factory=dict)
    orientation: Decision | None = None
    """Of stacked experts; None without."""
    b_layout: Decision | None = None
    """Of stacked experts; None without."""

    def decisions(self) -> dict[str, str]:
        """Return how the experts' tensors are read, as `Adapter` says it."""
        decided = {"orientation": self.orientation, "b_layout": self.b_layout}
        return {key: one.value for key, one in decided.items() if one is not None}

    def add(self, *additions: Addition) -> None:
        """Add changes of tensors."""
        for place, make in additions:
            self.changes.setdefault(place, []).append(make)


def changes_of(file: AdapterFile, model: ModelConfig, cache: FactorCache) -> AdapterChanges:
    """Return what an adapter changes in a model; each of its tensors is used once.

    Args:
        file: The adapter.
        model: The base model.
        cache: Where factors in use are kept.

    Raises:
        CheckpointError: If the adapter is damaged, of another model, or cannot be merged.
        OptionError: If it contradicts what the user says about it.
    """
    parts, saved = parts_of(file)
    found = AdapterChanges(file)
    base = BaseModel(file, model, cache)
    builder = _Builder(base, found)
    for whole in saved:
        builder.add_saved(whole)
    stacked = [one for one in parts if one.module.template == EXPERTS]
    if stacked:
        stacks = find_stacks(file, stacked, model.sizes)
        found.orientation = decide_orientation(file, stacks, model.sizes)
        found.b_layout = decide_b_layout(file, stacks)
        how = found.orientation.value, found.b_layout.value
        for stack in stacks:
            found.add(*stack_changes(base, stack, *how))
    for one in parts:
        if one.module.template != EXPERTS:
            builder.add_module(one)
    refuse_absent(file, model, [*found.changes], saved)
    return found


@dataclass(frozen=True, slots=True)
class _Builder:
    """Turns parts into changes."""

    base: BaseModel
    found: AdapterChanges

    def add_saved(self, saved: Saved) -> None:
        """Add a tensor that is stored whole."""
        row, layer, raw = saved
        self.base.check_numbers(Module(row.stored, layer, None), raw)
        self.base.refuse_tied(row.tensor, raw)
        if not self.base.model.has(row.tensor) and row.tensor != "unembed":
            raise refuse(self.base.file, raw, "replaces a bias that the base model does not have")
        self.base.check_shape(raw, stored_shape(row, self.base.model.sizes), "the base model")
        place = Place(row.tensor, layer, None)
        self.found.replacements[place] = saved

    def add_module(self, parts: Parts) -> None:
        """Add the changes of a module that is a linear layer or an embedding."""
        module, tensors = parts.module, dict(parts.tensors)
        first = next(iter(tensors.values()))
        self.base.check_numbers(module, first)
        name = module.template.rpartition(".")[2]
        tensor = model_tensor(module)
        self.base.refuse_tied(tensor, first)
        if module.depth:
            raise refuse(self.base.file, first, "is in a second adapter of the same module")
        if name in EXPERT_PARTS:
            self.found.add(*tinker_changes(self.base, parts, name))
            used = {"lora_A", "lora_B"}
        elif "lora_embedding_A" in tensors or "lora_embedding_B" in tensors:
            self._add_embedding(parts, tensor)
            used = {"lora_embedding_A", "lora_embedding_B"}
        elif "token_adapter.trainable_tokens_delta" in tensors:
            self._add_tokens(parts, tensor, name)
            used = {"token_adapter.trainable_tokens_delta"}
        else:
            used = self._add_linear(parts, tensor)
        for part, raw in tensors.items():
            if part not in used:
                why = "DoRA on it is not merged here" if "magnitude" in part else "it has no place"
                raise refuse(self.base.file, raw, f"is a {part} of {module.name}: {why}")

    def _add_linear(self, parts: Parts, tensor: str) -> set[str]:
        """Add a linear layer's changes; returns the parts that are used."""
        module, tensors = parts.module, parts.tensors
        a, b = pair(self.base.file, parts, "lora_A", "lora_B")
        outputs, inputs = self.base.matrix_shape(tensor)
        # Where the weight is adapted as a parameter, patterns match the parameter's name.
        is_parameter = self.base.file.config.targets_parameter(f"{module.name}.weight")
        name = f"{module.name}.weight" if is_parameter else module.name
        rank, scale = self.base.rank(name, a, a.shape[0]), self.base.scale(name)
        self.base.check_shape(a, (rank, inputs), "the base model")
        self.base.check_shape(b, (outputs, rank), "the base model")
        left = Factor(b, 0, outputs, rank, is_rank_first=False)
        right = Factor(a, 0, inputs, rank, is_rank_first=True)
        magnitude = tensors.get("lora_magnitude_vector")
        lengths = None
        if magnitude is not None:
            self.base.check_shape(magnitude, (outputs,), "the base model")
            lengths = Factor(magnitude, 0, outputs, 1, is_rank_first=False)
        change = LowRankChange(
            left, right, (outputs, inputs), scale, self.base.cache,
            is_rounded_by_peft=is_parameter or tensor in EXPERT_TENSORS, magnitude=lengths,
        )  # fmt: skip
        place = Place(tensor, module.layer, module.expert)
        self.found.add(Addition(place, lambda: change))
        config = self.base.file.config
        for part, is_expected in (
            ("lora_magnitude_vector", config.is_dora and not is_parameter),
            ("lora_B.bias", config.has_lora_bias and not is_parameter),
        ):
            if is_expected is not (part in tensors):
                said = "calls for one" if is_expected else "does not"
                raise refuse(
                    self.base.file, tensors.get(part, a),
                    f"is of a layer {'with' if part in tensors else 'without'} {part}, and "
                    f"adapter_config.json {said}; save or download the adapter again",
                )  # fmt: skip
        if "lora_B.bias" in tensors:
            self._add_bias(place, tensors["lora_B.bias"], outputs, scale)
        return {"lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector"}

    def _add_bias(self, place: Place, raw: RawTensor, outputs: int, scale: float) -> None:
        """Add what `lora_bias` adds to a layer's bias."""
        bias = f"{place.tensor}_bias"
        is_there = bias in EXPERT_TENSORS or (bias != "unembed_bias" and self.base.model.has(bias))
        if not is_there:
            raise refuse(
                self.base.file, raw,
                f"is a bias, and the layer has none in the base model ({place.tensor}): lora_bias "
                "cannot be merged there",
            )  # fmt: skip
        self.base.check_shape(raw, (outputs,), "the base model")
        left = Factor(raw, 0, outputs, 1, is_rank_first=False)
        change = LowRankChange(left, None, (outputs, 1), scale, self.base.cache)
        self.found.add(Addition(place._replace(tensor=bias), lambda: change))

    def _add_embedding(self, parts: Parts, tensor: str) -> None:
        """Add an embedding's change, whose matrices have no `.weight` and are transposed."""
        module = parts.module
        a, b = pair(self.base.file, parts, "lora_embedding_A", "lora_embedding_B")
        if tensor != "embed":
            raise refuse(self.base.file, a, f"is of an embedding, and {module.name} is none")
        if "lora_magnitude_vector" in parts.tensors:
            raise refuse(
                self.base.file, parts.tensors["lora_magnitude_vector"],
                "is DoRA of an embedding, which is not merged here",
            )  # fmt: skip
        tokens, width = self.base.matrix_shape(tensor)
        rank = self.base.rank(module.name, a, a.shape[0])
        self.base.check_shape(a, (rank, tokens), "the base model")
        self.base.check_shape(b, (width, rank), "the base model")
        left = Factor(a, 0, tokens, rank, is_rank_first=True)
        right = Factor(b, 0, width, rank, is_rank_first=False)
        scale = self.base.scale(module.name)
        change = LowRankChange(
            left, right, (tokens, width), scale, self.base.cache, is_rounded_by_peft=True
        )
        self.found.add(Addition(Place(tensor, None, None), lambda: change))

    def _add_tokens(self, parts: Parts, tensor: str, name: str) -> None:
        """Add the rows of trained tokens."""
        raw = parts.tensors["token_adapter.trainable_tokens_delta"]
        if tensor not in ("embed", "unembed"):
            raise refuse(self.base.file, raw, f"is of tokens, and {parts.module.name} has none")
        tokens = self.base.file.config.token_indices.get(name)
        if tokens is None:
            raise refuse(
                self.base.file, raw,
                "is of trained tokens, and trainable_token_indices in adapter_config.json does not "
                "say which; correct it there",
            )  # fmt: skip
        vocabulary, width = self.base.matrix_shape(tensor)
        self.base.check_shape(raw, (len(tokens), width), "trainable_token_indices")
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise refuse(
                self.base.file, raw,
                f"is of tokens {min(tokens)} to {max(tokens)}, and the base model has 0 to "
                f"{vocabulary - 1}: it was trained on another model",
            )  # fmt: skip
        change = RowsChange(raw, tokens)
        self.found.add(Addition(Place(tensor, None, None), lambda: change))
