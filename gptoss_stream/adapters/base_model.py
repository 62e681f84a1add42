"""What is checked of an adapter's tensors: that they are of the base model, and of one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..model.config import ModelConfig
from ..model.tensors import matrix_shape
from ..tensors.raw_tensor import RawTensor
from ..transforms.changes import Change
from ..transforms.factors import FactorCache
from .adapter_file import AdapterFile
from .parts import Module
from .stacks import refuse

__all__ = ["Addition", "BaseModel", "Place"]


class Place(NamedTuple):
    """A tensor of the model that an adapter changes."""

    tensor: str
    layer: int | None
    expert: int | None


class Addition(NamedTuple):
    """A change of a tensor."""

    place: Place
    make: Callable[[], Change]
    """Makes the change when it is needed: a model has thousands of experts."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that an adapter is merged into, with checks of the adapter's tensors."""

    file: AdapterFile
    model: ModelConfig
    cache: FactorCache
    """Where factors in use are kept."""

    def check_numbers(self, module: Module, raw: RawTensor) -> None:
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

    def matrix_shape(self, tensor: str) -> tuple[int, int]:
        """Return the numbers of outputs and inputs of a model tensor, of one layer and expert."""
        return matrix_shape(tensor, self.model.sizes)

    def check_shape(self, raw: RawTensor, expected: tuple[int, ...], what: str) -> None:
        """Refuse a tensor that is not of the model's sizes."""
        if raw.shape != expected:
            raise refuse(
                self.file, raw,
                f"is {list(raw.shape)}; {what} calls for {list(expected)}: it was trained on "
                "another model, or damaged",
            )  # fmt: skip

    def refuse_tied(self, tensor: str, raw: RawTensor) -> None:
        """Refuse to change the head of a model that has none of its own."""
        if tensor == "unembed" and self.model.tied_embeddings:
            raise refuse(
                self.file, raw,
                "changes lm_head, and the base model has tied embeddings: its head is the "
                "embedding, which would change too; untie the base model first",
            )  # fmt: skip

    def scale(self, module: str) -> float:
        """Return what the product of B and A is multiplied by."""
        return self.file.config.scale_of(module) * self.file.adapter.scale

    def rank(self, module: str, raw: RawTensor, rank: int) -> int:
        """Return a rank that adapter_config.json and the tensor agree on."""
        expected = self.file.config.rank_of(module)
        if rank != expected:
            raise refuse(
                self.file, raw,
                f"is {list(raw.shape)}, of rank {rank}; adapter_config.json calls for {expected}",
            )  # fmt: skip
        return rank
