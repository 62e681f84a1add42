"""From an adapter's tensors to the changes of a model's tensors, each checked against the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, TypeAlias

from ..formats import Row
from ..formats._table import stored_shape
from ..model.config import ModelConfig
from ..model.tensors import EXPERT_TENSORS, matrix_axes
from ..tensors.raw_tensor import RawTensor, RegroupedTensor
from ..transforms.changes import Change, LowRankChange, RowsChange
from ..transforms.factors import Factor, FactorCache
from .adapter_file import AdapterFile
from .parts import EXPERT_PARTS, EXPERTS, Module, Parts, Saved, model_tensor, parts_of
from .stacks import (
    Decision,
    Stack,
    decide_b_layout,
    decide_orientation,
    find_stacks,
    pair,
    refuse,
)

__all__ = ["AdapterChanges", "Place", "Replacement", "changes_of"]


class Place(NamedTuple):
    """A tensor of the model that an adapter changes."""

    tensor: str
    layer: int | None
    expert: int | None


class Replacement(NamedTuple):
    """A tensor that an adapter stores whole."""

    row: Row
    """How it is stored, a row of Hugging Face's table."""
    layer: int | None
    raw: RawTensor


_Maker: TypeAlias = Callable[[], Change]


@dataclass(slots=True)
class AdapterChanges:
    """What an adapter changes in a model."""

    file: AdapterFile
    changes: dict[Place, list[_Maker]] = field(default_factory=dict)
    """In order, made when they are needed: a model has thousands of experts."""
    replacements: dict[Place, Replacement] = field(default_factory=dict)
    ranks: dict[str, set[int]] = field(default_factory=dict)
    """The ranks of each model tensor that is changed."""
    orientation: Decision | None = None
    """Of stacked experts; None without."""
    b_layout: Decision | None = None
    """Of stacked experts; None without."""
    notes: list[str] = field(default_factory=list)

    def add(self, place: Place, make: _Maker, rank: int) -> None:
        """Add a change of a tensor."""
        self.changes.setdefault(place, []).append(make)
        self.ranks.setdefault(place.tensor, set()).add(rank)


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
    builder = _Builder(file, model, cache, found)
    for whole in saved:
        builder.add_saved(whole)
    stacked = [one for one in parts if one.module.template == EXPERTS]
    if stacked:
        stacks = find_stacks(file, stacked, model.sizes)
        found.orientation = decide_orientation(file, stacks, model.sizes)
        found.b_layout = decide_b_layout(file, stacks)
        for stack in stacks:
            builder.add_stack(stack)
    for one in parts:
        if one.module.template != EXPERTS:
            builder.add_module(one)
    return found


