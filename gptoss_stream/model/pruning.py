"""The choice of the layers and experts of which a smaller model is made.

The smaller model numbers its layers and experts from 0, in the order of the model that they are
taken from. Every layer keeps the same number of experts, since a gpt-oss configuration has one
number for all of them. Which ones may differ from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from operator import index
from typing import Any, TypeAlias

from ..errors import OptionError
from .config import ModelConfig
from .selection import numbers_in

__all__ = ["KeepExperts", "KeepLayers", "Pruning", "ResolvedPruning"]

KeepLayers: TypeAlias = "str | Iterable[int]"
"""Layers to keep: a text such as "0-5", or numbers in ascending order."""
KeepExperts: TypeAlias = (
    "str | Iterable[int] | Iterable[Iterable[int]] | Mapping[int, Iterable[int]]"
    " | Mapping[str, Iterable[int]]"
)
"""Experts to keep: likewise, or a list of numbers for each layer of the source, or a mapping from
layers of the source to such lists."""

_Numbers: TypeAlias = "str | tuple[int, ...]"


@dataclass(frozen=True, slots=True)
class ResolvedPruning:
    """The layers and experts of one model that a smaller model keeps, by their numbers in it.

    Without arguments it keeps everything.
    """

    layers: tuple[int, ...] | None = None
    """In ascending order; None for all."""
    experts: Mapping[int, tuple[int, ...]] | None = field(default=None)
    """For each layer that is kept, in ascending order; None for all of every layer."""

    @property
    def is_whole(self) -> bool:
        """Whether everything is kept."""
        return self.layers is None and self.experts is None

    @property
    def axes(self) -> frozenset[str]:
        """The axes of `MODEL_TENSORS` of which some indices are left out."""
        chosen = (("l", self.layers), ("e", self.experts))
        return frozenset(axis for axis, numbers in chosen if numbers is not None)

    def apply(self, model: ModelConfig) -> ModelConfig:
        """Return the smaller model. A token has no more experts than are left."""
        if self.is_whole:
            return model
        layers = range(model.num_layers) if self.layers is None else self.layers
        count = model.num_experts
        if self.experts is not None:
            count = len(self.experts[layers[0]])
        return replace(
            model,
            num_layers=len(layers),
            layer_types=tuple(model.layer_types[layer] for layer in layers),
            num_experts=count,
            experts_per_token=min(model.experts_per_token, count),
        )

    def numbers_before(
        self, layer: int | None, expert: int | None
    ) -> tuple[int | None, int | None]:
        """Return the numbers in the whole model of a layer and an expert of the smaller one.

        Args:
            layer: The layer; None for a tensor of no layer, or of all.
            expert: The expert in that layer; None likewise.
        """
        if layer is not None and self.layers is not None:
            layer = self.layers[layer]
        if layer is not None and expert is not None and self.experts is not None:
            expert = self.experts[layer][expert]
        return layer, expert

    def indices(self, axis: str, size: int, layer: int | None) -> Sequence[int]:
        """Return the indices of an axis that are kept, as the whole model numbers them.

        Args:
            axis: An axis of `MODEL_TENSORS`.
            size: Its length in the whole model.
            layer: The layer, as the whole model numbers it; for the axis of experts.
        """
        if axis == "l" and self.layers is not None:
            return self.layers
        if axis == "e" and self.experts is not None and layer is not None:
            return self.experts[layer]
        return range(size)

    def keeps(self, layer: int | None, expert: int | None) -> bool:
        """Return whether the tensor of a layer and an expert of the whole model is kept.

        Args:
            layer: The layer; None for a tensor of no layer, or of all.
            expert: The expert; None likewise.
        """
        if layer is None:
            return True
        if self.layers is not None and layer not in self.layers:
            return False
        return expert is None or self.experts is None or expert in self.experts[layer]

    def as_dict(self) -> dict[str, Any]:
        """Return what is kept as JSON types; empty if that is everything.

        Returns:
            `layers`, a list; and `experts`, a list if it is the same for all layers, else an
            object with a list for each layer. `Pruning.of` takes both.
        """
        found: dict[str, Any] = {}
        if self.layers is not None:
            found["layers"] = list(self.layers)
        if self.experts is not None:
            lists = {str(layer): list(numbers) for layer, numbers in self.experts.items()}
            first, *others = lists.values()
            found["experts"] = lists if any(other != first for other in others) else first
        return found


@dataclass(frozen=True, slots=True)
class Pruning:
    """What a user asks to keep of a model, before the model is known (see `of`)."""

    layers: _Numbers | None = None
    experts: _Numbers | Mapping[int, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, layers: KeepLayers | None, experts: KeepExperts | None) -> Pruning | None:
        """Return a choice as users write it; None if nothing is chosen.

        Args:
            layers: The layers to keep; None for all.
            experts: The experts to keep; None for all.

        Raises:
            OptionError: For values that are not numbers.
        """
        if layers is None and experts is None:
            return None
        kept = None if layers is None else _numbers(layers, "layers to keep")
        if experts is None or isinstance(experts, str):
            return cls(kept, experts)
        by_layer: dict[int, tuple[int, ...]] = {}
        if isinstance(experts, Mapping):
            for key, value in experts.items():
                layer = _layer(key)
                if layer in by_layer:
                    raise OptionError(f"experts to keep: layer {layer} occurs twice")
                by_layer[layer] = _as_tuple(value, f"experts to keep in layer {layer}")
            return cls(kept, by_layer)
        if not isinstance(experts, Iterable):
            raise _not_numbers("experts to keep", experts)
        entries: list[Any] = [*experts]
        if not entries or not isinstance(entries[0], Iterable):
            return cls(kept, _as_tuple(entries, "experts to keep"))
        for layer, value in enumerate(entries):
            by_layer[layer] = _as_tuple(value, f"experts to keep in layer {layer}")
        return cls(kept, by_layer)

    def resolve(self, model: ModelConfig) -> ResolvedPruning:
        """Return the choice with the layer and expert numbers of a model.

        Raises:
            OptionError: For a number that the model does not have or that occurs twice, for no
                number, for numbers that are not in order, and for layers that would have
                different numbers of experts.
        """
        layers: Sequence[int] = range(model.num_layers)
        if self.layers is not None:
            layers = _chosen(self.layers, model.num_layers, "layer", "layers to keep")
        experts: dict[int, tuple[int, ...]] | None = None
        if isinstance(self.experts, Mapping):
            experts = _experts_by_layer(self.experts, layers, model)
        elif self.experts is not None:
            numbers = _chosen(self.experts, model.num_experts, "expert", "experts to keep")
            experts = dict.fromkeys(layers, numbers)
        if experts is not None and len(experts[layers[0]]) == model.num_experts:
            experts = None
        return ResolvedPruning(None if len(layers) == model.num_layers else tuple(layers), experts)


def _numbers(value: str | Iterable[int], where: str) -> _Numbers:
    return value if isinstance(value, str) else _as_tuple(value, where)


def _as_tuple(value: Any, where: str) -> tuple[int, ...]:
    """Return whole numbers of any kind, such as numpy's, as a tuple."""
    try:
        numbers = [*value]
        if not any(isinstance(number, bool) for number in numbers):
            return tuple(index(number) for number in numbers)
    except TypeError:
        pass
    raise _not_numbers(where, value)