@dataclass(frozen=True, slots=True)
class _Builder:
    """Turns parts into changes."""

    file: AdapterFile
    model: ModelConfig
    cache: FactorCache
    found: AdapterChanges

    def _check_numbers(self, module: Module, raw: RawTensor) -> None:
        """Refuse a layer or an expert that the model does not have."""
        for noun, number, count in (
            ("layer", module.layer, self.model.num_layers),
            ("expert", module.expert, self.model.num_experts),
        ):
            if number is not None and number >= count:
                raise refuse(
                    self.file, raw,
                    f"is of {noun} {number}, and the base model has {noun}s 0 to {count - 1}: it "
                    "was trained on another model",
                )  # fmt: skip

    def _matrix_shape(self, tensor: str) -> tuple[int, int]:
        """Return the numbers of outputs and inputs of a model tensor, of one layer and expert."""
        sizes = self.model.sizes
        outputs, inputs = (prod(sizes[axis] for axis in axes) for axes in matrix_axes(tensor))
        return outputs, inputs

    def _check_shape(self, raw: RawTensor, expected: tuple[int, ...], what: str) -> None:
        """Refuse a tensor that is not of the model's sizes."""
        if raw.shape != expected:
            raise refuse(
                self.file, raw,
                f"is {list(raw.shape)}; {what} calls for {list(expected)}: it was trained on "
                "another model, or damaged",
            )  # fmt: skip

    def _refuse_tied(self, tensor: str, raw: RawTensor) -> None:
        """Refuse to change the head of a model that has none of its own."""
        if tensor == "unembed" and self.model.tied_embeddings:
            raise refuse(
                self.file, raw,
                "changes lm_head, and the base model has tied embeddings: its head is the "
                "embedding, which would change too; untie the base model first",
            )  # fmt: skip

    def add_saved(self, saved: Saved) -> None:
        """Add a tensor that is stored whole."""
        row, layer, raw = saved
        self._check_numbers(Module(row.stored, layer, None), raw)
        self._refuse_tied(row.tensor, raw)
        if not self.model.has(row.tensor) and row.tensor != "unembed":
            raise refuse(self.file, raw, "replaces a bias that the base model does not have")
        self._check_shape(raw, stored_shape(row, self.model.sizes), "the base model")
        place = Place(row.tensor, layer, None)
        self.found.replacements[place] = Replacement(row, layer, raw)

    def add_stack(self, stack: Stack) -> None:
        """Add the changes of all experts of a layer."""
        self._check_numbers(Module(EXPERTS, stack.layer, None), stack.a)
        assert self.found.orientation is not None
        assert self.found.b_layout is not None
        experts = self.model.num_experts
        rank = stack.a.shape[0] // experts
        width, height = stack.sides
        b = stack.b
        if experts > 1:
            b = RegroupedTensor(
                b.name, b.dtype, (experts, height, rank), b.shard, b.offset, b.checkpoint,
                is_group_fastest=self.found.b_layout.value == "rank_major",
            )  # fmt: skip
        scale = self._scale(stack.parameter)
        is_swapped = self.found.orientation.value == "swapped"

        def make(expert: int) -> Change:
            of_a = Factor(stack.a, expert * rank * width, width, rank, is_rank_first=True)
            of_b = Factor(b, expert * height * rank, height, rank, is_rank_first=False)
            left, right = (of_a, of_b) if is_swapped else (of_b, of_a)
            return LowRankChange(left, right, (left.size, right.size), scale, self.cache)

        for expert in range(experts):
            place = Place(stack.tensor, stack.layer, expert)
            self.found.add(place, _bound(make, expert), rank)

    def _scale(self, module: str) -> float:
        """Return what the product of B and A is multiplied by."""
        return self.file.config.scale_of(module) * self.file.adapter.scale

    def add_module(self, parts: Parts) -> None:
        """Add the changes of a module that is a linear layer or an embedding."""
        module, tensors = parts.module, dict(parts.tensors)
        first = next(iter(tensors.values()))
        self._check_numbers(module, first)
        name = module.template.rpartition(".")[2]
        tensor = model_tensor(module)
        self._refuse_tied(tensor, first)
        if module.depth:
            raise refuse(self.file, first, "is in a second adapter of the same module")
        if name in EXPERT_PARTS:
            self._add_tinker(parts, *EXPERT_PARTS[name])
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
                raise refuse(self.file, raw, f"is a {part} of {module.name}: {why}")

    def _add_linear(self, parts: Parts, tensor: str) -> set[str]:
        """Add a linear layer's changes; returns the parts that are used."""
        module, tensors = parts.module, parts.tensors
        a, b = pair(self.file, parts, "lora_A", "lora_B")
        outputs, inputs = self._matrix_shape(tensor)
        # The router's weight is a parameter, not a linear layer, and patterns match its name.
        name = f"{module.name}.weight" if module.template.endswith(".router") else module.name
        rank, scale = self._rank(name, a, a.shape[0]), self._scale(name)
        self._check_shape(a, (rank, inputs), "the base model")
        self._check_shape(b, (outputs, rank), "the base model")
        left = Factor(b, 0, outputs, rank, is_rank_first=False)
        right = Factor(a, 0, inputs, rank, is_rank_first=True)
        magnitude = tensors.get("lora_magnitude_vector")
        lengths = None
        if magnitude is not None:
            self._check_shape(magnitude, (outputs,), "the base model")
            lengths = Factor(magnitude, 0, outputs, 1, is_rank_first=False)
        change = LowRankChange(left, right, (outputs, inputs), scale, self.cache, magnitude=lengths)
        place = Place(tensor, module.layer, module.expert)
        self.found.add(place, lambda: change, rank)
        if "lora_B.bias" in tensors:
            self._add_bias(place, tensors["lora_B.bias"], outputs, scale)
        return {"lora_A", "lora_B", "lora_B.bias", "lora_magnitude_vector"}

    def _add_bias(self, place: Place, raw: RawTensor, outputs: int, scale: float) -> None:
        """Add what `lora_bias` adds to a layer's bias."""
        bias = f"{place.tensor}_bias"
        is_there = bias in EXPERT_TENSORS or (bias != "unembed_bias" and self.model.has(bias))
        if not is_there:
            raise refuse(
                self.file, raw,
                f"is a bias, and the layer has none in the base model ({place.tensor}): lora_bias "
                "cannot be merged there",
            )  # fmt: skip
        self._check_shape(raw, (outputs,), "the base model")
        left = Factor(raw, 0, outputs, 1, is_rank_first=False)
        change = LowRankChange(left, None, (outputs, 1), scale, self.cache)
        self.found.add(place._replace(tensor=bias), lambda: change, 1)

    def _add_embedding(self, parts: Parts, tensor: str) -> None:
        """Add an embedding's change, whose matrices have no `.weight` and are transposed."""
        module = parts.module
        a, b = pair(self.file, parts, "lora_embedding_A", "lora_embedding_B")
        if tensor != "embed":
            raise refuse(self.file, a, f"is of an embedding, and {module.name} is none")
        if "lora_magnitude_vector" in parts.tensors:
            raise refuse(
                self.file, parts.tensors["lora_magnitude_vector"],
                "is DoRA of an embedding, which is not merged here",
            )  # fmt: skip
        tokens, width = self._matrix_shape(tensor)
        rank = self._rank(module.name, a, a.shape[0])
        self._check_shape(a, (rank, tokens), "the base model")
        self._check_shape(b, (width, rank), "the base model")
        left = Factor(a, 0, tokens, rank, is_rank_first=True)
        right = Factor(b, 0, width, rank, is_rank_first=False)
        scale = self._scale(module.name)
        change = LowRankChange(left, right, (tokens, width), scale, self.cache)
        self.found.add(Place(tensor, None, None), lambda: change, rank)

    def _add_tokens(self, parts: Parts, tensor: str, name: str) -> None:
        """Add the rows of trained tokens."""
        raw = parts.tensors["token_adapter.trainable_tokens_delta"]
        if tensor not in ("embed", "unembed"):
            raise refuse(self.file, raw, f"is of tokens, and {parts.module.name} has none")
        tokens = self.file.config.token_indices.get(name)
        if tokens is None:
            raise refuse(
                self.file, raw,
                "is of trained tokens, and trainable_token_indices in adapter_config.json does not "
                "say which; correct it there",
            )  # fmt: skip
        vocabulary, width = self._matrix_shape(tensor)
        self._check_shape(raw, (len(tokens), width), "trainable_token_indices")
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise refuse(
                self.file, raw,
                f"is of tokens {min(tokens)} to {max(tokens)}, and the base model has 0 to "
                f"{vocabulary - 1}: it was trained on another model",
            )  # fmt: skip
        change = RowsChange(raw, tokens)
        self.found.add(Place(tensor, None, None), lambda: change, len(tokens))

    def _add_tinker(self, parts: Parts, tensor: str, part: int | None) -> None:
        """Add the changes of one of an expert's matrices in Tinker's form, for all experts.

        A is [experts, rank, inputs] and B [experts, outputs, rank], either with 1 instead of the
        experts if they share it. Gate and up have adapters of their own.
        """
        module, experts = parts.module, self.model.num_experts
        raws = [parts.tensors.get(part) for part in ("lora_A", "lora_B")]
        if raws[0] is None or raws[1] is None:
            raise refuse(
                self.file, next(iter(parts.tensors.values())),
                "has no other half beside it; save or download the adapter again",
            )  # fmt: skip
        a, b = raws[0], raws[1]
        outputs, inputs = self._matrix_shape(tensor)
        indices = None if part is None else range(part, outputs, 2)
        height = outputs if indices is None else len(indices)
        for raw in (a, b):
            if len(raw.shape) != 3 or raw.shape[0] not in (1, experts):
                raise refuse(
                    self.file, raw,
                    f"has the shape {list(raw.shape)}; the first axis must be 1 or the base "
                    f"model's {experts} experts",
                )  # fmt: skip
        rank = self._rank(module.name, a, a.shape[1])
        self._check_shape(a, (a.shape[0], rank, inputs), "the base model")
        self._check_shape(b, (b.shape[0], height, rank), "the base model")
        scale = self._scale(module.name)

        def make(expert: int) -> Change:
            first_a, first_b = ((expert if raw.shape[0] > 1 else 0) for raw in (a, b))
            right = Factor(a, first_a * rank * inputs, inputs, rank, is_rank_first=True)
            left = Factor(b, first_b * height * rank, height, rank, is_rank_first=False,
                          indices=indices)  # fmt: skip
            return LowRankChange(left, right, (outputs, inputs), scale, self.cache)

        for expert in range(experts):
            self.found.add(Place(tensor, module.layer, expert), _bound(make, expert), rank)

    def _rank(self, module: str, raw: RawTensor, rank: int) -> int:
        """Return a rank that adapter_config.json and the tensor agree on."""
        expected = self.file.config.rank_of(module)
        if rank != expected:
            raise refuse(
                self.file, raw,
                f"is {list(raw.shape)}, of rank {rank}; adapter_config.json calls for {expected}",
            )  # fmt: skip
        return rank


def _bound(make: Callable[[int], Change], expert: int) -> _Maker:
    """Return a function that makes the change of one expert."""
    return lambda: make(expert)