def _not_numbers(where: str, value: object) -> OptionError:
    return OptionError(
        f"{where}: {str(value)[:40]!r} is not a list of numbers; write them as [0, 3, 7]"
    )


def _layer(key: object) -> int:
    """Return a key of experts by layer, which in JSON is a text."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and str(int(key[:9])) == key:
        return int(key)
    if isinstance(key, str):
        raise OptionError(
            f"experts to keep: {key[:40]!r} is not the number of a layer; write it as 0, 1, …"
        )
    return _as_tuple((key,), "experts to keep, layer")[0]


def _experts_by_layer(
    lists: Mapping[int, tuple[int, ...]], layers: Sequence[int], model: ModelConfig
) -> dict[int, tuple[int, ...]]:
    """Return the experts of each layer that is kept.

    Lists of layers that are left out are checked and not used.
    """
    for layer in lists:
        if not 0 <= layer < model.num_layers:
            raise OptionError(
                f"experts to keep in layer {layer}: there are layers 0 to {model.num_layers - 1}"
            )
    found = {
        layer: _chosen(numbers, model.num_experts, "expert", f"experts to keep in layer {layer}")
        for layer, numbers in lists.items()
    }
    for layer in layers:
        if layer not in found:
            raise OptionError(
                f"experts to keep: there is no list for layer {layer}; give one for each layer of "
                "the source that is kept, by its number in the source"
            )
        if len(found[layer]) != len(found[layers[0]]):
            raise OptionError(
                f"experts to keep: {len(found[layers[0]])} in layer {layers[0]} and "
                f"{len(found[layer])} in layer {layer}; keep the same number in each layer, since "
                "the configuration of a gpt-oss has one number for all of them"
            )
    return {layer: found[layer] for layer in layers}


def _chosen(value: _Numbers, count: int, noun: str, where: str) -> tuple[int, ...]:
    """Return the numbers to keep, in ascending order.

    Those of a text may be in any order, as in a selection. In a list, another order could be meant
    as the order of the output, so it is refused.
    """
    numbers = numbers_in(value, count, noun) if isinstance(value, str) else [*value]
    if not numbers:
        raise OptionError(f"{where}: the list is empty; keep at least one {noun}")
    for number in numbers:
        if not 0 <= number < count:
            raise OptionError(f"{where}: {noun} {number}: there are {noun}s 0 to {count - 1}")
    in_order = sorted(numbers)
    for one, other in pairwise(in_order):
        if one == other:
            raise OptionError(f"{where}: {noun} {one} occurs twice; name it once")
    if in_order != numbers and not isinstance(value, str):
        raise OptionError(
            f"{where}: {str(numbers)[:40]} is not in ascending order, which the output keeps; "
            "sort it"
        )
    return tuple(in_order)
